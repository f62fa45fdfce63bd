"""What each loop of a recursive kernel does: its cross-entropy if it were the last, and how far it moves the answer.

nats_r   mean -ln p_r(target), p_r the distribution after r loops, the coda and the head
step_r   sqrt(mean d_FR(p_(r-1), p_r)^2), radians in [0, pi]: the functional distance D of neighbouring loops
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from constellation.geometry import simplex
from constellation.kernel.model import KernelLM


@torch.no_grad()
def loops(model: KernelLM, tokens_BT: Tensor, targets_BT: Tensor) -> dict[str, list[float]]:
    """Of r = 1 .. R; `step` begins with r = 2."""
    found: dict[str, list[float]] = {"nats": [], "step": []}
    before = None
    for r in range(1, model.config.loops + 1):
        logits = model.logits(after(model, tokens_BT, r)).flatten(0, 1).double()
        found["nats"].append(float(F.cross_entropy(logits, targets_BT.flatten())))
        p = torch.softmax(logits, -1)
        if before is not None:
            found["step"].append(float(simplex.distance(before, p).square().mean().sqrt()))
        before = p
    return found


def after(model: KernelLM, tokens_BT: Tensor, count: int) -> Tensor:
    """Hidden states (B, T, D) of a kernel that loops `count` times."""
    config = model.config
    first, last = config.prelude, config.layers - config.coda
    rows, x = model.rows(tokens_BT.shape[1]), model.embed(tokens_BT)
    for at in (*range(first), *(tuple(range(first, last)) * count), *range(last, config.layers)):
        x = model.blocks[at](x, rows)
    hidden: Tensor = model.norm(x)
    return hidden
