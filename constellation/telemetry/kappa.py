"""kappa_eff: how curved the loss is along its gradient, relative to the run's own beginning.

    q = g^T F g / g^T g                F the Fisher information in a part of the batch (geometry/fisher.py), g = .grad
    kappa_eff = 64 q / median(first 3 q)

64 is as curved as the reference. q is in nats per squared unit of theta, at least 0 and at most F's largest eigenvalue
(a Rayleigh quotient); kappa_eff has no unit, at least 0. Until 3 were measured there is no reference and no kappa_eff.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from constellation.geometry.fisher import FisherBlock, flatten, twice_differentiable
from constellation.telemetry.training import Language

CALIBRATION = 3  # measurements: a kernel of the small preset has three at the default cadence
REFERENCE = 64.0


def gradient_curvature(
    model: Language, parameters: Sequence[Tensor], gradients: Sequence[Tensor], inputs_BT: Tensor
) -> float:
    """q of `gradients` on `inputs`; NaN for a gradient that is 0 or not finite, which has no direction."""
    g = flatten(gradients)
    size = torch.linalg.vector_norm(g)
    if not bool(torch.isfinite(size)) or not float(size):
        return float("nan")
    with torch.enable_grad(), twice_differentiable():
        return curvature_along(g / size, model.logits(model.hidden(inputs_BT)), parameters)


def curvature_along(unit: Tensor, logits: Tensor, parameters: Sequence[Tensor]) -> float:
    """u^T F u of a direction u of length 1, F of `logits` (..., V), whose graph is alive."""
    block = FisherBlock(logits, parameters)
    w_NV = block.pushforward(unit)
    return float((w_NV * block.likelihood.metric(block.means, w_NV)).sum() * block.weight)


def kappa(q: float, calibration: Sequence[float]) -> float | None:
    """kappa_eff of `q`; None before the calibration is whole, or where its median is 0.

    >>> kappa(3.0, [1.5] * 3), kappa(3.0, [1.5] * 2), kappa(3.0, [0.0] * 3)
    (128.0, None, None)
    """
    if len(calibration) < CALIBRATION or not (reference := statistics.median(calibration)) > 0:
        return None
    return REFERENCE * q / reference
