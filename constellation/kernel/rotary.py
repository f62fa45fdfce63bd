"""Rotary positions as tables: how far the pair i of a head's K channels is turned at position t.

    angle_ti = t f_i,   f_i = base^(-2i / K),   i = 0 .. K/2 - 1                     (Su et al. 2021)

Checkpoints that were made to read further than they were trained have slower pairs, `rope_scaling`:

    linear   f_i / factor                                                           (Chen et al. 2023)
    llama3   f_i of pairs that turn more than `rope_high` times in `rope_original` positions, f_i / factor of those
             that turn less than `rope_low` times, in between the two mixed in proportion (Llama 3.1)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from constellation.config import Kernel


def rotary_table(config: Kernel) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each (context, K / 2), float32."""
    angle = torch.arange(config.context, dtype=torch.float64)[:, None] * frequencies(config)
    return angle.cos().float(), angle.sin().float()


def frequencies(config: Kernel) -> Tensor:
    """f (K / 2,), radians a position, float64."""
    f = config.rope_base ** (-torch.arange(0, config.size, 2, dtype=torch.float64) / config.size)
    if config.rope_scaling == "none":
        return f
    if config.rope_scaling == "linear":
        return f / config.rope_factor
    turns = config.rope_original * f / (2 * math.pi)
    kept = ((turns - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)
    return f * (kept + (1 - kept) / config.rope_factor)
