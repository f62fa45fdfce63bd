"""Coupling J(L): how far what is predicted at one place moves when the token at an earlier one is another.

    J(L) = mean over j < L and i in (j, L) of d_FR(p_i(. | x), p_i(. | x with x_j resampled))       radians, [0, pi]

An intervention, not a correlation: 0 for a model that does not look back, whatever its attention weights say. x_j is
drawn from the tokens of the same text, so that the change is a usual one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from constellation.geometry import simplex
from constellation.telemetry.training import Language


@torch.no_grad()
def coupling(model: Language, inputs_BT: Tensor, seed: int = 0, reads: int = 32) -> Tensor:
    """J of each sequence, (B,): one token of each is resampled, `reads` later places are looked at.

    0 for a constant or context-free prediction, pi when every prediction goes to a disjoint support.
    """
    batch, length = inputs_BT.shape
    generator = torch.Generator().manual_seed(seed)
    j_B = torch.randint(0, length - 1, (batch,), generator=generator).to(inputs_BT.device)
    drawn_B = torch.randint(0, inputs_BT.numel(), (batch,), generator=generator).to(inputs_BT.device)
    later_BR = j_B[:, None] + 1 + (torch.rand(batch, reads, generator=generator).to(inputs_BT.device)
                                   * (length - 1 - j_B[:, None])).long()  # fmt: skip
    rows = torch.arange(batch, device=inputs_BT.device)
    other_BT = inputs_BT.clone()
    other_BT[rows, j_B] = inputs_BT.flatten()[drawn_B]
    p, q = (
        torch.softmax(model.logits(model.hidden(x)[rows[:, None], later_BR]).float(), -1) for x in (inputs_BT, other_BT)
    )
    return simplex.distance(p, q).mean(-1)
