"""Text to token ids and back: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), lossless on any bytes.

    id 0          `<|eos|>`, the end of a document
    ids 1..15     `<|reserved_1|>` ... `<|reserved_15|>`
    ids 16..271   the bytes: id 16 + b is byte b
    ids 272..     merges, in the order they were learnt

Valid UTF-8 runs through BPE, a byte that belongs to no valid sequence becomes its one-byte token.
The specials are never produced from text: the nine characters `<|eos|>` are text like any other.
Everything follows from the list of merges, so a saved file is checked by rebuilding it from them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from constellation.errors import ArtifactError, ConfigError, RunError

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
_INVALID = re.compile("([\udc80-\udcff]+)")  # what "surrogateescape" makes of bytes that are not UTF-8


class Tokenizer:
    """A byte-level BPE tokenizer, defined by its merges.

    Law: `decode(encode(data)) == data` for any bytes; a `str` counts as its UTF-8 bytes (a lone
    surrogate as the three bytes it would have).
    """

    def __init__(self, merges: Sequence[tuple[str, str]], pattern: str = PATTERN) -> None:
        vocab, self.token_bytes = _vocabulary(merges)
        engine = _engine(models.BPE(vocab=vocab, merges=list(merges)), pattern)
        engine.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
        engine.encode_special_tokens = True  # "<|eos|>" inside a text stays text
        self._engine = engine
        self._merges, self.pattern = tuple(merges), pattern
        self.vocab_size = len(self.token_bytes)
        self.eos = EOS
        self.hash = hashlib.sha256(json.dumps([pattern, SPECIALS, merges]).encode()).hexdigest()[:16]

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
        return _encode(text, lambda part: self._engine.encode(part).ids)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        """`[encode(t) for t in texts]`, on all cores."""
        _quiet_forks()
        try:
            return [e.ids for e in self._engine.encode_batch_fast(texts)]
        except (TypeError, UnicodeError):  # bytes, or a lone surrogate, among them
            return [self.encode(t) for t in texts]

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
        content = json.loads(self._engine.to_str())
        content["model"]["hash"] = self.hash  # readers of the format skip fields of the model they do not know
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
        return Tokenizer, (self._merges, self.pattern)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, hash={self.hash!r})"


def _encode(text: str | bytes, bpe: Callable[[str], list[int]]) -> list[int]:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)
    parts = _INVALID.split(data.decode("utf-8", "surrogateescape"))
    ids: list[int] = []
    for i, part in enumerate(parts):  # valid and invalid parts alternate
        ids += [ord(c) - 0xDC00 + FIRST_BYTE for c in part] if i % 2 else bpe(part)
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


@functools.cache
def alphabet() -> str:
    """256 printable characters, the b-th standing for byte b (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others: Iterator[int] = iter(range(256, 512))
    return "".join(chr(b) if b in printable else chr(next(others)) for b in range(256))


def _vocabulary(merges: Sequence[tuple[str, str]]) -> tuple[dict[str, int], list[bytes]]:
    letters = alphabet()
    byte = {c: bytes([b]) for b, c in enumerate(letters)}
    names = list(dict.fromkeys([*SPECIALS, *letters, *(a + b for a, b in merges)]))  # two merges may make one token
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
