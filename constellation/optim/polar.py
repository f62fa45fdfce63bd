"""polar: U V^T of a matrix U S V^T, by Newton-Schulz iteration.

    X_0 = G / ||G||,    X <- a X + (b A + c A^2) X,    A = X X^T

is a polynomial in the singular values alone (Jordan et al. 2024, "Muon"). Five steps of the steepest
polynomial bring all but the smallest to within about [0.7, 1.2], not to 1. Products are in bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c: steepest at 0 among those that keep [0.7, 1.2] (Jordan 2024)
NEWTON_SCHULZ_STEPS = 5


def polar(
    matrices_NRC: Tensor,
    coefficients: tuple[float, float, float] = NEWTON_SCHULZ,
    steps: int = NEWTON_SCHULZ_STEPS,
    eps: float = 1e-7,
) -> Tensor:
    """Of each matrix of the stack, singular values within about [0.7, 1.2]; zero matrices stay zero."""
    largest = matrices_NRC.abs().amax(dim=(-2, -1), keepdim=True)  # first, or squares of huge entries overflow
    x = (matrices_NRC / torch.where(largest > 0, largest, 1)).bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def polar_single(
    matrix_RC: Tensor,
    coefficients: tuple[float, float, float] = NEWTON_SCHULZ,
    steps: int = NEWTON_SCHULZ_STEPS,
    eps: float = 1e-7,
) -> Tensor:
    """Of one matrix, rounding by rounding as torch.optim.Muon has it: entries above 1e19 overflow to a zero step."""
    x = matrix_RC.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
