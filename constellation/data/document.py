"""Document: one text and where it came from; long texts are cut where a reader would pause."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Document:
    """One text, its origin, and what is known about it."""

    text: str  # valid unicode: it encodes as UTF-8
    domain: str | None = None  # what kind of text it is, where somebody said so
    source: str = ""  # "file" or "file:line", relative to the corpus root
    split: str | None = None  # "train" | "dev" where the corpus fixes it
    metadata: dict[str, Any] = field(default_factory=dict)  # the jsonl line's own
    first: str = ""  # of a later part of a text that was cut: the id of its first part

    @cached_property
    def id(self) -> str:
        """The first 16 hexadecimal digits of sha256 of the UTF-8 text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @cached_property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())

    @property
    def whole(self) -> str:
        """The same for all parts of one text: train and dev are split by it."""
        return self.first or self.id


def cut(data: bytes, limit: int) -> int:
    """Where the first part of `data` ends, at most `limit` (>= 4) bytes from its start.

    After the last blank line of the part's second half, else after the last line there, else between
    two characters; `len(data)` when all of it fits.
    """
    if len(data) <= limit:
        return len(data)
    for mark in (b"\n\n", b"\n"):
        place = data.rfind(mark, limit // 2, limit)
        if place >= 0:
            return place + len(mark)
    for end in range(limit, limit - 4, -1):
        if data[end] & 0xC0 != 0x80:  # not a continuation byte of UTF-8
            return end
    return limit  # no UTF-8 anyway


def pieces(text: str, limit: int) -> list[str]:
    """`text` cut into parts of at most `limit` UTF-8 bytes; joined they are `text`."""
    data, parts = text.encode(), []
    while data:
        end = cut(data, limit)
        parts.append(data[:end].decode())
        data = data[end:]
    return parts
