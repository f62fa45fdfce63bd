"""One merge loop for every score: the pieces of a corpus as symbols, and rounds of merges among them.

    score(a, b) = n_ab w_ab        n_ab how often b stands right behind a, at this merge; w_ab its weight in this round
    the largest score is merged, of equal ones the smaller pair, everywhere and from left to right; then the next

Without weights every pair has weight 1, the round may be as long as one likes, and the merges are those of the
library `tokenizers`. With them only pairs that had a weight when the round began take part, so what a round made is
merged further in the next one.

Tokens are numbered as that library numbers them, which decides between equal scores: 16 special ones, the bytes in
the order of the characters that stand for them, then merges; two merges that spell the same bytes make one token. A
pair that comes again after it was merged keeps the count it had, and is merged again; its place in the list of merges
is then the later one.

The C library (csrc/merge.c) keeps counts, places and a heap up to date; `_round_slowly`, which looks through all pairs
and all pieces for every merge, is its oracle, and serves where there is no compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from constellation.coordizer.pieces import Pieces
from constellation.coordizer.tokenizer import FIRST_BYTE, alphabet
from constellation.decoding.compiled import available, library

BASES = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)  # odd: of the polynomials that tell tokens of the same bytes
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Pairs:
    """P pairs of neighbours, sorted: `left_P` then `right_P`, and `count_P` how often each stands in the corpus."""

    left_P: NDArray[np.int64]
    right_P: NDArray[np.int64]
    count_P: NDArray[np.int64]

    @property
    def keys_P(self) -> NDArray[np.uint64]:
        return self.left_P.astype(np.uint64) << np.uint64(32) | self.right_P.astype(np.uint64)


class Merger:
    """The symbols of all pieces, and the merges so far.

    start_W, length_W   where the symbols of a piece begin in `symbols_N`, and how many are left, int64
    seen_W              how often a piece stands in the corpus
    merges              (left, right, new) in the order they were made
    spelling            bytes of every token
    """

    def __init__(self, pieces: Pieces, *, native: bool | None = None):
        self.native = available() if native is None else native
        order = np.array([FIRST_BYTE + rank for rank in byte_ranks()], np.int32)
        data = np.frombuffer(b"".join(pieces.texts), np.uint8)
        self.symbols_N: NDArray[np.int32] = order[data]
        self.length_W = np.array([len(text) for text in pieces.texts], np.int64)
        self.start_W = np.concatenate([[0], np.cumsum(self.length_W)[:-1]]).astype(np.int64)[: len(self.length_W)]
        self.seen_W = np.ascontiguousarray(pieces.seen_WG.sum(1), np.int64)
        self.seen_WG = pieces.seen_WG
        self.merges: list[tuple[int, int, int]] = []
        self._names = np.zeros((0, 4), np.uint64)
        self.spelling = [b""] * FIRST_BYTE + [bytes([byte]) for byte in np.argsort(byte_ranks())]

    @property
    def num_tokens(self) -> int:
        return len(self.spelling)

    def counts(self) -> NDArray[np.int64]:
        """How often each token stands in the corpus, (V,)."""
        there_N = np.arange(len(self.symbols_N)) - np.repeat(self.start_W, self.bytes_W) < np.repeat(
            self.length_W, self.bytes_W
        )
        seen_N = np.repeat(self.seen_W, self.bytes_W)
        # float64 sums of whole numbers below 2^53 are exact
        sums = np.bincount(self.symbols_N[there_N], seen_N[there_N].astype(np.float64), minlength=self.num_tokens)
        return sums.astype(np.int64)

    def pairs(self, seen_W: NDArray[np.int64] | None = None) -> Pairs:
        """All pairs of neighbours, counted with `seen_W` instead of the corpus's own where it is given."""
        seen_W = self.seen_W if seen_W is None else np.ascontiguousarray(seen_W, np.int64)
        if self.native:
            room = max(1, int((self.length_W - 1).clip(min=0).sum()))
            keys, counts = np.empty(room, np.uint64), np.empty(room, np.int64)
            found = library().count_pairs(
                _at(self.symbols_N), _at(self.start_W), _at(self.length_W), _at(seen_W),
                ctypes.c_int64(len(seen_W)), _at(keys), _at(counts),
            )  # fmt: skip
            order = np.argsort(keys[:found])
            keys, counts = keys[order], counts[order]
        else:
            table: dict[int, int] = {}
            for word, seen in zip(self.words(), seen_W.tolist()):
                for a, b in pairwise(word):
                    table[a << 32 | b] = table.get(a << 32 | b, 0) + seen
            keys = np.array(sorted(table), np.uint64)
            counts = np.array([table[key] for key in keys.tolist()], np.int64)
        left, right = (keys >> np.uint64(32)).astype(np.int64), (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        return Pairs(left, right, counts)

    def round(
        self, most: int, fewest: int, pairs: Pairs | None = None, weight_P: NDArray[np.float64] | None = None
    ) -> int:
        """Merge until there are `most` more tokens or no pair is left; how many merges that were.

        A pair is merged while it stands at least `fewest` times and its score is above 0.
        """
        before = len(self.merges)
        if self.native:
            self._round(most, fewest, pairs, weight_P)
        else:
            self._round_slowly(most, fewest, pairs, weight_P)
        return len(self.merges) - before

    def _round(self, most: int, fewest: int, pairs: Pairs | None, weight_P: NDArray[np.float64] | None) -> None:
        tokens, room = np.array([self.num_tokens], np.int64), 4 * most + 1024  # a few merges make a token that is there
        names = np.zeros((self.num_tokens + most, 4), np.uint64)
        names[: self.num_tokens] = self._known_names()
        merges, none = np.empty((room, 3), np.int32), ctypes.c_void_p()
        keys, weights = none, none
        if pairs is not None and weight_P is not None:
            held = pairs.keys_P, np.ascontiguousarray(weight_P, np.float64)
            keys, weights = _at(held[0]), _at(held[1])
        made = library().merge_round(
            _at(self.symbols_N), _at(self.start_W), _at(self.length_W), _at(self.seen_W),
            ctypes.c_int64(len(self.seen_W)), keys, weights, ctypes.c_int64(0 if pairs is None else len(pairs.count_P)),
            ctypes.c_int64(fewest), ctypes.c_int64(most), _at(tokens), _at(names), _at(merges), ctypes.c_int64(room),
        )  # fmt: skip
        for a, b, new in merges[:made].tolist():
            self._append(a, b, new)
        self._names = names[: self.num_tokens]

    def _round_slowly(self, most: int, fewest: int, pairs: Pairs | None, weight_P: NDArray[np.float64] | None) -> None:
        there, words, seen = self.pairs(), self.words(), self.seen_W.tolist()
        counts = dict(zip(there.keys_P.tolist(), there.count_P.tolist()))
        weights = None
        if pairs is not None and weight_P is not None:
            weights = dict(zip(pairs.keys_P.tolist(), weight_P.tolist()))
        numbers = {text: i for i, text in enumerate(self.spelling) if text}
        until, merged = self.num_tokens + most, set[int]()
        while self.num_tokens < until:
            best = (0.0, 0)
            for key, count in counts.items():
                score = float(count) if weights is None else count * weights.get(key, 0.0)
                if count >= fewest and score > 0 and key not in merged and (score, -key) > (best[0], -best[1]):
                    best = (score, key)
            if best[0] == 0:
                break
            a, b = best[1] >> 32, best[1] & 0xFFFFFFFF
            new = numbers.setdefault(self.spelling[a] + self.spelling[b], self.num_tokens)
            self._append(a, b, new)
            merged.add(best[1])
            for w, word in enumerate(words):
                words[w] = _replaced(word, a, b, new, counts, merged, seen[w])
        for w, word in enumerate(words):
            self.length_W[w] = len(word)
            self.symbols_N[self.start_W[w] : self.start_W[w] + len(word)] = word

    def encode_pieces(self, merges: Sequence[tuple[int, int, int]]) -> None:
        """Make the merges of another merger: each piece takes the first in their order that it has, again and again."""
        for a, b, new in merges:
            self._append(a, b, new)
        if self.native:
            table = np.array(merges, np.int32).reshape(-1, 3)
            library().merge_again(
                _at(self.symbols_N), _at(self.start_W), _at(self.length_W), ctypes.c_int64(len(self.seen_W)),
                _at(table), ctypes.c_int64(len(table)),
            )  # fmt: skip
            return
        rank = {(a, b): (i, new) for i, (a, b, new) in enumerate(merges)}
        for w, word in enumerate(self.words()):
            while there := [(rank[pair], pair) for pair in pairwise(word) if pair in rank]:
                (_, new), (a, b) = min(there)
                word = _replaced(word, a, b, new, {}, set(), 0)
            self.length_W[w] = len(word)
            self.symbols_N[self.start_W[w] : self.start_W[w] + len(word)] = word

    def named_merges(self) -> list[tuple[str, str]]:
        """The merges as tokenizer.py wants them, characters for bytes; one made twice stands where it last was."""
        letters = alphabet()
        spelt = ["".join(letters[byte] for byte in text) for text in self.spelling]
        last = {(a, b): i for i, (a, b, _) in enumerate(self.merges)}
        return [(spelt[a], spelt[b]) for i, (a, b, _) in enumerate(self.merges) if last[a, b] == i]

    def _known_names(self) -> NDArray[np.uint64]:
        self._names = np.concatenate([self._names, _names(self.spelling[len(self._names) :])])
        return self._names

    def join(self, a: int, b: int) -> None:
        """Add the token of a and b to the merges, without looking at any piece."""
        spelling = self.spelling[a] + self.spelling[b]
        self._append(a, b, self.spelling.index(spelling) if spelling in self.spelling else self.num_tokens)

    def take(
        self, symbols_N: NDArray[np.int32], length_W: NDArray[np.int64], merges: Sequence[tuple[int, int, int]]
    ) -> None:
        """Be where another merger of the same pieces was after `merges`."""
        self.symbols_N, self.length_W = symbols_N.copy(), length_W.copy()
        for a, b, new in merges:
            self._append(a, b, new)

    def _append(self, a: int, b: int, new: int) -> None:
        self.merges.append((a, b, new))
        if new == self.num_tokens:
            self.spelling.append(self.spelling[a] + self.spelling[b])

    @property
    def bytes_W(self) -> NDArray[np.int64]:
        """Length of each piece."""
        return np.diff(np.append(self.start_W, len(self.symbols_N)))

    def words(self) -> list[list[int]]:
        """The symbols of every piece."""
        return [self.symbols_N[a : a + n].tolist() for a, n in zip(self.start_W.tolist(), self.length_W.tolist())]


def byte_ranks() -> list[int]:
    """Of every byte: its place among the characters that stand for bytes (tokenizer.py)."""
    place = {letter: rank for rank, letter in enumerate(sorted(alphabet()))}
    return [place[letter] for letter in alphabet()]


def _replaced(
    word: list[int], a: int, b: int, new: int, counts: dict[int, int], merged: set[int], seen: int
) -> list[int]:
    """`word` with (a, b) as `new`, from left to right; what that does to pairs goes into `counts`."""

    def change(left: int, right: int, by: int) -> None:
        key = left << 32 | right
        counts[key] = counts.get(key, 0) + by
        if by > 0:
            merged.discard(key)

    out: list[int] = []
    i = 0
    while i < len(word):
        if word[i] != a or i + 1 == len(word) or word[i + 1] != b:
            out.append(word[i])
            i += 1
            continue
        if out:
            change(out[-1], a, -seen)
            change(out[-1], new, seen)
        if i + 2 < len(word):
            change(b, word[i + 2], -seen)
            change(new, word[i + 2], seen)
        out.append(new)
        i += 2
    return out


def _names(spelling: Sequence[bytes]) -> NDArray[np.uint64]:
    """(V, 4): two polynomials of a token's bytes and the powers of its length; zeros for one without bytes."""
    rows = []
    for text in spelling:
        row = []
        for base in BASES:
            value, power = 0, 1
            for byte in text:
                value, power = (value * base + byte + 1) & _MASK, power * base & _MASK
            row += [value, power if text else 0]
        rows.append(row)
    return np.array(rows, np.uint64).reshape(-1, 4)


def _at(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
