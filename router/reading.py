"""A text that is given is read, not written: the log-probability of each of its tokens, under any mode.

As `constellation eval` does it: the kernels in force at a token follow from the bytes before it, one look
every W bytes, OCEAN up to the first one; a text longer than the context is read in windows that
overlap by half, each token once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from constellation.config import OCEAN, Config, Kernel
from constellation.coordizer.tokenizer import Tokenizer
from constellation.kernel.sample import scored
from router.evaluate import look_in_force
from router.kernels import AsyncKernels
from router.mixture import MIXED, Weights, combine, weights
from router.policy import Policy, decide, kernel_name

ROUTE = "route"
_MOST = 1 << 22  # log-probabilities that a kernel sends at once


@dataclass(frozen=True)
class Scored:
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
        found = [
            one if one[0][0] == OCEAN else weights(policy.names, trajectory.posterior[i], top_k)
            for i, one in enumerate(alone)
        ]
    first: Weights = ((OCEAN, 1.0),)
    look_N = look_in_force(np.cumsum(sizes) - sizes, np.zeros(len(tokens), np.int64), [trajectory])
    return [found[i] if i >= 0 else first for i in look_N]


def spans(panels: Sequence[Weights], context: int, most: int) -> Iterator[tuple[int, int, int]]:
    """(first, scored, end): tokens scored..end-1 have one panel, in a window that begins at `first`.

    At most `most` of them where several kernels have to send all their log-probabilities.
    Token i is predicted from those before it, of which its window holds context / 2 at least, or all.
    """
    half, scored = max(1, context // 2), 0
    while scored < len(panels):
        first = 0 if scored < context else (scored - context) // half * half + half
        many = scored + most if len(panels[scored]) > 1 else len(panels)
        limit, end = min(len(panels), first + context, many), scored + 1
        while end < limit and panels[end] == panels[scored]:
            end += 1
        yield first, scored, end
        scored = end


async def read(
    kernels: AsyncKernels, read: Sequence[int], panels: Sequence[Weights], mode: str, top: int, config: Kernel
) -> list[Scored]:
    """`read[1:]` scored, each token by its panel, given those before it: read[0] is an end of text."""
    pieces = spans(panels, config.context, max(1, _MOST // config.vocab_size))
    parts = await asyncio.gather(*(_span(kernels, read[a : c + 1], c - b, panels[b], mode, top) for a, b, c in pieces))
    return [one for part in parts for one in part]


async def _span(
    kernels: AsyncKernels, window: Sequence[int], count: int, panel: Weights, mode: str, top: int
) -> list[Scored]:
    if len(panel) == 1:
        (found,) = await kernels.score(panel[0][0], [window], top, count)
    else:
        (log_p_TV,) = await joint(kernels, [window[:-1]], count, panel, mode)
        found = scored(torch.from_numpy(log_p_TV.astype(np.float32)), list(window[-count:]), top)
    return [Scored(*one) for one in found]


async def joint(
    kernels: AsyncKernels, windows: Sequence[Sequence[int]], tail: int, panel: Weights, mode: str
) -> np.ndarray:
    """Next-token log-probabilities of the panel after each of the last `tail` tokens of each window, (B, tail, V).

    One kernel gives its own, untouched.
    """
    parts = await asyncio.gather(*(kernels.log_probs(name, windows, tail) for name, _ in panel))
    if len(parts) == 1:
        return parts[0]
    weight = [w for _, w in panel]
    return np.stack([combine(mode, np.stack(rows), weight) for rows in zip(*parts)])
