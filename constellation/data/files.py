"""Files of a corpus: which there are, what kind each is, and its bytes, decompressed as they are read.

Folders are walked in the order of their names. Names that begin with a dot are skipped. Links are
followed, except back to a folder that is being walked or that holds the corpus.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from constellation.data.report import Notes

# A file's kind by the end of its name, and by the whole name where there is no dot.
_TEXT = (
    ".txt .text .md .markdown .rst .tex .bib .org .adoc .srt "  # prose
    ".py .pyi .c .h .cc .cpp .cxx .hpp .hh .cu .m .rs .go .java .kt .scala .swift .cs .fs .js .mjs .ts .tsx .jsx "
    ".rb .php .pl .lua .r .jl .hs .ml .el .lisp .scm .clj .ex .erl .zig .nim .f90 .f .asm .s .v .vhd .sql "
    ".sh .bash .zsh .ps1 .bat .mk .cmake .gradle "
    ".html .htm .xml .css .scss .toml .yaml .yml .ini .cfg .conf .proto "
    "readme license licence copying authors news changelog makefile dockerfile"
)
_JSONL = ".jsonl .ndjson"
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # read from both ends, so not looked for inside .gz and .zst
COMPRESSED = (".gz", ".zst")
KIND_OF = {ending: kind for kind, endings in (("text", _TEXT), ("jsonl", _JSONL)) for ending in endings.split()}
UNREADABLE = (OSError, EOFError, zlib.error, zstandard.ZstdError)  # what reading a bad file may raise
_ZSTD_INPUT = 512  # compressed bytes taken at a time; 4 may become 128 KiB, so this bounds memory at 16 MiB


def kind_of(path: Path) -> str | None:
    """ "text", "jsonl", "parquet", "arrow" or None for a name; `.gz` and `.zst` are looked through."""
    name = path.name.lower()
    if table := _TABLES.get(path.suffix.lower()):
        return table
    if name.endswith(COMPRESSED):
        name = name.rpartition(".")[0]
    _, dot, ending = name.rpartition(".")
    return KIND_OF.get(dot + ending)


def walk(base: Path, root: Path, notes: Notes) -> Iterator[Path]:
    """The regular files below `base`, or `base` itself if it is one; what cannot be entered is noted."""
    holders = frozenset(_identity(parent) for parent in base.resolve().parents)
    stack = [(base, holders)]
    while stack:
        path, above = stack.pop()
        try:
            mode = path.stat().st_mode
            if stat.S_ISREG(mode):
                yield path
                continue
            if not stat.S_ISDIR(mode):
                notes.add("unreadable file", shown(path, root), "neither a regular file nor a folder")
                continue
            if _identity(path) in above:
                notes.add("folder loop", shown(path, root), "leads back to a folder above it")
                continue
            names = sorted(name for name in os.listdir(path) if not name.startswith("."))
            inside = above | {_identity(path)}
        except OSError as error:
            notes.add("unreadable file", shown(path, root), error.strerror or str(error))
            continue
        if not names:
            notes.add("empty folder", shown(path, root))
        stack += [(path / name, inside) for name in reversed(names)]


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of `path`, decompressed; a truncated or damaged file raises one of `UNREADABLE` while read."""
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(path))
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(_Zstd(path.open("rb")), 1 << 16)
    return path.open("rb")


def shown(path: Path, root: Path) -> str:
    """`path` relative to `root` as printable unicode, whatever bytes its name has."""
    name = path.name if path == root else path.relative_to(root).as_posix()
    return re.sub(r"[\x00-\x1f\x7f]", "?", os.fsencode(name).decode("utf-8", "replace"))


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


class _Zstd(io.RawIOBase):
    """Concatenated zstd frames as one stream; unlike the library's own reader it notices a missing end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None  # the decompressor of the frame that is open
        self._input = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            self._input = self._input or self._file.read(_ZSTD_INPUT)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the compressed stream ends early")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(self._input))
            self._input = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
