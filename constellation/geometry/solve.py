"""(F + lambda) x = b for a symmetric F one can multiply with, three ways that give one answer.

cg             conjugate gradients: one product a step, stops where the curvature is not positive
sample_space   F = A^T A of R rows: x = (b - A^T (A A^T + lambda)^-1 A b) / lambda (Woodbury), and
               x = A^T (A A^T + lambda)^-1 r where b = A^T r (push-through): an R x R system
dense          Cholesky of F + lambda: a P x P system

Each returns a `Solution`; that an equation could not be solved is an outcome, not an error. A solve that remembers the
last one, x0 (SPRING, Goldshlager, Abrahamsen & Lin 2024), minimises |A x - r|^2 + lambda |x - mu x0|^2, which is the
same equation with b + lambda mu x0 on the right: every method can be given it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from constellation.errors import ConfigError

OUTCOMES = ("converged", "max_steps", "negative_curvature", "singular", "non_finite")
METHODS = ("auto", "cg", "sample_space", "dense")
PASSES_LIMIT = 256  # auto: rows or columns of a graph's block that are worth a reverse pass each
LOST = 0.1  # a direct method's relative residual beyond which rounding has eaten the answer: singular
KNOWN_LIMIT = 4096  # auto: rows or columns of a block whose Jacobian is known


@dataclass(frozen=True)
class Solution:
    """x and how it was found."""

    x: Tensor  # (P,); zero where singular or non_finite, the last good iterate at negative curvature
    outcome: str  # one of OUTCOMES
    steps: int  # products with F that cg made along search directions; 1 for the direct methods
    residual: float  # |b - (F + lambda) x| / |b|, 0 for b = 0; what cg's recurrence says, its stopping rule
    product: Tensor  # F x (P,), lambda left out
    method: str = "cg"
    spectrum: tuple[float, float] = (0.0, 0.0)  # eigenvalues of F + lambda found from inside: >= smallest, <= largest
    directions_KP: Tensor | None = None  # cg's, when kept, each with p^T (F + lambda) p = 1
    products_KP: Tensor | None = None  # F p of each

    @property
    def condition_number(self) -> float:
        """A lower bound of the condition number of F + lambda, >= 1; inf where the smallest eigenvalue found is 0."""
        low, high = self.spectrum
        return high / low if low > 0 else float("inf")


class Coordinates(Protocol):
    """What `solve` needs to know of F: fisher.FisherBlock has it."""

    size: int
    kind: str
    jacobian: Tensor | None

    @property
    def rows(self) -> int: ...
    def matvec(self, vector: Tensor) -> Tensor: ...
    def factor(self) -> Tensor: ...
    def matrix(self) -> Tensor: ...


def solve(
    block: Coordinates,
    b: Tensor,
    *,
    damping: float,
    method: str = "auto",
    start: Tensor | None = None,
    preconditioner: Tensor | None = None,
    tolerance: float = 1e-6,
    max_steps: int = 50,
    keep: bool = False,
) -> Solution:
    """(F + damping) x = b by `method`; the rest are cg's settings. `Solution.method` says what "auto" took."""
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: choose one of {', '.join(METHODS)}")
    chosen = choose(block, damping) if method == "auto" else method
    if chosen == "dense":
        return dense(block.matrix(), b, damping=damping)
    if chosen == "sample_space":
        return sample_space(block.factor(), b, damping=damping)
    return cg(
        block.matvec, b, damping=damping, start=start, preconditioner=preconditioner, tolerance=tolerance,
        max_steps=max_steps, keep=keep,
    )  # fmt: skip


def choose(block: Coordinates, damping: float) -> str:
    """The smaller of the P x P and the R x R system if it is small enough to be formed, else cg."""
    limit = PASSES_LIMIT if block.jacobian is None else KNOWN_LIMIT
    if block.rows and block.rows < block.size and block.rows <= limit and damping > 0:
        return "sample_space"
    return "dense" if block.size <= limit else "cg"


def cg(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    damping: float = 0.0,  # lambda
    start: Tensor | None = None,  # warm start, costs one product
    preconditioner: Tensor | None = None,  # diagonal M > 0 (P,), close to diag F + lambda (Jacobi)
    tolerance: float = 1e-6,  # of the relative residual
    max_steps: int = 50,
    keep: bool = False,  # directions and products, for `krylov`
) -> Solution:
    """Preconditioned conjugate gradients (Hestenes & Stiefel 1952).

    A direction p with p^T (F + lambda) p <= 0 ends the solve before it is followed: x is the iterate so far, the
    start if it was the first (truncated Newton, Steihaug 1983). So does a number that is not finite, with x = 0.
    """
    zero, unit = torch.zeros_like(b), _unit(b)
    b = b / unit
    start = None if start is None else start / unit
    x, fx = (zero, zero) if start is None else (start, product(start))
    r = b - fx - damping * x
    size = float(torch.linalg.vector_norm(b))
    z = r if preconditioner is None else r / preconditioner
    p, rz = z, float(r @ z)
    norm = float(torch.linalg.vector_norm(r))
    alphas: list[float] = []
    betas: list[float] = []
    kept: list[tuple[Tensor, Tensor]] = []
    outcome = "max_steps"
    for _ in range(max_steps):
        if not _finite(size, norm, rz):
            outcome = "non_finite"
            break
        if norm <= tolerance * size:
            outcome = "converged"
            break
        fp = product(p)
        curvature, length = (float(v) for v in torch.stack([p @ fp, p @ p]))
        curvature += damping * length
        if not _finite(curvature):
            outcome = "non_finite"
            break
        if curvature <= 0:
            outcome = "negative_curvature"
            break
        alpha = rz / curvature
        if keep:
            kept.append((p / curvature**0.5, fp / curvature**0.5))
        x = x + alpha * p
        fx = fx + alpha * fp
        r = r - alpha * (fp + damping * p)
        z = r if preconditioner is None else r / preconditioner
        norm, new = (float(v) for v in torch.stack([torch.linalg.vector_norm(r), r @ z]))
        alphas.append(alpha)
        betas.append(new / rz if rz else 0.0)
        p, rz = z + betas[-1] * p, new
    else:
        outcome = "converged" if norm <= tolerance * size else "max_steps"
    if not _finite(norm) or outcome == "non_finite":
        return Solution(zero, "non_finite", len(alphas), float("nan"), zero)
    walked = [torch.stack(part) for part in zip(*kept, strict=True)] if kept else (None, None)
    residual = norm / size if size else 0.0
    return Solution(unit * x, outcome, len(alphas), residual, unit * fx, "cg", _ritz(alphas, betas), *walked)


def krylov(directions_KP: Tensor, products_KP: Tensor, b: Tensor, *, damping: float) -> Solution:
    """The same for another b within the span of the directions that an earlier `cg` kept, without a product.

    x = P P^T b, exact on the span since the directions are conjugate; for the b of that cg, started at zero, it is
    cg's own answer. `damping` must be cg's. The outcome is max_steps, of 0 steps: nothing was iterated.
    """
    along_K = directions_KP @ b
    x, fx = along_K @ directions_KP, along_K @ products_KP
    unit = _unit(b)
    residual = float(torch.linalg.vector_norm((b - fx - damping * x) / unit) / torch.linalg.vector_norm(b / unit))
    if not _finite(residual) and bool(b.any()):
        return Solution(torch.zeros_like(b), "non_finite", 0, float("nan"), torch.zeros_like(b), "krylov")
    return Solution(x, "max_steps", 0, residual if bool(b.any()) else 0.0, fx, "krylov")


def sample_space(
    factor_RP: Tensor,
    b: Tensor | None = None,
    *,
    damping: float,
    residual: Tensor | None = None,
    around: Tensor | None = None,
    within: bool = False,
) -> Solution:
    """The same for F = A^T A through the R x R Gram matrix, damping > 0.

    With `residual` r alone, b = A^T r and the push-through form is taken, which stays exact as damping goes to 0.
    With b, or both, the rest b - A^T r takes Woodbury's form, whose error is eps |rest| / damping; one step of
    refinement brings that back to the size of rounding.

    `within` lets x - `around` (zero if not given) lie in the row space of A alone: where A knows only some of F
    (sampled labels, part of a batch), the other parts of b would come back divided by damping and nothing else. That
    x solves the equation with b projected, and `residual` of the Solution is that equation's.
    """
    a = factor_RP
    if b is None and residual is None:
        raise ConfigError("sample_space: give b, residual, or both")
    r = a.new_zeros(len(a)) if residual is None else residual
    b = a.mT @ r if b is None else b
    zero = torch.zeros_like(b)
    if damping <= 0:
        return Solution(zero, "singular", 1, 1.0, zero, "sample_space")
    gram = a @ a.mT
    if not bool(torch.isfinite(gram).all() & torch.isfinite(b).all()):
        return Solution(zero, "non_finite", 1, float("nan"), zero, "sample_space")
    lower = _cholesky(gram, damping)
    if lower is None:
        return Solution(zero, "singular", 1, 1.0, zero, "sample_space")

    def woodbury(v: Tensor) -> Tensor:
        return (v - a.mT @ _inverse(lower, a @ v)) / damping

    x = zero if around is None else around
    rest = b - a.mT @ (a @ x + r) - damping * x
    if within and bool(rest.any()):
        rounding = len(a) * torch.finfo(a.dtype).eps * float(gram.diagonal().max())
        span = _cholesky(gram, rounding) if rounding else None
        r = r if span is None else r + _inverse(span, a @ rest)
        b = a.mT @ (a @ x + r) + damping * x
    x = x + a.mT @ _inverse(lower, r)
    if not within and bool(rest.any()):
        x = x + woodbury(rest)
        x = x + woodbury(b - a.mT @ (a @ x) - damping * x)
    pivots = lower.diagonal().square()
    low = float(pivots.min()) if a.shape[0] >= a.shape[1] else damping
    return _direct(x, b, a.mT @ (a @ x), damping, "sample_space", (low, float(pivots.max())))


def dense(
    matrix_PP: Tensor,
    b: Tensor,
    *,
    damping: float = 0.0,
    factor_RP: Tensor | None = None,
    residual: Tensor | None = None,
) -> Solution:
    """The same for a formed F, by Cholesky and refinement.

    With the factor A of F = A^T A and a `residual` r that b is nearly A^T r of, refinement takes A^T (r - A x), which
    never squares the condition number in its rounding: damped least squares to nearly the accuracy of QR (corrected
    seminormal equations, Bjorck 1987) for two products more.

    F + damping that is not positive definite to rounding has outcome singular, or negative_curvature where its
    smallest eigenvalue is truly below 0; x = 0 then.
    """
    zero = torch.zeros_like(b)
    if not bool(torch.isfinite(matrix_PP).all() & torch.isfinite(b).all()):
        return Solution(zero, "non_finite", 1, float("nan"), zero, "dense")
    lower = _cholesky(matrix_PP, damping)
    pivots = zero if lower is None else lower.diagonal().square()
    rounding = 4 * torch.finfo(b.dtype).eps * (float(matrix_PP.diagonal().abs().max()) + damping)
    if lower is None or float(pivots.min()) <= rounding:
        values = torch.linalg.eigvalsh(matrix_PP) + damping
        outcome = "negative_curvature" if float(values[0]) < -len(b) * rounding else "singular"
        return Solution(zero, outcome, 1, 1.0, zero, "dense", (float(values[0]), float(values[-1])))

    x = _inverse(lower, b)
    if factor_RP is None or residual is None:
        x = x + _inverse(lower, b - matrix_PP @ x - damping * x)
    else:
        rest = b - factor_RP.mT @ residual
        for _ in range(2):
            x = x + _inverse(lower, factor_RP.mT @ (residual - factor_RP @ x) + rest - damping * x)
    spectrum = float(pivots.min()), float(pivots.max())
    return _direct(x, b, matrix_PP @ x, damping, "dense", spectrum)


def _direct(x: Tensor, b: Tensor, fx: Tensor, damping: float, method: str, spectrum: tuple[float, float]) -> Solution:
    unit = _unit(b)
    r = torch.linalg.vector_norm((b - fx - damping * x) / unit)
    size = torch.linalg.vector_norm(b / unit)
    residual = float(r / size) if float(size) else 0.0
    if not residual <= LOST:
        zero = torch.zeros_like(b)
        outcome = "singular" if _finite(residual) else "non_finite"
        return Solution(zero, outcome, 1, residual, zero, method, spectrum)
    return Solution(x, "converged", 1, residual, fx, method, spectrum)


def _cholesky(matrix: Tensor, damping: float) -> Tensor | None:
    """L L^T = matrix + damping, None where that is not positive definite."""
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(damped)
    return None if int(info) else lower


def _inverse(lower: Tensor, v: Tensor) -> Tensor:
    return torch.cholesky_solve(v[:, None], lower)[:, 0]


def _unit(b: Tensor) -> Tensor:
    """The power of two next to the largest |b_i|, 1 for b = 0: brings squares of b into range, and back, exactly."""
    largest = b.abs().amax()
    return torch.exp2(torch.where((largest > 0) & torch.isfinite(largest), largest, 1).log2().round())


def _finite(*values: float) -> bool:
    return all(v - v == 0 for v in values)


def _ritz(alphas: list[float], betas: list[float]) -> tuple[float, float]:
    """Extreme Ritz values: eigenvalues of the tridiagonal matrix that cg's coefficients make (Golub & Van Loan)."""
    if not alphas:
        return 0.0, 0.0
    a, b = torch.tensor(alphas, dtype=torch.float64), torch.tensor(betas, dtype=torch.float64)
    diagonal = 1 / a
    diagonal[1:] += b[:-1] / a[:-1]
    off = b[:-1].clamp_min(0).sqrt() / a[:-1]
    values = torch.linalg.eigvalsh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    return float(values[0]), float(values[-1])
