"""The pieces of a corpus that merges never cross, and how often each was seen in each group of documents.

A piece is what the tokenizer's pattern splits off: a word with the space before it, three digits, punctuation, white
space. PHRASES lets words that single spaces join be one piece, so that a merge may cross a space (SuperBPE, Liu et al.
2025), and nothing else. The C library (csrc/merge.c) reads some 50 MB/s; without it the library `tokenizers` splits,
ten times slower, and the pieces are the same.
"""

from __future__ import annotations

import ctypes
import functools
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, pre_tokenizers

from constellation.coordizer.tokenizer import PATTERN, splitter
from constellation.decoding.compiled import available, library

_SPACES = (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
ASSIGNED = 0x40000  # no script has letters above, up to the planes for special and private use


@dataclass(frozen=True)
class Pieces:
    """W different pieces: `texts` in a fixed order, `seen_WG` how often each stands in each of G groups, int64."""

    texts: list[bytes]
    seen_WG: NDArray[np.int64]

    @property
    def num_bytes(self) -> int:
        return int(self.seen_WG.sum(1) @ np.array([len(text) for text in self.texts], np.int64)) if self.texts else 0


def count_pieces(
    texts: Iterable[tuple[str, int]], groups: int, pattern: str = PATTERN, *, native: bool | None = None
) -> Pieces:
    """The pieces of `texts`, pairs of a text and its group 0 .. groups - 1, sorted by their bytes.

    Texts are those that UTF-8 can hold: a lone surrogate raises UnicodeEncodeError. `native` asks for the C library
    or against it; None takes it where there is one.
    """
    native = available() if native is None else native
    found = (_counted if native else _counted_slowly)(texts, groups, pattern)
    order = sorted(range(len(found.texts)), key=found.texts.__getitem__)
    return Pieces([found.texts[i] for i in order], found.seen_WG[order])


def _counted(texts: Iterable[tuple[str, int]], groups: int, pattern: str) -> Pieces:
    made, kinds, phrases = library(), _kinds(), int(pattern != PATTERN)
    held = ctypes.c_void_p(made.pieces_new(ctypes.c_int64(groups)))
    try:
        for text, group in texts:
            letters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            made.pieces_add(
                held, _at(letters), ctypes.c_int64(len(letters)), ctypes.c_int64(group), _at(kinds), phrases
            )
        count, size = made.pieces_count(held), made.pieces_letters(held)
        start, letters = np.empty(count + 1, np.int64), np.empty(size, np.uint32)
        seen = np.empty((count, groups), np.int64)
        made.pieces_get(held, _at(start), _at(letters), _at(seen))
    finally:
        made.pieces_free(held)
    text = letters.tobytes().decode("utf-32-le")
    return Pieces([text[a:b].encode() for a, b in pairwise(start.tolist())], seen)


def _counted_slowly(texts: Iterable[tuple[str, int]], groups: int, pattern: str) -> Pieces:
    split: Callable[[str], list[tuple[str, tuple[int, int]]]] = splitter(pattern).pre_tokenize_str
    seen: dict[bytes, list[int]] = {}
    for text, group in texts:
        text.encode()
        for _, (a, b) in split(text):
            seen.setdefault(text[a:b].encode(), [0] * groups)[group] += 1
    return Pieces(list(seen), np.array(list(seen.values()), np.int64).reshape(-1, groups))


@functools.cache
def _kinds() -> NDArray[np.uint8]:
    """Of every code point: 1 a letter, 2 a number, 3 white space, 0 another (enum of merge.c).

    Of what Python's Unicode does not know the library's own expressions are asked: theirs may be newer.
    """
    kinds, unknown = np.zeros(0x110000, np.uint8), []
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        if category[0] in "LN":
            kinds[code] = 1 if category[0] == "L" else 2
        elif category == "Cn" and code < ASSIGNED:
            unknown.append(code)
    kinds[list(_SPACES)] = 3
    text = "".join(map(chr, unknown))
    for kind, letters in enumerate((r"\p{L}+", r"\p{N}+"), 1):
        found = pre_tokenizers.Split(Regex(letters), behavior="removed", invert=True).pre_tokenize_str(text)
        for _, (a, b) in found:
            kinds[unknown[a:b]] = kind
    return kinds


def _at(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
