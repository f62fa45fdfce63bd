"""Encoders and renderers: pixels to features and back. GELU, which has a gradient at 0 and is linear far out.

Shapes: x (B, C, H, W) in [0, 1]; features (B, F).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from constellation.errors import ConfigError

Shape = tuple[int, int, int]


def encoder(kind: str, shape: Shape, hidden: int) -> nn.Module:
    """x -> (B, hidden)."""
    if kind == "flat":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(shape), hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()
        )
    c, h, w = shape
    _check_even(shape)
    return nn.Sequential(
        nn.Conv2d(c, 16, 4, 2, 1), nn.GELU(), nn.Conv2d(16, 32, 4, 2, 1), nn.GELU(),
        nn.Flatten(), nn.Linear(32 * (h // 4) * (w // 4), hidden), nn.GELU(),
    )  # fmt: skip


class Renderer(nn.Module):
    """(B, hidden) before the nonlinearity -> pixels in (0, 1), (B, C, H, W)."""

    def __init__(self, kind: str, shape: Shape, hidden: int):
        super().__init__()
        self.shape = shape
        c, h, w = shape
        layers: list[nn.Module] = [nn.GELU()]
        if kind == "flat":
            layers += [nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, math.prod(shape))]
        else:
            _check_even(shape)
            layers += [
                nn.Linear(hidden, 32 * (h // 4) * (w // 4)), nn.GELU(), nn.Unflatten(1, (32, h // 4, w // 4)),
                nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.GELU(), nn.ConvTranspose2d(16, c, 4, 2, 1),
            ]  # fmt: skip
        self.layers = nn.Sequential(*layers)

    def forward(self, h_BH: Tensor) -> Tensor:
        return torch.sigmoid(self.layers(h_BH)).view(-1, *self.shape)


def _check_even(shape: Shape) -> None:
    if shape[1] % 4 or shape[2] % 4:
        raise ConfigError(
            f"topo.model.encoder=conv: images of {shape[1]} x {shape[2]} pixels cannot be halved twice; use flat"
        )
