"""Views: an image moved a little, which shall stay in its chart. Affine, drawn from torch's generator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TURN, STRETCH, SHEAR, SHIFT = math.radians(15), 0.15, 0.2, 0.12  # half ranges; the shift in parts of the image


def moved(x: Tensor) -> Tensor:
    """x (B, C, H, W), each image turned, stretched, sheared and shifted at random; what comes in is 0."""
    b = len(x)
    turn, shear, wide, high, right, down = (2 * torch.rand(6, b) - 1).unbind(0)
    turn, wide, high = TURN * turn, 1 + STRETCH * wide, 1 + STRETCH * high
    cos, sin = turn.cos(), turn.sin()
    rows = torch.stack(
        (wide * cos, SHEAR * shear - high * sin, 2 * SHIFT * right, wide * sin, high * cos, 2 * SHIFT * down), 1
    )
    grid = F.affine_grid(rows.view(b, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)
