"""Integration phi and differentiation of a set of states: how much the halves of a state know of each other.

For N samples of d units, each standardised, C their correlation matrix with the variance of independent noise added,

    C' = C + r^2 I                                                 r = 0.1, the ridge, in standard deviations
    I(A; B) = (log det C'_A + log det C'_B - log det C') / 2       nats; Gaussian mutual information of two halves
    I = mean over 16 random balanced bipartitions of I(A; B) - I(A; B shuffled across samples), at least 0
    phi = sqrt(1 - exp(-2 I / k))                                  k units a half; [0, 1)

which is the correlation that every unit of one half would need with one of the other for as much information. The
shuffled null is what a sample of N finds where there is nothing. Differentiation is the participation ratio of C's
spectrum, (PR - 1) / (d - 1), PR = (tr C)^2 / tr C^2: 0 for one direction, 1 for d equal ones.

    iid                 phi about 0 (.02 at d = 64, N = 4096), differentiation near 1
    rank 1              phi .454, differentiation 0
    one-hot, constant   fewer than two units that vary: degenerate, phi and differentiation are 0 and flagged

Both are descriptions of a covariance, after Tononi et al. (1994) and Barrett and Seth (2011), and say nothing of
experience. Phi is measured and never part of a loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from constellation.errors import ConfigError

RIDGE = 0.1  # standard deviations of the noise that is added to standardised units
BIPARTITIONS = 16
VARIES = 1e-6  # a unit whose deviation is a smaller part of the largest magnitude is constant


@dataclass(frozen=True)
class Integration:
    """What was measured of N samples of d units."""

    phi: float  # [0, 1)
    differentiation: float  # [0, 1]
    null: float  # nats that the shuffled halves share, mean over the bipartitions
    nats: float  # that the halves share beyond it, at least 0
    degenerate: bool  # fewer than two units vary, or none of the numbers is finite


DEGENERATE = Integration(0.0, 0.0, 0.0, 0.0, True)


def integration(states_ND: Tensor, seed: int = 0, block: int = 1) -> Integration:
    """Of `states` (N, d), whose units stay together in blocks of `block` where the state is divided.

    ConfigError for fewer than d + 2 samples, of which no covariance can be estimated.
    """
    n, d = states_ND.shape
    if d < 2 * block:
        raise ConfigError(f"phi of {d // block} unit: at least two are wanted, one for each half")
    if n < d + 2:
        raise ConfigError(f"phi of {n} samples of {d} units: at least {d + 2} are needed; measure on more text")
    x_ND = states_ND.detach().to(torch.float64)
    if not bool(torch.isfinite(x_ND).all()):
        return DEGENERATE
    spread_D = x_ND.std(0, correction=0)
    varies_D = spread_D > VARIES * x_ND.abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
    if int(varies_D.sum()) < 2:
        return DEGENERATE
    x_ND = torch.where(varies_D, (x_ND - x_ND.mean(0)) / spread_D.clamp(min=1e-300), 0.0)
    generator = torch.Generator().manual_seed(seed)
    half = d // block // 2 * block
    blocks_SM = torch.stack([torch.randperm(d // block, generator=generator) for _ in range(BIPARTITIONS)])
    orders_SD = (blocks_SM[:, :, None] * block + torch.arange(block)).flatten(1).to(x_ND.device)
    shift = torch.randint(1, n, (1,), generator=generator)
    c_DD, beside_DD = x_ND.mT @ x_ND / n, x_ND.mT @ x_ND.roll(int(shift), 0) / n
    a, b = orders_SD[:, :half], orders_SD[:, half : 2 * half]
    own_S, null_S = _shared(c_DD, c_DD, a, b), _shared(c_DD, beside_DD, a, b)
    nats = max(0.0, float((own_S - null_S).mean()))
    spectrum = float(c_DD.diagonal().sum()) ** 2 / float(c_DD.square().sum())
    return Integration(
        phi=math.sqrt(max(0.0, -math.expm1(-2 * nats / half))),
        differentiation=min(1.0, max(0.0, (spectrum - 1) / (d - 1))),
        null=float(null_S.mean()), nats=nats, degenerate=False,
    )  # fmt: skip


def equicorrelated(rho: float, d: int) -> float:
    """Phi of d units with correlation `rho` between any two, without sampling: the closed form the estimate is held to.

    >>> round(equicorrelated(0.2, 64), 3), round(equicorrelated(1.0, 64), 3), equicorrelated(0.0, 64)
    (0.218, 0.454, 0.0)
    """
    k, rest = d // 2, 1 - rho + RIDGE**2
    twice = 2 * math.log1p(k * rho / rest) - math.log1p(2 * k * rho / rest)
    return math.sqrt(max(0.0, -math.expm1(-twice / k)))


def _shared(within_DD: Tensor, between_DD: Tensor, a_SK: Tensor, b_SK: Tensor) -> Tensor:
    """I(A; B) of each bipartition, (S,): covariances within a half from the first matrix, across from the second."""
    eye = RIDGE**2 * torch.eye(a_SK.shape[1], dtype=within_DD.dtype, device=within_DD.device)
    aa, bb = (within_DD[i[:, :, None], i[:, None, :]] + eye for i in (a_SK, b_SK))
    ab = between_DD[a_SK[:, :, None], b_SK[:, None, :]]
    la, lb = torch.linalg.cholesky(aa), torch.linalg.cholesky(bb)
    m = torch.linalg.solve_triangular(la, ab, upper=False)
    m = torch.linalg.solve_triangular(lb, m.mT, upper=False)  # L_b^-1 C_ba L_a^-T: its singular values correlate
    s = torch.linalg.svdvals(m).clamp(max=1 - 1e-12)
    return -0.5 * torch.log1p(-s.square()).sum(-1)
