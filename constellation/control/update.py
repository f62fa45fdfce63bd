"""How far a step moved parameters: |d theta| / |theta| of every tensor, whatever the optimizer made of the gradient.

lr |g| / |theta| is this ratio for plain gradient descent alone; under Adam it is off by |g| / sqrt(v), orders of
magnitude, so that a cap on it never binds (You et al. 2017, arXiv:1708.03888, on the ratio; about 1e-3 is usual).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copied(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters before a step."""
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def update_ratio(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest |theta' - theta| / |theta| over tensors, at least 0; those of one dimension, and zeros, are left out.

    Biases and gains begin at 0 or near it, where any step is large; no unit.
    """
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.dim() > 1]
    if not pairs:
        return 0.0
    old, new = [a for a, _ in pairs], [b.detach() for _, b in pairs]
    moved = torch.stack(torch._foreach_norm(torch._foreach_sub(new, old)))
    size = torch.stack(torch._foreach_norm(old))
    ratio = torch.where(size > 0, moved / size.clamp(min=1e-30), torch.zeros_like(size))
    return float(ratio.max())
