"""Preconditioned gradient descent on a flat theta, for any loss(theta): two tiers, one trace, hooks for a sampler.

    simple     v <- a v + (1 - a) g^2, bias-corrected; theta <- theta - lr g / (sqrt v + damping)        Fisher-RMS
    advanced   (C + lambda) d = -g, theta <- theta + s d                  C the curvature, s by a backtracking search

C is J^T J of `residuals(theta)`, the Gauss-Newton matrix of 1/2 |r|^2, where the loss has residuals, else its Hessian.
A negative eigenvalue counts by its absolute value, so that d always descends. With `rank` k the k largest are kept and
all others count as the smallest of these: along them a step is shorter, never longer. lambda follows Levenberg and
Marquardt with the ratio of what the loss fell by to what its quadratic model said: below 1/4 it grows fourfold, above
3/4 it falls to a third. s is halved until the loss falls by at least 1e-4 s |g^T d| (Armijo). Dense linear algebra: for
up to a few thousand entries.

The trace has T + 1 states: loss[t] = loss(theta[t]); theta[t+1] = theta[t] - scale[t] * grad[t] in the simple tier,
theta[t+1] = theta[t] + step[t] in both. Amari (1998); Martens (2020), Levenberg-Marquardt damping in section 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from constellation.errors import ConfigError

TIERS = ("simple", "advanced")
ARMIJO, HALVINGS = 1e-4, 30
LAMBDA_LEAST, LAMBDA_MOST = 1e-12, 1e12
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Descent:
    """What a descent came to; rows are states or steps, in order."""

    theta: Tensor  # (P,), the last state
    thetas: Tensor  # (T+1, P)
    losses: Tensor  # (T+1,)
    grads: Tensor  # (T+1, P), of each state
    steps: Tensor  # (T, P), theta[t+1] - theta[t]
    scales: Tensor | None  # (T, P), of the simple tier: step = -scale * grad
    damping: Tensor  # (T,), lambda that each step was solved with
    evaluations: int  # of the loss, gradients included
    outcome: str  # converged | max_steps | stalled: no step lowers the loss

    def trace(self) -> dict[str, Tensor]:
        """The arrays by name, as a run's trace has them."""
        names = ("thetas", "losses", "grads", "steps", "scales", "damping")
        return {name: own for name in names if (own := getattr(self, name)) is not None}


def descend(
    loss: Loss,
    theta0: Tensor,
    *,
    tier: str = "simple",
    residuals: Loss | None = None,
    steps: int = 100,
    lr: float = 1e-2,
    decay: float = 0.99,
    damping: float | None = None,
    rank: int | None = None,
    tolerance: float = 1e-8,
) -> Descent:
    """Lower loss(theta), a scalar, from theta0 (P,), by at most `steps` steps.

    residuals  r(theta) (R,) with loss = 1/2 |r|^2 + constant; the advanced tier's curvature is then Gauss-Newton's
    lr, decay  of the simple tier: a step's size, above 0, and a, in [0, 1)
    damping    added to sqrt v (1e-8), or lambda to begin with (1e-3); above 0
    rank       of the advanced tier's curvature, 1 .. P; None: all of it
    tolerance  it has converged where every entry of the gradient is at most this

    ConfigError where the loss or its gradient is not finite at theta0, or a setting is out of its range.
    """
    _check(tier, theta0, steps, lr, decay, damping, rank)
    theta = theta0.detach().clone()
    at, grad = _value_and_grad(loss, theta)
    if not (math.isfinite(float(at)) and bool(torch.isfinite(grad).all())):
        raise ConfigError(f"descend: the loss at theta0 is {float(at)}, or its gradient is not finite; start elsewhere")
    rows: dict[str, list[Tensor]] = {name: [] for name in ("theta", "loss", "grad", "step", "scale", "damping")}
    rows["theta"], rows["loss"], rows["grad"] = [theta], [at], [grad]
    mean_square, evaluations, outcome = torch.zeros_like(theta), 1, "max_steps"
    lam = 1e-3 if damping is None else damping
    for t in range(steps):
        if float(grad.abs().max()) <= tolerance:
            outcome = "converged"
            break
        if tier == "simple":
            mean_square = decay * mean_square + (1 - decay) * grad.square()
            root = (mean_square / (1 - decay ** (t + 1))).sqrt()
            scale = lr / (root + (1e-8 if damping is None else damping))
            step, used = -scale * grad, 0.0
            rows["scale"].append(scale)
        else:
            values, vectors = _spectrum(curvature(loss, theta, residuals), rank)
            used = lam
            direction = -_solve(values, vectors, grad, lam)
            size, tried = _search(loss, theta, at, direction, float(grad @ direction))
            evaluations += tried
            if size == 0.0:
                lam *= 4.0
                if lam > LAMBDA_MOST or -float(grad @ direction) <= 1e-15 * max(1.0, abs(float(at))):
                    outcome = "stalled"
                    break
            step = size * direction
            along = vectors.mT @ step
            model = float(grad @ step + 0.5 * (values * along.square()).sum())
            fell = float(loss(theta + step).detach() - at) if size else 0.0
            ratio = fell / model if model < 0 else 0.0
            if size:
                lam = max(LAMBDA_LEAST, lam / 3 if ratio > 0.75 else lam * 4 if ratio < 0.25 else lam)
        theta = theta + step
        at, grad = _value_and_grad(loss, theta)
        evaluations += 1
        for name, own in (("theta", theta), ("loss", at), ("grad", grad), ("step", step)):
            rows[name].append(own)
        rows["damping"].append(torch.tensor(used, dtype=theta.dtype))
        if not math.isfinite(float(at)):
            outcome = "stalled"
            break
    empty = theta.new_zeros(0, len(theta))
    stacked = {name: torch.stack(own) if own else empty for name, own in rows.items()}
    return Descent(
        theta, stacked["theta"], stacked["loss"], stacked["grad"], stacked["step"],
        stacked["scale"] if tier == "simple" else None, stacked["damping"].flatten(), evaluations, outcome,
    )  # fmt: skip


def curvature(loss: Loss, theta: Tensor, residuals: Loss | None = None) -> Tensor:
    """C (P, P) at theta: J^T J of the residuals where they are given, else the Hessian of the loss, symmetric."""
    if residuals is not None:
        jacobian = torch.autograd.functional.jacobian(residuals, theta.detach(), vectorize=True)
        assert isinstance(jacobian, Tensor)
        return jacobian.mT @ jacobian
    hessian = torch.autograd.functional.hessian(loss, theta.detach(), vectorize=True)
    assert isinstance(hessian, Tensor)
    return (hessian + hessian.mT) / 2


def inverse_mass(matrix: Tensor, *, damping: float = 1e-6, rank: int | None = None) -> Tensor:
    """(|C| + lambda)^-1, (P, P), symmetric and positive: the inverse mass matrix of a Hamiltonian sampler.

    With C the Gauss-Newton curvature of -log p at its mode this is Laplace's covariance; a sampler whose momentum is
    drawn from its inverse sees a target of unit scale. |C| has the absolute eigenvalues, with `rank` as above.
    """
    values, vectors = _spectrum(matrix, rank)
    return _solve(values, vectors, torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device), damping)


def log_prob(loss: Loss, temperature: float = 1.0) -> Loss:
    """log p(theta) = -loss(theta) / temperature, up to a constant; ConfigError unless the temperature is above 0."""
    if not 0 < temperature < math.inf:
        raise ConfigError(f"log_prob: temperature={temperature} must be above 0")
    return lambda theta: -loss(theta) / temperature


def _value_and_grad(loss: Loss, theta: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        own = theta.detach().requires_grad_()
        value = loss(own)
        if value.dim():
            raise ConfigError(f"descend: loss(theta) is of shape {tuple(value.shape)}; one number is wanted")
        (grad,) = torch.autograd.grad(value, own, materialize_grads=True)
    return value.detach(), grad


def _spectrum(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Absolute eigenvalues (P,), those beyond the `rank` largest as its smallest, and eigenvectors in columns."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.abs()
    if rank is not None and rank < len(values):
        values = values.clamp_min(values.topk(rank).values[-1])
    return values, vectors


def _solve(values: Tensor, vectors: Tensor, b: Tensor, damping: float) -> Tensor:
    """(V diag(values) V^T + damping)^-1 b."""
    inverse = 1 / (values + damping)
    return (vectors * inverse) @ (vectors.mT @ b)


def _search(loss: Loss, theta: Tensor, at: Tensor, direction: Tensor, slope: float) -> tuple[float, int]:
    """(s, evaluations): the largest of 1, 1/2, 1/4 ... with loss(theta + s d) <= loss + 1e-4 s g^T d; 0 if none is."""
    size = 1.0
    with torch.no_grad():
        for tried in range(1, HALVINGS + 1):
            value = float(loss(theta + size * direction))
            if value <= float(at) + ARMIJO * size * slope:
                return size, tried
            size /= 2
    return 0.0, HALVINGS


def _check(
    tier: str, theta0: Tensor, steps: int, lr: float, decay: float, damping: float | None, rank: int | None
) -> None:
    if tier not in TIERS:
        raise ConfigError(f"descend: tier={tier!r}; choose {' or '.join(TIERS)}")
    if theta0.dim() != 1 or not len(theta0) or not theta0.is_floating_point():
        raise ConfigError(f"descend: theta0 of shape {tuple(theta0.shape)}; a flat vector of real numbers is wanted")
    if steps < 1 or not 0 < lr < math.inf or not 0 <= decay < 1 or (damping is not None and not 0 < damping < math.inf):
        raise ConfigError(
            f"descend: steps={steps}, lr={lr}, decay={decay}, damping={damping};"
            " at least 1, above 0, in [0, 1), above 0 are wanted"
        )
    if rank is not None and (tier == "simple" or not 1 <= rank <= len(theta0)):
        raise ConfigError(f"descend: rank={rank}; from 1 to {len(theta0)}, in the advanced tier alone")
