"""The atlas: charts with a centre and a codebook each, routers that choose a chart, jumps between charts.

Shapes: B images, N charts, J codes of a chart, D dimensions, H features, R channels of a router, r rank of jumps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COLDEST, HOTTEST = 0.1, 10.0  # bounds of a router's temperature


class PlainRouter(nn.Module):
    """score_n = q . k_n / t, with q = W f; the control."""

    def __init__(self, features: int, latent: int, charts: int, channels: int):
        super().__init__()
        self.query = nn.Linear(features, channels)
        self.keys = nn.Parameter(torch.randn(charts, channels) * channels**-0.5)
        self.log_temperature = nn.Parameter(torch.zeros(()))

    @property
    def temperature(self) -> Tensor:
        """t, in (COLDEST, HOTTEST), 1 at the start; never at a bound, so that it always has a gradient."""
        low, high = torch.tensor([COLDEST, HOTTEST]).log()
        t: Tensor = (low + (high - low) * torch.sigmoid(self.log_temperature)).exp()
        return t

    def forward(self, f_BH: Tensor, v_BD: Tensor) -> Tensor:
        """Scores (B, N)."""
        return (self.query(f_BH) @ self.keys.T) / self.temperature


class CovariantRouter(PlainRouter):
    """Keys transported to the point: score_n = q . U(v) k_n / t.

    U(v) turns the R / 2 planes of a key by the angles v S / sqrt(1 + |v|^2), a flat connection of the group U(1)^(R/2):
    keys keep their lengths, U(v) is the inverse of U(-v), and a change of all frames, q -> G q, k -> G k with G of the
    group, changes no score.
    """

    def __init__(self, features: int, latent: int, charts: int, channels: int):
        super().__init__(features, latent, charts, channels)
        self.connection = nn.Parameter(torch.randn(latent, channels // 2) * latent**-0.5)

    def angles(self, v_BD: Tensor) -> Tensor:
        """(B, R / 2), radians."""
        return (v_BD @ self.connection) * torch.rsqrt(1 + v_BD.square().sum(1, keepdim=True))

    def forward(self, f_BH: Tensor, v_BD: Tensor) -> Tensor:
        back_BR = turned(self.query(f_BH), -self.angles(v_BD))
        return (back_BR @ self.keys.T) / self.temperature


def turned(q_BR: Tensor, angle_BP: Tensor) -> Tensor:
    """q with plane p, its coordinates p and p + R / 2, turned by angle p."""
    a, b = q_BR.chunk(2, 1)
    cos, sin = angle_BP.cos(), angle_BP.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), 1)


ROUTERS = {"plain": PlainRouter, "covariant": CovariantRouter}


@dataclass(frozen=True)
class Placed:
    """Where points are in the atlas."""

    chart_B: Tensor  # int64
    code_B: Tensor  # int64, within the chart
    point_BD: Tensor  # c + e, the quantised point, with the gradient of v, c and e
    nearest_BD: Tensor  # the same with the gradient of c and e alone
    local_BD: Tensor  # v - c of the chosen chart
    distance_BNJ: Tensor  # squared, to every code


class Atlas(nn.Module):
    """Centres c (N, D) and codes e (N, J, D) relative to them."""

    def __init__(self, charts: int, codes: int, latent: int):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(charts, latent))
        self.codes = nn.Parameter(0.5 * torch.randn(charts, codes, latent))

    def forward(self, v_BD: Tensor, weight_BN: Tensor, bias_N: Tensor | None = None) -> Placed:
        """Every point to the code nearest to it in the chart of its greatest weight.

        The chart is one-hot in value and soft in gradient, and the code passes its gradient on to v (straight
        through), to c and to e: what is decoded depends on chart and code alone.
        """
        n, j, d = self.codes.shape
        places_MD = (self.centres[:, None] + self.codes).reshape(n * j, d)
        square = v_BD.square().sum(1, keepdim=True) + places_MD.square().sum(1) - 2 * v_BD @ places_MD.T
        distance_BNJ = square.clamp(min=0).view(-1, n, j)
        chosen_BN = weight_BN.detach() if bias_N is None else weight_BN.detach().clamp(min=1e-12).log() + bias_N
        chart_B = chosen_BN.argmax(1)
        code_B = distance_BNJ.detach()[torch.arange(len(v_BD)), chart_B].argmin(1)
        hard_BN = F.one_hot(chart_B, n).to(v_BD.dtype)
        through_BN = hard_BN + weight_BN - weight_BN.detach()
        e_BD = self.codes[chart_B, code_B]
        centre_BD = self.centres[chart_B]
        point_BD = through_BN @ self.centres + e_BD + v_BD - v_BD.detach()
        return Placed(chart_B, code_B, point_BD, centre_BD + e_BD, v_BD - centre_BD, distance_BNJ)

    @torch.no_grad()
    def revive(self, used_NJ: Tensor, v_BD: Tensor, chart_B: Tensor, least: float) -> int:
        """Move codes used less than `least` times an even code's share of their chart to points of it; how many.

        A chart without points among v keeps its codes: nothing is known of it.
        """
        even_N1 = used_NJ.sum(1, keepdim=True) / used_NJ.shape[1]
        moved = 0
        for n, j in (used_NJ < least * even_N1).nonzero().tolist():
            mine = (chart_B == n).nonzero()[:, 0]
            if len(mine):
                at = mine[torch.randint(len(mine), ())]
                self.codes[n, j] = v_BD[at] - self.centres[n]
                moved += 1
        return moved


class Jumps(nn.Module):
    """L_ij(u) = A_j (B_i u + c_i) + d_j: from chart i's coordinates to chart j's, through one space of rank r."""

    def __init__(self, charts: int, latent: int, rank: int):
        super().__init__()
        self.into = nn.Parameter(torch.eye(rank, latent).repeat(charts, 1, 1) + 0.1 * torch.randn(charts, rank, latent))
        self.out = nn.Parameter(torch.eye(latent, rank).repeat(charts, 1, 1) + 0.1 * torch.randn(charts, latent, rank))
        self.shift = nn.Parameter(0.1 * torch.randn(charts, rank))
        self.offset = nn.Parameter(0.1 * torch.randn(charts, latent))

    def enter(self, u_BD: Tensor, from_B: Tensor) -> Tensor:
        """B_i u + c_i, (B, r)."""
        n, r, d = self.into.shape
        all_BNr = (u_BD @ self.into.reshape(n * r, d).T).view(-1, n, r) + self.shift
        return _picked(all_BNr, from_B)

    def leave(self, h_Br: Tensor, to_B: Tensor) -> Tensor:
        """A_j h + d_j, (B, D)."""
        n, d, r = self.out.shape
        all_BND = (h_Br @ self.out.reshape(n * d, r).T).view(-1, n, d) + self.offset
        return _picked(all_BND, to_B)

    def forward(self, u_BD: Tensor, from_B: Tensor, to_B: Tensor) -> Tensor:
        """(B, D), coordinates in the chart `to`."""
        return self.leave(self.enter(u_BD, from_B), to_B)


def _picked(all_BNd: Tensor, at_B: Tensor) -> Tensor:
    """Row at_B of every image, (B, d): a product, whose derivative is cheaper than an index's."""
    hard_BN = F.one_hot(at_B, all_BNd.shape[1]).to(all_BNd.dtype)
    return (hard_BN[:, :, None] * all_BNd).sum(1)
