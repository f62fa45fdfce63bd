"""Clipping of gradients: by one norm, or by what the norms of a run were before.

    norm    g <- g min(1, clip / ||g||)                                      Pascanu et al. (2013)
    adagc   every tensor: g_i <- g_i min(1, 1.05 m_i / ||g_i||), m_i the EMA (.98) of its own clipped norms; in the
            first 100 steps the global norm is clipped and m_i is the least norm so far (AdaGC, 2502.11034)
    zclip   z = (||g|| - mu) / sigma of the EMA (.97) of clipped norms; where z > 2.5 the norm becomes
            mu + sigma 2.5^2 / z (ZClip, 2504.02507); the first 25 steps fill the averages, clipped by `clip`

adagc and zclip clip by `clip` afterwards too. A gradient that is not finite is left to the caller, and not remembered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ADAGC_LAMBDA, ADAGC_DECAY, ADAGC_WARMUP = 1.05, 0.98, 100
ZCLIP_Z, ZCLIP_DECAY, ZCLIP_WARMUP = 2.5, 0.97, 25


class Clipping:
    """Clips by what the norms of a run were before; all its fields are remembered, as JSON has them."""

    def __call__(self, gradients: Sequence[Tensor], clip: float) -> None:
        """Scale `gradients` in place."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return vars(self)

    def load_state(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


class AdaGC(Clipping):
    """Remembers a norm for each tensor."""

    def __init__(self) -> None:
        self.steps = 0
        self.usual: list[float] = []

    def __call__(self, gradients: Sequence[Tensor], clip: float) -> None:
        norms = torch.stack(torch._foreach_norm(list(gradients))).tolist()
        if self.steps < ADAGC_WARMUP:
            whole = math.sqrt(sum(n * n for n in norms))
            norms = [n * min(1.0, clip / whole) if whole else n for n in norms]
            self.usual = [min(a, b) for a, b in zip(self.usual or norms, norms, strict=True)]
        else:
            scales = [min(1.0, ADAGC_LAMBDA * m / n) if n else 1.0 for m, n in zip(self.usual, norms, strict=True)]
            torch._foreach_mul_(list(gradients), scales)
            self.usual = [
                ADAGC_DECAY * m + (1 - ADAGC_DECAY) * n * s for m, n, s in zip(self.usual, norms, scales, strict=True)
            ]
        self.steps += 1


class ZClip(Clipping):
    """Remembers mean and variance of the whole norm."""

    def __init__(self) -> None:
        self.steps = 0
        self.mean = self.variance = 0.0

    def __call__(self, gradients: Sequence[Tensor], clip: float) -> None:
        norm = float(torch.stack(torch._foreach_norm(list(gradients))).norm())
        kept = min(norm, clip)
        if self.steps >= ZCLIP_WARMUP:
            deviation = math.sqrt(self.variance)
            z = (norm - self.mean) / deviation if deviation > 0 else 0.0
            kept = self.mean + deviation * ZCLIP_Z**2 / z if z > ZCLIP_Z else norm
            if kept < norm:
                torch._foreach_mul_(list(gradients), kept / norm)
            gain = 1 - ZCLIP_DECAY
        else:
            gain = 1 / (self.steps + 1)
        self.variance = (1 - gain) * (self.variance + gain * (kept - self.mean) ** 2)
        self.mean += gain * (kept - self.mean)
        self.steps += 1


KINDS: dict[str, type[Clipping]] = {"adagc": AdaGC, "zclip": ZClip}


def clipping_of(kind: str) -> Clipping | None:
    """What remembers norms for `kind`, None for plain "norm"."""
    return KINDS[kind]() if kind in KINDS else None


def clipped(parameters: Sequence[torch.nn.Parameter], clip: float, history: Clipping | None = None) -> float:
    """Clip the gradients in place; the norm before, which is not finite where they are not."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if history is None or not gradients:
        return float(torch.nn.utils.clip_grad_norm_(parameters, clip))
    before = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(before):
        history(gradients, clip)
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    return before
