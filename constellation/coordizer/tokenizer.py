"""Text to token ids and back: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), lossless on any bytes.

    id 0          `<|eos|>`, the end of a document
    ids 1..15     `<|reserved_1|>` ... `<|reserved_15|>`
    ids 16..271   the bytes: id 16 + b is byte b
    ids 272..     merges, in the order they were learnt

Valid UTF-8 runs through BPE, a byte that belongs to no valid sequence becomes its one-byte token.
The specials are never produced from text: the nine characters `<|eos|>` are text like any other.
Everything follows from the list of merges, so a saved file is checked by rebuilding it from them. A run that begins
with a pretrained model has that model's tokenizer instead, with its own ids (pretrained.py): also lossless.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from constellation.coordizer import pretrained
from constellation.coordizer.alphabet import alphabet
from constellation.errors import ArtifactError, ConfigError, DataError, RunError

EOS = 0
SPECIALS = ("<|eos|>", *(f"<|reserved_{i}|>" for i in range(1, 16)))
FIRST_BYTE = len(SPECIALS)
FIRST_MERGE = FIRST_BYTE + 256

# Merges never cross these: words with the sign or space before them, numbers in groups of three, punctuation
# with the line ends after it, white space. Fewer tokens than GPT-2's pattern, the more so the larger the vocabulary.
_WORD, _OTHERS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERN = _WORD + _OTHERS
PHRASES = _WORD + r"(?: \p{L}+)*" + _OTHERS  # words that single spaces join are one piece: merges may cross the spaces
PATTERNS = (PATTERN, PHRASES)
_PARALLEL = "TOKENIZERS_PARALLELISM"
_INVALID = "\udc80-\udcff"  # what "surrogateescape" makes of bytes that are not UTF-8


class Tokenizer:
    """A byte-level BPE tokenizer, defined by its merges.

    token_bytes  of every id; b"" for those that no text holds
    specials     names of those that have one
    eos          the id that ends a document, and stands before the first

    Law: `decode(encode(data)) == data` for any bytes; a `str` counts as its UTF-8 bytes (a lone
    surrogate as the three bytes it would have).
    """

    token_bytes: list[bytes]
    specials: dict[int, str]
    eos: int
    hash: str
    pattern: str  # what merges do not cross; "" for a tokenizer of others

    def __init__(self, merges: Sequence[tuple[str, str]], pattern: str = PATTERN) -> None:
        vocab, self.token_bytes = _vocabulary(merges)
        engine = _engine(models.BPE(vocab=vocab, merges=list(merges)), pattern)
        engine.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
        engine.encode_special_tokens = True  # "<|eos|>" inside a text stays text
        self._engine, self._theirs = engine, ""
        self._merges, self.pattern = tuple(merges), pattern
        self._byte_ids: list[int | None] = list(range(FIRST_BYTE, FIRST_MERGE))
        self._apart = re.compile(f"([{_INVALID}]+)")
        self.vocab_size = len(self.token_bytes)
        self.eos = EOS
        self.specials = dict(enumerate(SPECIALS))
        self.hash = hashlib.sha256(json.dumps([pattern, SPECIALS, merges]).encode()).hexdigest()[:16]

    @classmethod
    def pretrained(cls, text: str, eos: int) -> Tokenizer:
        """The one that a tokenizer.json of others describes, documents ended by the id `eos`."""
        found = pretrained.read(text, eos)
        tokenizer = cls.__new__(cls)
        tokenizer._engine, tokenizer._theirs, tokenizer._merges = found.engine, text, ()
        tokenizer.token_bytes, tokenizer.specials, tokenizer.eos = found.token_bytes, found.specials, eos
        tokenizer._byte_ids, tokenizer.pattern = found.byte_ids, ""
        tokenizer._apart = re.compile(f"([{_INVALID}{found.apart}]+)")
        tokenizer.vocab_size = len(found.token_bytes)
        tokenizer.hash = hashlib.sha256(json.dumps([json.loads(text), eos], sort_keys=True).encode()).hexdigest()[:16]
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """The tokenizer of at most `vocab_size` tokens learnt from `texts`, the same for the same texts.

        A pair seen once is not merged, so a small corpus may leave `.vocab_size` below `vocab_size`.
        """
        if vocab_size < FIRST_MERGE:
            raise ConfigError(f"vocab_size={vocab_size}: must be at least {FIRST_MERGE} (256 bytes + 16 specials)")
        engine = _engine(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIALS),
            initial_alphabet=list(alphabet()),
            show_progress=False,
        )
        _quiet_forks()
        engine.train_from_iterator(texts, trainer=trainer)
        return cls([(a, b) for a, b in json.loads(engine.to_str())["model"]["merges"]])

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of one text, without EOS; the empty text has none."""
        return self._encode(text, lambda part: self._engine.encode(part).ids)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        """`[encode(t) for t in texts]`, on all cores."""
        _quiet_forks()
        if self._theirs and any(not isinstance(t, str) or self._apart.search(t) for t in texts):
            return [self.encode(t) for t in texts]
        try:
            found = [e.ids for e in self._engine.encode_batch_fast(texts)]
        except (TypeError, UnicodeError):  # bytes, or a lone surrogate, among them
            return [self.encode(t) for t in texts]
        return (
            [self._whole(ids, str(t).encode()) for ids, t in zip(found, texts, strict=True)] if self._theirs else found
        )

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids` in a row; specials have none."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ConfigError(f"token id {bad} is not in this tokenizer's vocabulary, 0..{self.vocab_size - 1}")
        return b"".join(map(self.token_bytes.__getitem__, ids))

    def parts(self) -> dict[int, tuple[int, int]]:
        """Of every merged token the two that it is made of, in the order of its id; of several merges the first."""
        vocab = _vocabulary(self._merges)[0]
        found: dict[int, tuple[int, int]] = {}
        for a, b in self._merges:
            found.setdefault(vocab[a + b], (vocab[a], vocab[b]))
        return dict(sorted(found.items()))

    def save(self, path: Path) -> None:
        """Write `tokenizer.json` in the format of the `tokenizers` library, atomically."""
        path = Path(path)
        content = json.loads(self._theirs or self._engine.to_str())
        content["model"]["hash"] = self.hash  # readers of the format skip fields of the model they do not know
        if self._theirs:
            content["model"]["eos"] = self.eos
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(content, file, ensure_ascii=False, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunError(f"{path}: the tokenizer cannot be written: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """The tokenizer saved at `path`; a damaged or foreign file is refused."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if "eos" in found["model"]:
                said, eos = (found["model"].pop(name) for name in ("hash", "eos"))
                theirs = cls.pretrained(json.dumps(found), eos)
                if theirs.hash == said:
                    return theirs
                raise ValueError("its checksum differs")
            pattern = found["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            if pattern not in PATTERNS:
                raise ValueError(f"it splits text by {pattern!r}")
            tokenizer = cls([(str(a), str(b)) for a, b in found["model"]["merges"]], pattern)
            whole = _essence(found) == _essence(json.loads(tokenizer._engine.to_str()), tokenizer.hash)
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
        except Exception as error:  # the engine raises bare Exception
            raise ArtifactError(f"{path}: not a tokenizer of this project: {type(error).__name__}: {error}") from None
        if not whole:
            raise ArtifactError(f"{path}: damaged or foreign: its content does not follow from its merges; train anew")
        return tokenizer

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[Any, ...]]:
        if self._theirs:
            return Tokenizer.pretrained, (self._theirs, self.eos)
        return Tokenizer, (self._merges, self.pattern)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, hash={self.hash!r})"

    def _encode(self, text: str | bytes, bpe: Callable[[str], list[int]]) -> list[int]:
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)
        parts = self._apart.split(data.decode("utf-8", "surrogateescape"))
        ids: list[int] = []
        for i, part in enumerate(parts):  # what goes through BPE and what goes byte by byte alternate
            ids += self._bytes(part.encode("utf-8", "surrogateescape")) if i % 2 else bpe(part)
        return self._whole(ids, data) if self._theirs else ids

    def _bytes(self, data: bytes) -> list[int]:
        ids = [self._byte_ids[b] for b in data]
        if None in ids:
            raise DataError(
                f"byte 0x{data[ids.index(None)]:02x} has no token in this pretrained tokenizer: leave it out"
            )
        return ids  # type: ignore[return-value]

    def _whole(self, ids: list[int], data: bytes) -> list[int]:
        """`ids`, which must have all of `data`: a tokenizer of others may drop what it has no token for."""
        if sum(map(len, map(self.token_bytes.__getitem__, ids))) != len(data):
            raise DataError(f"this pretrained tokenizer loses a part of {data[:60]!r}: leave such text out")
        return ids


def splitter(pattern: str) -> pre_tokenizers.Split:
    """What cuts a text into the pieces that merges never cross."""
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _engine(model: models.BPE, pattern: str = PATTERN) -> Engine:
    engine = Engine(model)
    engine.pre_tokenizer = pre_tokenizers.Sequence([
        splitter(pattern),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    engine.decoder = decoders.ByteLevel()
    return engine


def _essence(content: dict[str, Any], own_hash: str | None = None) -> list[Any]:
    """What of a tokenizer.json decides the ids; the rest may differ between versions of the library."""
    model, split = content["model"], content["pre_tokenizer"]["pretokenizers"][0]
    specials = [(t["id"], t["content"], t["special"]) for t in content["added_tokens"]]
    return [own_hash or model["hash"], model["vocab"], split["pattern"], specials, content["normalizer"]]


def _vocabulary(merges: Sequence[tuple[str, str]]) -> tuple[dict[str, int], list[bytes]]:
    byte = {c: bytes([b]) for b, c in enumerate(alphabet())}
    names = list(dict.fromkeys([*SPECIALS, *byte, *(a + b for a, b in merges)]))  # two merges may make one token
    token_bytes = [b""] * FIRST_BYTE + [b"".join(byte[c] for c in name) for name in names[FIRST_BYTE:]]
    return {name: i for i, name in enumerate(names)}, token_bytes


@functools.cache
def _quiet_forks() -> None:
    """Let a forked child work on one thread: the library's thread pool does not survive a fork.

    Without this the library does the same, but prints a warning at every fork. A user's own
    TOKENIZERS_PARALLELISM is left alone.
    """
    if _PARALLEL not in os.environ:
        os.register_at_fork(
            before=lambda: os.environ.__setitem__(_PARALLEL, "false"),
            after_in_parent=lambda: os.environ.__delitem__(_PARALLEL),
        )
