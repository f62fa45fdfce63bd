"""A text that is still being written: the router's sums, brought up to date byte by byte.

One new trigram of bin b raises h_b by one, hence [C, X] by (sqrt(h_b + 1 + mu p0_b) - sqrt(h_b + mu p0_b)) [m_b, V_b]
and L by log(P_b / p0_b): O(64) + O(K), whatever the length. The sums are exact (fisher_rao.py), so a stream says bit
for bit what the router says of the whole text, in whatever pieces the bytes came, and so does a stream resumed
elsewhere from its counts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.decide.counts import SPAN, trigram, trigrams
from router.decide.fisher_rao import _ROOT, FisherRaoRouter, Looks
from router.decide.policy import RouteChoice, Trajectory

_FEW = 8  # up to so many bytes the loop below is faster than arrays


class RouterStream:
    """State of one text: its counts, the last two bytes, and the three sums."""

    def __init__(self, router: FisherRaoRouter):
        self.router = router
        self.bytes_seen = 0
        self.tail = b""  # last two bytes, which the next trigram begins with
        self.counts = np.zeros(router.config.bins, np.int64)  # h, (B,)
        self._frame = router.origin.copy()
        self._log = np.zeros(len(router.names))

    @classmethod
    def resumed(cls, router: FisherRaoRouter, counts_B: NDArray[np.int64], tail: bytes) -> RouterStream:
        """The stream that had counted `counts_B` and ended with `tail`, as a certificate tells them."""
        stream = cls(router)
        bins = np.flatnonzero(counts_B)
        stream._add(bins, counts_B[bins])
        stream.tail = tail
        stream.bytes_seen = int(counts_B.sum()) + len(tail)
        return stream

    def update(self, data: bytes) -> None:
        """Reads more bytes."""
        joined = self.tail + data
        if len(data) <= _FEW:
            for i in range(len(joined) - SPAN + 1):
                self._add_one(trigram(joined[i], joined[i + 1], joined[i + 2], self.router.config.bins))
        else:
            bins, counts = np.unique(trigrams(joined, self.router.config.bins), return_counts=True)
            self._add(bins, counts)
        self.bytes_seen += len(data)
        self.tail = joined[-(SPAN - 1) :]

    def choice(self) -> RouteChoice:
        """What `router.route` says of the bytes so far."""
        return self.router.choices(self._look())[0]

    def trajectory(self) -> Trajectory:
        """One look, now: `policy.decide(stream.trajectory(), hysteresis, current)[0]` is the kernel from here on."""
        seen = self._look()
        nearest = seen.distances_rad.min(axis=1).astype(np.float32)
        return Trajectory(np.array([self.bytes_seen], np.int64), seen.posterior, nearest, seen.abstain)

    def _look(self) -> Looks:
        n = np.array([float(max(self.bytes_seen - SPAN + 1, 0))])
        return self.router.judge(n, self._frame[None], self._log[None])

    def _add_one(self, b: int) -> None:
        h, pseudo = self.counts.item(b), self.router.pseudo.item(b)
        step = round(math.sqrt(h + 1 + pseudo) * _ROOT) - round(math.sqrt(h + pseudo) * _ROOT)
        self.counts[b] = h + 1
        self._frame += self.router.frame[b] * (step / _ROOT)
        self._log += self.router.log_ratio[b]

    def _add(self, bins: NDArray[Any], counts: NDArray[np.int64]) -> None:
        before = self.counts[bins]
        step = self.router.root_count(before + counts, bins) - self.router.root_count(before, bins)
        self.counts[bins] += counts
        self._frame += step @ self.router.frame[bins]
        self._log += counts.astype(np.float64) @ self.router.log_ratio[bins]
