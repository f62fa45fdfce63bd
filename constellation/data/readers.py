"""Readers: a file's documents, one at a time; what cannot be used is noted with file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from constellation.config import Data
from constellation.data.document import Document, cut, pieces
from constellation.data.files import UNREADABLE, kind_of, open_bytes, shown
from constellation.data.report import Notes
from constellation.data.tables import DESCRIBED, missing_files, rows

_BOM = b"\xef\xbb\xbf"


def read_file(path: Path, base: Path, root: Path, split: str | None, data: Data, notes: Notes) -> Iterator[Document]:
    """The documents of one file; its first folder below `base` is their domain, its place below `root` their source.

    A file that turns out truncated or damaged gives what was read before.
    """
    name, kind = shown(path, root), kind_of(path)
    folders = shown(path, base).split("/")[:-1]
    if path.name in DESCRIBED and _describes(path, name, notes):
        return
    if kind is None:
        notes.add("unknown kind of file", name)
        return
    try:
        with open_bytes(path) as stream:
            notes.files += 1
            domain = folders[0] if folders else None
            if kind in ("parquet", "arrow"):
                yield from _read_table(stream, kind, name, domain, split, data, notes)
            else:
                yield from _READERS[kind](stream, name, domain, split, data, notes)
    except UNREADABLE as error:
        notes.add("unreadable file", name, getattr(error, "strerror", None) or str(error))


def _read_text(
    stream: BinaryIO, name: str, domain: str | None, split: str | None, data: Data, notes: Notes
) -> Iterator[Document]:
    """One document, or several parts of a long one, never more than a part in memory."""
    limit, line, first = max(4, data.max_document_bytes), 1, ""
    buffer = stream.read(limit + 1)
    if not buffer:
        notes.add("empty document", name)
    while buffer:
        end = cut(buffer, limit)
        part, buffer = buffer[:end], buffer[end:]
        source = f"{name}:{line}" if first or buffer else name
        text = _decoded(part if first else part.removeprefix(_BOM), name, line, notes)
        line += part.count(b"\n")
        if text and not text.isspace():
            document = Document(text, domain, source, split, {}, first)
            first = first or document.id
            yield document
        else:
            notes.add("empty document", source)
        buffer += stream.read(limit + 1 - len(buffer))


def _decoded(part: bytes, name: str, line: int, notes: Notes) -> str:
    try:
        return part.decode()
    except UnicodeDecodeError as error:
        text = part.decode("utf-8", "replace")
        replaced = text.count("\ufffd") - part.count("\ufffd".encode())
        where = line + part.count(b"\n", 0, error.start)
        notes.add("invalid UTF-8", f"{name}:{where}", f"{replaced} places from here on replaced by U+FFFD")
        return text


def _read_jsonl(
    stream: BinaryIO, name: str, domain: str | None, split: str | None, data: Data, notes: Notes
) -> Iterator[Document]:
    """A document a line, `{"text": ..., "metadata": {"domain": ...}}`; blank lines separate nothing."""
    number = 0
    while line := stream.readline(data.max_line_bytes + 1):
        number += 1
        source = f"{name}:{number}"
        if len(line) > data.max_line_bytes and not line.endswith(b"\n"):
            size = len(line) + _skip_line(stream)
            notes.add("line too long", source, f"{size} bytes, data.max_line_bytes={data.max_line_bytes}")
            continue
        line = line.removeprefix(_BOM) if number == 1 else line
        if not line.strip():
            continue
        try:
            text, metadata = _row(line)
        except _Refused as refusal:
            notes.add(refusal.kind, source, refusal.detail)
            continue
        yield from _documents(text, metadata, source, domain, split, data)


def _read_table(
    stream: BinaryIO, kind: str, name: str, domain: str | None, split: str | None, data: Data, notes: Notes
) -> Iterator[Document]:
    """A document a row, of the column `text`; a struct `metadata` is what a jsonl line's is."""
    for number, text, metadata in rows(stream, kind):
        source = f"{name}:{number}"
        try:
            if isinstance(text, bytes):
                raise _Refused("invalid UTF-8", "the row's text")
            text = _usable(text, 'a row must have a string "text"')
            if len(text) > data.max_line_bytes:
                raise _Refused("line too long", f"{len(text)} characters, data.max_line_bytes={data.max_line_bytes}")
        except _Refused as refusal:
            notes.add(refusal.kind, source, refusal.detail)
            continue
        yield from _documents(text, metadata or {}, source, domain, split, data)


def _documents(
    text: str, metadata: dict[str, Any], source: str, domain: str | None, split: str | None, data: Data
) -> Iterator[Document]:
    """One document, or several parts of a long text."""
    own = metadata.get("domain")
    own = own.encode("utf-8", "replace").decode() if own and isinstance(own, str) else domain
    first = ""
    for part in pieces(text, max(4, data.max_document_bytes)):
        document = Document(part, own, source, split, metadata, first)
        first = first or document.id
        yield document


def _describes(path: Path, name: str, notes: Notes) -> bool:
    """Whether `path` belongs to a saved dataset, whose files that are missing are noted."""
    if path.name == "dataset_dict.json":
        return True
    missing = missing_files(path.with_name("state.json"))
    if missing and path.name == "state.json":
        notes.add("missing file", name, f"{', '.join(missing[:3])} of the saved dataset")
    return missing is not None


class _Refused(Exception):
    def __init__(self, kind: str, detail: str = "") -> None:
        self.kind, self.detail = kind, detail


def _row(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _Refused("invalid UTF-8", f"byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise _Refused("broken JSON line", f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise _Refused("broken JSON line", str(error)) from None
    text = _usable(row.get("text") if isinstance(row, dict) else None, 'a line must be an object with a string "text"')
    metadata = row.get("metadata")
    return text, metadata if isinstance(metadata, dict) else {}


def _usable(text: Any, wanted: str) -> str:
    if not isinstance(text, str):
        raise _Refused("no text field", wanted)
    if not text or text.isspace():
        raise _Refused("empty document")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Refused("invalid UTF-8", "the text holds half of a surrogate pair") from None
    return text


def _skip_line(stream: BinaryIO) -> int:
    """Read on to the end of the line without keeping it; its bytes."""
    size = 0
    while chunk := stream.readline(1 << 16):
        size += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return size


_READERS = {"text": _read_text, "jsonl": _read_jsonl}
