"""TopoEncoder: an image as chart and code, with what is left over charged in bits.

    f = encoder(x), v = W f                     features (B, H), latent point (B, D)
    w = softmax(router(f, v))                   charts (B, N);  K = argmax w
    z = c_K + e_K,code                          the code nearest to v in chart K (atlas.py)
    m = G (v - z), M f                          nuisance and texture, sent through Gaussian channels m + N(0, 1)
    h = sum_n w'_n (P_n z + p_n) + Q channels   the decoder's own router w' = softmax(W' z) over chart projections
    x' = renderer(h)

What the decoder sees of x is K and code, log2(N J) bits at most, and the channels, whose rate is |m|^2 / (2 ln 2) bits:
the KL divergence of N(m, 1) from N(0, 1), an upper bound on what they carry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from constellation.topo.atlas import ROUTERS, Atlas, Jumps, Placed
from constellation.topo.networks import Renderer, Shape, encoder

if TYPE_CHECKING:
    from constellation.topo.settings import Model


@dataclass(frozen=True)
class Encoded:
    """What an image is read as."""

    f_BH: Tensor
    v_BD: Tensor
    weight_BN: Tensor  # of charts, sum 1
    placed: Placed
    nuisance_BC: Tensor  # m, before the channel's noise
    texture_BC: Tensor

    @property
    def rate_bits_B(self) -> Tensor:
        """Bits of nuisance and texture, (B,)."""
        power = self.nuisance_BC.square().sum(1) + self.texture_BC.square().sum(1)
        return power / (2 * math.log(2))


class TopoEncoder(nn.Module):
    """Encoder, atlas and decoder; the probe and the classes' table are there when there are classes."""

    def __init__(self, config: Model, shape: Shape, classes: int, seed: int):
        super().__init__()
        self.config, self.shape, self.classes = config, shape, classes
        m = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = encoder(m.encoder, shape, m.hidden)
            self.latent = nn.Linear(m.hidden, m.latent)
            self.router = ROUTERS[m.router](m.hidden, m.latent, m.charts, m.keys)
            self.atlas = Atlas(m.charts, m.codes, m.latent)
            self.nuisance = nn.Linear(m.latent, m.nuisance, bias=False) if m.nuisance else None
            self.texture = nn.Linear(m.hidden, m.texture) if m.texture else None
            self.back_router = nn.Linear(m.latent, m.charts)
            self.projections = nn.Parameter(torch.randn(m.charts, m.latent, m.hidden) * m.latent**-0.5)
            self.projection_bias = nn.Parameter(0.1 * torch.randn(m.charts, m.hidden))
            channels = m.nuisance + m.texture
            self.channels = nn.Linear(channels, m.hidden, bias=False) if channels else None
            self.renderer = Renderer(m.encoder, shape, m.hidden)
            self.jumps = Jumps(m.charts, m.latent, m.rank)
            self.table = nn.Parameter(0.1 * torch.randn(m.charts, max(1, classes)))
            self.probe = nn.Linear(m.latent, max(1, classes))

    def encode(self, x: Tensor, bias_N: Tensor | None = None) -> Encoded:
        """Everything about x but its pixels again; `bias_N` shifts the choice of charts alone."""
        f_BH = self.encoder(x)
        v_BD = self.latent(f_BH)
        weight_BN = torch.softmax(self.router(f_BH, v_BD), 1)
        placed = self.atlas(v_BD, weight_BN, bias_N)
        left_BD = v_BD - placed.nearest_BD
        none = v_BD.new_zeros(len(v_BD), 0)
        nuisance = none if self.nuisance is None else self.nuisance(left_BD)
        return Encoded(f_BH, v_BD, weight_BN, placed, nuisance, none if self.texture is None else self.texture(f_BH))

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of charts (B, N) and latent points (B, D), without the atlas."""
        f_BH = self.encoder(x)
        v_BD = self.latent(f_BH)
        return torch.softmax(self.router(f_BH, v_BD), 1), v_BD

    def decode(self, point_BD: Tensor, channels_BC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pixels (B, C, H, W) and the decoder's own weights of charts, (B, N)."""
        own_BN = torch.softmax(self.back_router(point_BD), 1)
        n, d, h = self.projections.shape
        spread = (own_BN[:, :, None] * point_BD[:, None, :]).reshape(-1, n * d)
        h_BH = spread @ self.projections.reshape(n * d, h) + own_BN @ self.projection_bias
        if self.channels is not None and channels_BC is not None:
            h_BH = h_BH + self.channels(channels_BC)
        return self.renderer(h_BH), own_BN

    def sent(self, seen: Encoded, generator: torch.Generator | None = None) -> Tensor | None:
        """What comes out of the channels: m + N(0, 1), (B, C); None without channels."""
        if self.channels is None:
            return None
        m = torch.cat((seen.nuisance_BC, seen.texture_BC), 1)
        return m + torch.randn(m.shape, generator=generator, dtype=m.dtype)

    @property
    def code_bits(self) -> float:
        """log2(N J), bits of chart and code at most."""
        return math.log2(self.config.charts * self.config.codes)

    @property
    def size(self) -> int:
        """Parameters that encode and decode; jumps, table and probe are not counted."""
        apart = [*self.jumps.parameters(), self.table, *self.probe.parameters()]
        return sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in apart)
