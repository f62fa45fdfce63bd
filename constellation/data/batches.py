"""Batches: windows of a token stream in a random order that is computed, never stored.

The segments, read one after another, are one stream of N tokens, closed to a ring. An epoch cuts the
ring into W = max(1, N // T) windows of T tokens, from a start drawn for the epoch, and visits each once:

    sample g = step * batch + j,  epoch e = g // W,  window w = perm_e(g mod W)
    x = stream[o : o + T],  y = stream[o + 1 : o + T + 1],  o = shift_e + w T  (mod N)

`perm_e` is a Feistel network over rows x columns >= W with cycle walking (Black & Rogaway 2002, Ciphers with
arbitrary finite domains), a bijection of 0..W-1 in O(1) per element: step 10^9 costs what step 0 costs.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from constellation.errors import ConfigError, DataError

Integers = NDArray[np.int64]
_ROUNDS = 6


class TokenStream(Protocol):
    """What is read: a TokenCache, or anything with a one-dimensional `tokens` array."""

    @property
    def tokens(self) -> NDArray[np.integer]: ...


class Batches:
    """Training batches of shape (batch, context) as a pure function of (seed, step).

    `segments` (S, 2) are token ranges [start, end) of the cache, None for all of it. Every token is a
    target at most once an epoch, all but N mod T of them exactly once. A stream shorter than one window
    is read round and round.
    """

    def __init__(self, cache: TokenStream, segments: Integers | None, context: int, batch: int, seed: int) -> None:
        if context < 1 or batch < 1 or seed < 0:
            raise ConfigError(f"context={context}, batch={batch}, seed={seed}: at least 1, 1 and 0 are wanted")
        total = len(cache.tokens)
        ranges = np.array([[0, total]] if segments is None else segments, dtype=np.int64).reshape(-1, 2)
        starts, ends = ranges[ranges[:, 0] < ranges[:, 1]].T
        if (ranges[:, 0] > ranges[:, 1]).any() or (ranges < 0).any() or (ranges > total).any():
            raise ConfigError(f"segments: each must be a range start <= end within the cache's {total} tokens")
        if not len(starts):
            raise DataError("no tokens to train on: every segment is empty; give this model some documents")
        self._tokens = cache.tokens
        self._first = np.concatenate([[0], np.cumsum(ends - starts)[:-1]])  # place of each segment in the stream
        self._jump = starts - self._first  # from a place in the stream to a place in the cache
        self.num_tokens = int((ends - starts).sum())
        self.windows = max(1, self.num_tokens // context)
        self.context, self.batch, self.seed = context, batch, seed

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every window was visited once, the last one counted whole."""
        return -(-self.windows // self.batch)

    def at(self, step: int) -> tuple[Integers, Integers]:
        """Inputs x and targets y of `step`, int64 (batch, context); y is x shifted by one token."""
        places = self.starts(step)[:, None] + np.arange(self.context + 1)
        window = self._tokens[self._where(places % self.num_tokens)].astype(np.int64)
        return window[:, :-1], window[:, 1:]

    def starts(self, step: int) -> Integers:
        """Where in the stream the windows of `step` begin, (batch,), 0..N-1."""
        sample = step * self.batch + np.arange(self.batch, dtype=np.int64)
        epoch, rank = sample // self.windows, sample % self.windows
        key = _mix(_mix(np.uint64(self.seed % 2**64)) ^ epoch.astype(np.uint64))
        shift = (_mix(key) % np.uint64(self.num_tokens)).astype(np.int64)
        return (shift + permute(rank, self.windows, key) * self.context) % self.num_tokens

    def _where(self, places: Integers) -> Integers:
        return places + self._jump[np.searchsorted(self._first, places, side="right") - 1]

    def __repr__(self) -> str:
        return f"Batches({self.num_tokens} tokens, {self.batch} x {self.context}, seed={self.seed})"


def permute(rank: Integers, size: int, key: NDArray[np.uint64]) -> Integers:
    """The image of each `rank` in 0..size-1 under the permutation chosen by its `key`, in O(len(rank)).

    For a fixed key a bijection of 0..size-1; ranks (n,), keys (n,) or (1,).
    """
    rows = np.uint64(math.isqrt(size - 1) + 1)  # the network permutes rows x columns, fewer than `rows` too many
    columns = np.uint64(-(-size // int(rows)))
    rounds = [np.broadcast_to(_mix(key + np.uint64(i)), rank.shape) for i in range(_ROUNDS)]
    value, todo = rank.astype(np.uint64), np.arange(len(rank))
    while len(todo):
        row, column = value[todo] // columns, value[todo] % columns
        for i in range(0, _ROUNDS, 2):  # adding a function of the other half can be undone
            row = (row + _mix(column ^ rounds[i][todo]) % rows) % rows
            column = (column + _mix(row ^ rounds[i + 1][todo]) % columns) % columns
        value[todo] = row * columns + column
        todo = todo[value[todo] >= size]  # cycle walking: on until back inside
    return value.astype(np.int64)


def _mix(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """splitmix64 (Steele et al. 2014), a bijection of 64-bit words that looks random."""
    x = np.atleast_1d(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
