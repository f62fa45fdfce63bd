"""polar: U V^T of a matrix U S V^T, by Newton-Schulz iteration.

    X_0 = G / ||G||,    X <- P X,    P = a 1 + b A + c A^2,    A = X X^T

is a polynomial in the singular values alone (Jordan et al. 2024, "Muon"). Five steps of the steepest
polynomial bring all but the smallest to within about [0.7, 1.2], not to 1.

Every P is a polynomial of the first A, so the long side is needed twice, whatever the number of steps:

    A_0 = G G^T / ||G||^2,    Q <- P Q,    A <- P A P;    X = Q G / ||G||        the Gram side

In float32 this is what is done with matrices that are longer than wide. Rounding of A, 6e-8, grows by a^2 a step where
singular values are 0; after five steps the Gram matrix is made anew. In bf16 rounding would grow beyond bounds:
there X itself is iterated. `precision` is fp32 or bf16; where a processor only emulates bf16 it is many times slower.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c: steepest at 0 among those that keep [0.7, 1.2] (Jordan 2024)
NEWTON_SCHULZ_STEPS = 5
GRAM_STEPS = 5  # of one Gram matrix
GRAM_ASPECT = 1.5  # long / short side from which the Gram side takes fewer products
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def polar(
    matrices_NRC: Tensor,
    coefficients: tuple[float, float, float] = NEWTON_SCHULZ,
    steps: int = NEWTON_SCHULZ_STEPS,
    precision: str = "fp32",
) -> Tensor:
    """Of each matrix of the stack, singular values within about [0.7, 1.2]; zero matrices stay zero."""
    return polars([matrices_NRC], coefficients, steps, precision)[0]


def polars(
    stacks: Sequence[Tensor],
    coefficients: tuple[float, float, float] = NEWTON_SCHULZ,
    steps: int = NEWTON_SCHULZ_STEPS,
    precision: str = "fp32",
) -> list[Tensor]:
    """`polar` of each stack (N, R, C); on the Gram side all that share the length of a short side go together."""
    xs = [_wide(_scaled(stack).to(DTYPES[precision])) for stack in stacks]
    sides: dict[tuple[int, torch.device] | None, list[int]] = {}
    for i, x in enumerate(xs):
        gram_side = precision == "fp32" and x.shape[2] >= GRAM_ASPECT * x.shape[1]
        sides.setdefault((x.shape[1], x.device) if gram_side else None, []).append(i)
    for side, members in sides.items():
        if side is None:
            for i in members:
                xs[i] = _iterated(xs[i], coefficients, steps)
            continue
        for start in range(0, steps, GRAM_STEPS):
            gram = torch.cat([xs[i] @ xs[i].mT for i in members])
            q = _inverse_root(gram, coefficients, min(GRAM_STEPS, steps - start), normalise=start == 0)
            for i, part in zip(members, q.split([len(xs[i]) for i in members]), strict=True):
                xs[i] = part @ xs[i]
    return [x if x.shape == stack.shape else x.mT for x, stack in zip(xs, stacks, strict=True)]


def _scaled(matrices_NRC: Tensor) -> Tensor:
    """With the largest entry 1, or the squares of huge ones would overflow."""
    largest = torch.linalg.vector_norm(matrices_NRC, ord=float("inf"), dim=(-2, -1), keepdim=True)
    return matrices_NRC / torch.where(largest > 0, largest, 1)


def _wide(x: Tensor) -> Tensor:
    return x.mT if x.shape[-2] > x.shape[-1] else x


def _iterated(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The first formula as it stands: the oracle of the second."""
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _inverse_root(gram: Tensor, coefficients: tuple[float, float, float], steps: int, normalise: bool) -> Tensor:
    """Q = P_steps ... P_1, near the inverse square root of `gram`; normalise: of X / ||X||, and Q / ||X||."""
    a, b, c = coefficients
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp(min=torch.finfo(gram.dtype).tiny)
    gram = gram / trace if normalise else gram
    factors = []
    for step in range(steps):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        factors.append(p)
        if step < steps - 1:
            gram = p @ (gram @ p)
    q = functools.reduce(lambda product, p: p @ product, factors)
    return q * trace.rsqrt() if normalise else q


def polar_single(
    matrix_RC: Tensor,
    coefficients: tuple[float, float, float] = NEWTON_SCHULZ,
    steps: int = NEWTON_SCHULZ_STEPS,
    precision: str = "bf16",
    eps: float = 1e-7,
) -> Tensor:
    """Of one matrix, in bf16 rounding by rounding as torch.optim.Muon: entries above 1e19 overflow to a zero step."""
    x = matrix_RC.to(DTYPES[precision])
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
