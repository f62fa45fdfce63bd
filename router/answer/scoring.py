"""A text that is given is read, not written: the log-probability of each of its tokens, under any mode.

As `constellation eval` does it: the kernels in force at a token follow from the bytes before it, one look
every W bytes, OCEAN up to the first one; a text longer than the context is read in windows that
overlap by half, each token once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import numpy as np
import torch

from constellation.config import Config, Kernel
from constellation.coordizer.tokenizer import Tokenizer
from constellation.decoding.sample import scored
from constellation.roster import OCEAN
from router.answer.concurrency import Room, together
from router.answer.kernels import Kernels
from router.answer.view import integration_of
from router.decide.evaluate import look_in_force
from router.decide.mixture import Weights, combine, judged, weights
from router.decide.modes import MIXED, ROUTE
from router.decide.policy import Policy, decide, kernel_name

PIECE_BYTES = 1 << 24  # of log-probabilities, from all kernels, that are asked for at once
HELD_BYTES = 1 << 28  # of them here at once, whoever asks


@dataclass(frozen=True)
class ScoredText:
    """One token given those before it; nats are natural logarithms."""

    log_prob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, likeliest first, with the very same numbers


def panels(
    tokens: Sequence[int], policy: Policy | None, tokenizer: Tokenizer, config: Config, mode: str, top_k: int
) -> list[Weights]:
    """Who answers each of `tokens`, which begin a document: (kernel, weight) pairs, the same object while in force."""
    if policy is None or mode not in (ROUTE, *MIXED):
        return [((mode, 1.0),)] * len(tokens)
    sizes = np.array([len(tokenizer.token_bytes[t]) for t in tokens], np.int64)
    settings = config.router
    (trajectory,) = policy.trajectories([tokenizer.decode(tokens)], settings.every)
    decided = decide(trajectory, settings.hysteresis)
    alone: list[Weights] = [((kernel_name(policy.names, int(k)), 1.0),) for k in decided]
    found = alone
    if mode in MIXED:
        posterior_PK = judged(mode, trajectory.posterior, integration_of(policy))
        found = [
            one if one[0][0] == OCEAN else weights(policy.names, posterior_PK[i], top_k) for i, one in enumerate(alone)
        ]
    first: Weights = ((OCEAN, 1.0),)
    look_N = look_in_force(np.cumsum(sizes) - sizes, np.zeros(len(tokens), np.int64), [trajectory])
    return [found[i] if i >= 0 else first for i in look_N]


def spans(panels: Sequence[Weights], context: int) -> Iterator[tuple[int, int, int]]:
    """(first, scored, end): tokens scored..end-1 have one panel, in a window that begins at `first`.

    Token i is predicted from those before it, of which its window holds context / 2 at least, or all.
    """
    half, scored = max(1, context // 2), 0
    while scored < len(panels):
        first = 0 if scored < context else (scored - context) // half * half + half
        limit, end = min(len(panels), first + context), scored + 1
        while end < limit and panels[end] == panels[scored]:
            end += 1
        yield first, scored, end
        scored = end


class Reader:
    """Texts read by kernels together, of whose log-probabilities no more than `HELD_BYTES` are here at once."""

    def __init__(self, kernels: Kernels, config: Kernel):
        self.kernels, self.config, self._room = kernels, config, Room(HELD_BYTES)

    def room(self, positions: int) -> AbstractAsyncContextManager[None]:
        """Room for the log-probabilities of all tokens at so many positions, whoever sends them."""
        return self._room.of(positions * self.config.vocab_size * 4)  # float32

    async def read(self, read: Sequence[int], panels: Sequence[Weights], mode: str, top: int) -> list[ScoredText]:
        """`read[1:]` scored, each token by its panel, given those before it: read[0] is an end of text."""
        pieces = spans(panels, self.config.context)
        parts = await together([self.scores([read[a : c + 1]], c - b, panels[b], mode, top) for a, b, c in pieces])
        return [one for (part,) in parts for one in part]

    async def scores(
        self, windows: Sequence[Sequence[int]], count: int, panel: Weights, mode: str, top: int
    ) -> list[list[ScoredText]]:
        """The last `count` tokens of each window, scored by the panel, given those before them.

        One kernel sends the scores alone. Several have to send the log-probabilities of all tokens: piece by piece.
        """
        if len(panel) == 1:
            found = await self.kernels.score(panel[0][0], windows, top, count)
            return [[ScoredText(*one) for one in row] for row in found]
        rows: list[list[ScoredText]] = [[] for _ in windows]
        most = max(1, PIECE_BYTES // (4 * self.config.vocab_size * len(panel)))  # positions of a piece
        for begin in range(0, count, most):
            many = min(most, count - begin)
            cut = [window[: len(window) - count + begin + many] for window in windows]
            width = max(1, most // many)
            for at in range(0, len(cut), width):
                group = cut[at : at + width]
                log_p_BTV = await self._joint([window[:-1] for window in group], many, panel, mode)
                for row, window, log_p_TV in zip(rows[at:], group, log_p_BTV):
                    row += [ScoredText(*one) for one in scored(torch.from_numpy(log_p_TV), list(window[-many:]), top)]
        return rows

    async def _joint(self, windows: Sequence[Sequence[int]], tail: int, panel: Weights, mode: str) -> list[np.ndarray]:
        """Of each window the panel's log-probabilities of the next token after each of the last `tail`, (tail, V)."""
        async with self.room(len(windows) * tail * len(panel)):
            parts = await together([self.kernels.log_probs(name, windows, tail) for name, _ in panel])
            weight = [w for _, w in panel]
            return [combine(mode, np.stack(rows), weight).astype(np.float32) for rows in zip(*parts)]
