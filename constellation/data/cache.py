"""TokenCache: a corpus tokenised once, memory mapped, in a folder named by its content.

    <key>/tokens.bin       every document's tokens and EOS, one after another, uint16 or uint32, little-endian
    <key>/offsets.npy      (documents + 1,) int64, where each document's tokens begin
    <key>/byte_length.npy  (documents,) int64, UTF-8 bytes of each document
    <key>/documents.json   ids and domains
    <key>/meta.json        schema, counts, tokenizer, sha256 of the files above

The key hashes the documents' ids and domains in order, the tokenizer's hash and the schema version.
The folder appears whole, by a rename, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from constellation.data.document import Document
from constellation.errors import ArtifactError, ConfigError, DataError, RunError
from constellation.storage.atomic import read_json, seal, sha256, sync

SCHEMA = 1
_BATCH_BYTES = 1 << 22  # text tokenised at a time
_FILES = ("tokens.bin", "offsets.npy", "byte_length.npy", "documents.json")


class Encoder(Protocol):
    """What a cache needs of a tokenizer (constellation.coordizer.tokenizer.Tokenizer)."""

    hash: str
    vocab_size: int
    eos: int
    token_bytes: list[bytes]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[list[int]]: ...


class TokenCache:
    """A tokenised corpus as arrays; `tokens` stays on disk and is read where it is touched.

    tokens       (N,) uint16 or uint32, memory mapped
    offsets      (D + 1,) int64; document d is tokens[offsets[d] : offsets[d + 1]], its EOS last
    byte_length  (D,) int64, UTF-8 bytes
    domains, ids lists of D; hash = the folder's name
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        documents = json.loads((path / "documents.json").read_text(encoding="utf-8"))
        self.path = path
        self.hash: str = meta["key"]
        self.tokenizer_hash: str = meta["tokenizer"]
        self.ids: list[str] = documents["ids"]
        self.domains: list[str | None] = documents["domains"]
        self.offsets: NDArray[np.int64] = np.load(path / "offsets.npy")
        self.byte_length: NDArray[np.int64] = np.load(path / "byte_length.npy")
        self.tokens: NDArray[np.integer] = np.memmap(path / "tokens.bin", dtype=meta["dtype"], mode="r").view(
            np.ndarray
        )

    def byte_offsets(self, tokenizer: Encoder, start: int = 0, end: int | None = None) -> NDArray[np.int64]:
        """For each token in [start, end): the UTF-8 bytes of its document before it, int64 (end - start,).

        The sum of the lengths of the tokens before it; an EOS, being empty, stands at its document's length.
        """
        if tokenizer.hash != self.tokenizer_hash:
            raise ConfigError(f"tokenizer {tokenizer.hash} did not make {self.path}, {self.tokenizer_hash} did")
        end = len(self.tokens) if end is None else end
        if not 0 <= start <= end <= len(self.tokens):
            raise ConfigError(f"tokens {start}..{end}: not a range of the cache's {len(self.tokens)} tokens")
        if start == end:
            return np.zeros(0, dtype=np.int64)
        length = np.array([len(b) for b in tokenizer.token_bytes], dtype=np.int64)
        document = np.searchsorted(self.offsets, np.arange(start, end), side="right") - 1
        first = self.offsets[document[0]]  # count from the beginning of the document that holds `start`
        before = np.concatenate([[0], np.cumsum(length[self.tokens[first : end - 1]])])
        opening = np.maximum(self.offsets[document] - first, 0)
        return before[start - first :] - before[opening]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_cache, (self.path, False)  # sent to another process as its place on disk, not as its tokens

    def __repr__(self) -> str:
        return f"TokenCache({len(self.ids)} documents, {len(self.tokens)} tokens, {self.path})"


def build_cache(documents: Sequence[Document], tokenizer: Encoder, root: Path) -> TokenCache:
    """The cache of `documents` in a folder of `root`; a valid one that is there already is opened instead."""
    if not documents:
        raise DataError("no documents to tokenise: the corpus, or this split of it, is empty")
    root = Path(root)
    path = root / _key(documents, tokenizer)
    if path.exists():
        return open_cache(path)
    temporary = root / f".{path.name}.{secrets.token_hex(4)}.{socket.gethostname()}.{os.getpid()}.tmp"
    try:
        _remove_leftovers(root)
        temporary.mkdir(parents=True)
        _write(temporary, path.name, documents, tokenizer)
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.exists():  # otherwise somebody else was faster, with the same content
                raise
        else:
            sync(root)
    except OSError as error:
        raise RunError(
            f"{path}: the token cache cannot be written: {error.strerror or error}; free space or change --run"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_cache(path)


def open_cache(path: Path, verify: bool = True) -> TokenCache:
    """The cache in the folder `path`, memory mapped; `verify` reads it once to compare the checksums."""
    path = Path(path)
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        if meta["schema"] != SCHEMA:
            raise ValueError(f"schema {meta['schema']}, this version reads {SCHEMA}")
        meta = read_json(path / "meta.json")
        for name in _FILES:
            if (path / name).stat().st_size != meta["bytes"][name]:
                raise ValueError(f"{name} has another length than when it was written")
            if verify and sha256(path / name) != meta["sha256"][name]:
                raise ValueError(f"{name} has another content than when it was written")
        return TokenCache(path, meta)
    except (ArtifactError, OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: damaged token cache ({error}); delete the folder, it will be rebuilt") from None


def _key(documents: Sequence[Document], tokenizer: Encoder) -> str:
    digest = hashlib.sha256(f"{SCHEMA} {tokenizer.hash}\n".encode())
    for document in documents:
        digest.update(f"{document.id} {json.dumps(document.domain)}\n".encode())
    return digest.hexdigest()[:16]


def _write(folder: Path, key: str, documents: Sequence[Document], tokenizer: Encoder) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    counts = np.zeros(len(documents), dtype=np.int64)
    done = 0
    with (folder / "tokens.bin").open("wb") as file:
        for batch in _batches(documents):
            for ids in tokenizer.encode_batch([d.text for d in batch]):
                np.array([*ids, tokenizer.eos], dtype=dtype).tofile(file)
                counts[done] = len(ids) + 1
                done += 1
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]))
    np.save(folder / "byte_length.npy", np.array([d.num_bytes for d in documents], dtype=np.int64))
    index = {"ids": [d.id for d in documents], "domains": [d.domain for d in documents]}
    (folder / "documents.json").write_text(json.dumps(index), encoding="utf-8")
    meta = {
        "schema": SCHEMA,
        "key": key,
        "tokenizer": tokenizer.hash,
        "dtype": dtype.str,
        "documents": len(documents),
        "tokens": int(counts.sum()),
        "bytes": {name: (folder / name).stat().st_size for name in _FILES},
        "sha256": {name: sha256(folder / name) for name in _FILES},
    }
    (folder / "meta.json").write_text(json.dumps(seal(meta), indent=1), encoding="utf-8")
    for name in (*_FILES, "meta.json"):
        sync(folder / name)
    sync(folder)


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _remove_leftovers(root: Path) -> None:
    """Delete what builders of this machine left when they were killed."""
    for folder in root.glob(f".*.{socket.gethostname()}.*.tmp"):
        if not _alive(int(folder.name.split(".")[-2])):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True
