"""Parameters of one shape as one tensor: state is kept stacked, so that batched operations need no copies.

state[p][name] is slice i of the stack, an ordinary tensor to whoever reads, saves or loads it. Where slices
were replaced (a checkpoint was loaded, other parameters have gradients now) the stack is made anew from them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


def buckets(params: Sequence[Tensor], state: Any) -> list[tuple[list[Tensor], int]]:
    """Parameters with a gradient, together when shape, dtype, device and number of steps agree; and that number."""
    found: dict[Hashable, list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            steps = int(state[p]["step"]) if "step" in state[p] else 0
            found.setdefault((p.shape, p.dtype, p.device, steps), []).append(p)
    return [(members, key[-1]) for key, members in found.items()]  # type: ignore[index]


def stacked(states: Sequence[dict[str, Any]], name: str) -> Tensor:
    """(N, ...) such that writing to it writes to every states[i][name]."""
    slices = [s[name] for s in states]
    base, size = slices[0]._base, slices[0].numel()
    if base is not None and base.shape == (len(slices), *slices[0].shape):
        start, step = base.data_ptr(), size * base.element_size()
        if all(t.data_ptr() == start + i * step and t._base is base for i, t in enumerate(slices)):
            return base
    base = torch.stack(slices)
    for i, s in enumerate(states):
        s[name] = base[i]
    return base
