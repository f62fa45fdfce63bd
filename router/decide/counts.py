"""Counts of hashed byte trigrams: what the router knows of a text, in any language or code, without a vocabulary.

Trigram (a, b, c) of bytes goes to bin h(65536 a + 256 b + c) mod `bins` under a fixed public hash (the finaliser of
MurmurHash3, Appleby 2011, shortened): x *= 0x9E3779B1; x ^= x >> 15; x *= 0x85EBCA6B; x ^= x >> 13, modulo 2^32.
A text of n bytes has max(0, n - 2) trigrams; the one that ends with byte t is counted when byte t is seen. Counts
add up: those of a text are the sum of its windows', and a removed text is a subtraction.

Shapes: T trigrams, W windows, B bins, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

SPAN = 3  # bytes of a trigram
_WORD = 0xFFFFFFFF
_DENSE = 1 << 22  # entries of a table of counts, at most


def trigrams(text: bytes, bins: int) -> NDArray[np.int32]:
    """Bin of every trigram of `text` in order, (max(0, n - 2),), in [0, bins)."""
    a = np.frombuffer(text, np.uint8).astype(np.uint32)
    if len(a) < SPAN:
        return np.zeros(0, np.int32)
    x = (a[:-2] << np.uint32(16)) | (a[1:-1] << np.uint32(8)) | a[2:]
    x *= np.uint32(0x9E3779B1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    return (x % np.uint32(bins)).astype(np.int32)


def trigram(a: int, b: int, c: int, bins: int) -> int:
    """Bin of one trigram: `trigrams(bytes([a, b, c]), bins)[0]` without an array, for byte-by-byte streams."""
    x = (a << 16 | b << 8 | c) * 0x9E3779B1 & _WORD
    x = (x ^ x >> 15) * 0x85EBCA6B & _WORD
    return (x ^ x >> 13) % bins


def count(texts: Sequence[bytes], bins: int) -> sparse.csr_matrix:
    """Counts of whole texts, (N, B) float64, each row's bins rising: sums over a row have one order, whatever N is."""
    parts = [trigrams(text, bins) for text in texts]
    where = np.concatenate([part + np.int64(i * bins) for i, part in enumerate(parts)] or [np.zeros(0, np.int64)])
    if len(texts) * bins <= _DENSE:
        dense = np.bincount(where, minlength=len(texts) * bins)
        full = np.flatnonzero(dense)
        values = dense[full]
    else:  # the same by sorting: thousands of short texts would make a table of mostly zeros
        full, values = np.unique(where, return_counts=True)
    rows = np.searchsorted(full, np.arange(len(texts) + 1) * bins)
    return sparse.csr_matrix((values.astype(np.float64), full % bins, rows), shape=(len(texts), bins))


@dataclass(frozen=True)
class Windows:
    """Texts cut into windows of `every` bytes, the last of a text shorter: where the trigrams of each end.

    Window w of a text holds the trigrams that end in its bytes, so the sum of windows 0..w is what is known
    after (w + 1) * every bytes.
    """

    bins: NDArray[np.int32]  # (T,) of all trigrams, in reading order
    start: NDArray[np.int64]  # (W + 1,) window w holds trigrams start[w]..start[w + 1]
    size: NDArray[np.int64]  # (W,) bytes
    text: NDArray[np.int64]  # (W,) index of the text
    first: NDArray[np.int64]  # (N + 1,) windows of text i are first[i]..first[i + 1]; none for an empty text

    def matrix(self, num_bins: int, values: NDArray[np.float64] | None = None) -> sparse.csr_matrix:
        """(W, B): counts, or the given value of each trigram; a bin may be listed more than once in a row."""
        data = np.ones(len(self.bins)) if values is None else values
        return sparse.csr_matrix((data, self.bins, self.start), shape=(len(self.size), num_bins))

    def running(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over a text's windows 0..w, (W, ...) -> (W, ...), in place."""
        for begin, end in zip(self.first[:-1].tolist(), self.first[1:].tolist()):
            np.cumsum(values[begin:end], axis=0, out=values[begin:end])
        return values


def windows(texts: Sequence[bytes], every: int, bins: int) -> Windows:
    length = np.array([len(text) for text in texts], dtype=np.int64)
    per_text = -(-length // every)
    first = np.concatenate([[0], np.cumsum(per_text)])
    text = np.repeat(np.arange(len(texts)), per_text)
    begin = (np.arange(first[-1]) - first[text]) * every  # in bytes of its text
    end = np.minimum(begin + every, length[text])
    held = np.maximum(end - SPAN + 1, 0) - np.maximum(begin - SPAN + 1, 0)
    parts = [trigrams(t, bins) for t in texts]
    return Windows(
        bins=np.concatenate(parts) if parts else np.zeros(0, np.int32),
        start=np.concatenate([[0], np.cumsum(held)]),
        size=end - begin,
        text=text,
        first=first,
    )


def ranks(bins: NDArray[np.int32]) -> NDArray[np.int64]:
    """How often each entry occurred before, (T,): 0 for a first occurrence. `[5, 7, 5, 5]` -> `[0, 0, 1, 2]`."""
    small = bins.astype(np.uint16) if len(bins) and bins.max() < 65_536 else bins  # numpy sorts 16 bits by radix
    order = np.argsort(small, kind="stable")
    ordered = bins[order]
    new = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(bins) else np.zeros(0, np.int64)
    out = np.empty(len(bins), np.int64)
    out[order] = np.arange(len(bins)) - np.repeat(new, np.diff(np.append(new, len(bins))))
    return out
