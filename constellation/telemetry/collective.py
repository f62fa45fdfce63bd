"""Collective phi and kappa: the same statistics, over kernels instead of units.

Every kernel reads the same text. Its basins there are its predictions' square roots, of which it contributes its m
leading principal coordinates among all kernels' (the same directions for all), so that a state is K blocks of m units;
a bipartition divides kernels. kappa is the geometric mean of theirs.

K copies of one kernel: phi near 1. Kernels that predict independently of each other: phi near 0. One kernel: refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.telemetry.integration import Integration, integration

COORDINATES = 4  # m


def collective_phi(sqrt_p_KNV: Tensor, seed: int = 0) -> Integration:
    """Of the square roots of K kernels' predictions at N places; ConfigError for fewer than two kernels or 4 K + 2."""
    kernels = len(sqrt_p_KNV)
    if kernels < 2:
        raise ConfigError(f"collective phi of {kernels} kernel: at least two are wanted")
    centred_KNV = sqrt_p_KNV.float() - sqrt_p_KNV.float().mean((0, 1))
    pooled_MV = centred_KNV.flatten(0, 1)
    rank = min(COORDINATES, *pooled_MV.shape)
    directions_Vm = torch.linalg.eigh(pooled_MV.mT @ pooled_MV).eigenvectors[:, -rank:]
    states_NKm = (centred_KNV @ directions_Vm).transpose(0, 1)
    return integration(states_NKm.flatten(1), seed, block=rank)


def collective_kappa(kappas: Sequence[float]) -> float | None:
    """exp mean ln kappa of those known and positive, None without any.

    >>> round(collective_kappa([32.0, 128.0]), 6), collective_kappa([])
    (64.0, None)
    """
    logs = [math.log(k) for k in kappas if k > 0]
    return math.exp(sum(logs) / len(logs)) if logs else None
