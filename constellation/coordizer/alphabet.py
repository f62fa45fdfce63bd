"""The printable characters that stand for bytes in every byte-level BPE (Radford et al. 2019)."""

from __future__ import annotations

import functools
from collections.abc import Iterator


@functools.cache
def alphabet() -> str:
    """256 printable characters, the b-th standing for byte b."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others: Iterator[int] = iter(range(256, 512))
    return "".join(chr(b) if b in printable else chr(next(others)) for b in range(256))
