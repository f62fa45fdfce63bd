"""A corpus: documents, where each came from, and a report of what was left out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str  # valid unicode: encodes as UTF-8
    domain: str | None = None  # what kind of text it is, where somebody said so
    source: str = ""  # "file", "file:line" or "file:line part k"
    split: str | None = None  # "train" | "dev" where the corpus fixes it
    metadata: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """The first 16 hexadecimal digits of sha256 of the UTF-8 text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]
