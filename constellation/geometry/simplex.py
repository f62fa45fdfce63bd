"""Fisher-Rao geometry of categorical distributions, ds^2 = sum_i dp_i^2 / p_i.

The only Riemannian metric on the simplex, up to scale, that no sufficient statistic changes (Rao 1945; Chentsov 1972).
The chart s = sqrt(p) makes it a sphere of radius 2, so everything below is one line of sphere.py: d_FR = 2 theta.

A distribution is the last axis of a tensor, p >= 0, sum p = 1, zeros allowed; leading axes are batches that broadcast.
A tangent vector at p is a change dp, sum dp = 0, of length sqrt(sum dp^2 / p). float32 or float64, differentiable.
numpy arrays pass without a copy: `distance(torch.from_numpy(p), torch.from_numpy(q)).numpy()`.
Nothing is checked on the way: `check` is for the door.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.geometry import sphere
from constellation.geometry.sphere import Mean


def to_sphere(p: Tensor) -> Tensor:
    """Square-root chart s = sqrt(p), (..., n) -> (..., n): the positive orthant of the unit sphere.

    The slope of sqrt is infinite at 0; below p = eps^2 (1e-14 in float32) the chart goes straight on to 0 as p / eps,
    so that every gradient of this module is finite, at most 1 / eps, at the zeros of p.
    """
    return p / p.clamp_min(torch.finfo(p.dtype).eps ** 2).sqrt()


def from_sphere(s: Tensor) -> Tensor:
    """Inverse chart p = s^2, (..., n) -> (..., n); sums to |s|^2."""
    return s * s


def distance(p: Tensor, q: Tensor) -> Tensor:
    """Fisher-Rao distance d = 2 theta(sqrt p, sqrt q), (..., n) -> (...), radians in [0, pi].

    Error a few eps at any distance. pi exactly when the supports are disjoint; uniform to one-hot is
    2 arccos(1 / sqrt n). The gradient at p = q does not exist and is given as 0: a loss takes `squared_distance`.

    >>> one_hot, uniform = torch.eye(64, dtype=torch.float64), torch.full((64,), 1 / 64, dtype=torch.float64)
    >>> [round(float(distance(p, q)), 6) for p, q in ((uniform, uniform), (uniform, one_hot[0]), one_hot[:2])]
    [0.0, 2.890937, 3.141593]
    """
    return 2 * sphere.angle(to_sphere(p), to_sphere(q))


def squared_distance(p: Tensor, q: Tensor) -> Tensor:
    """d^2, (..., n) -> (...), rad^2 in [0, pi^2]; the smooth one.

    Gradient 0 at p = q, zeros of p included, and finite everywhere; half its Hessian at p = q is the Fisher metric
    diag(1 / p) on tangent vectors.
    """
    return 4 * sphere.squared_angle(to_sphere(p), to_sphere(q))


def exp(p: Tensor, dp: Tensor) -> Tensor:
    """End of the Fisher-Rao geodesic that leaves p along dp, (..., n) -> (..., n); p itself for dp = 0.

    It stops where the first probability reaches zero (sphere.exp_in_orthant). A zero of p stays zero: dp says nothing
    about a direction there, sqrt(p) has no slope. To leave a face, work on the sphere.
    """
    s = to_sphere(p)
    v = torch.where(s > 0, dp / (2 * torch.where(s > 0, s, 1.0)), 0.0)
    return from_sphere(sphere.exp_in_orthant(s, v))


def log(p: Tensor, q: Tensor) -> Tensor:
    """The dp that exp carries from p to q, of length d_FR(p, q), (..., n) -> (..., n); 0 for q = p.

    dp = 2 s log_s(t); what q has outside the support of p is lost in it (see `exp`).
    """
    s = to_sphere(p)
    return 2 * s * sphere.log(s, to_sphere(q))


def geodesic(p: Tensor, q: Tensor, tau: float | Tensor) -> Tensor:
    """Distribution a part tau in [0, 1] of the way from p to q, (..., n); the simplex is geodesically convex.

    Between one-hots it is (cos^2, sin^2)(pi tau / 2); constant p for q = p.
    """
    return from_sphere(sphere.geodesic(to_sphere(p), to_sphere(q), tau))


def mean(p: Tensor, weights: Tensor | None = None, tolerance: float | None = None, max_iterations: int = 100) -> Mean:
    """Frechet mean: the distribution that minimises sum_i w_i d_FR(m, p_i)^2, (..., N, n) -> (..., n).

    `sphere.mean` through the chart; residual and tolerance in radians of d_FR. One-hots of each category: uniform.
    """
    half = None if tolerance is None else tolerance / 2
    found = sphere.mean(to_sphere(p), weights, half, max_iterations)
    return replace(found, point=from_sphere(found.point), residual=2 * found.residual)


def barycenter(p: Tensor, weights: Tensor | None = None) -> Tensor:
    """(sum_i w_i sqrt p_i)^2, normalised, (..., N, n) -> (..., n): the closed form that starts the Frechet mean.

    It minimises sum_i w_i |sqrt m - sqrt p_i|^2, chords instead of arcs; equal for N = 2 with equal weights, and to
    third order for close points. Equal points give that point. Weights (..., N) are >= 0, any sum.
    """
    s = to_sphere(p)
    w = torch.ones_like(s[..., 0]) if weights is None else weights.to(p)
    return from_sphere(sphere.normalise((w.unsqueeze(-1) * s).sum(-2)))


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum p ln(p / q), (..., n) -> (...), nats in [0, inf]; 2 KL -> d_FR^2 as q -> p.

    0 for p = q; ln n from a one-hot to uniform; infinite where q lacks a category that p has. A zero of p adds 0, and
    its gradient, in truth -inf, is given as 0.

    >>> kl(torch.eye(3)[0], torch.full((3,), 1 / 3)), kl(torch.full((3,), 1 / 3), torch.eye(3)[0])
    (tensor(1.0986), tensor(inf))
    """
    has = p > 0
    ratio = torch.log(torch.where(has, p, 1.0)) - torch.log(torch.where(has, q, 1.0))
    return torch.where(has, p * ratio, 0.0).sum(-1)


def check(p: Tensor, name: str = "p", tolerance: float = 1e-4) -> None:
    """Refuses what is not a distribution along the last axis, naming the first thing that is wrong."""
    if not p.is_floating_point() or p.dim() == 0 or p.shape[-1] == 0:
        raise ConfigError(
            f"{name}: {p.dtype} of shape {tuple(p.shape)}; distributions are float tensors (..., n), n >= 1"
        )
    if not bool(torch.isfinite(p).all()):
        raise ConfigError(f"{name}: holds a value that is not finite; probabilities are in [0, 1]")
    if bool((p < 0).any()):
        raise ConfigError(f"{name}: holds {float(p.min()):.3g}; probabilities are >= 0")
    total = p.sum(-1).flatten()
    worst = float(total[(total - 1).abs().argmax()]) if len(total) else 1.0
    if abs(worst - 1) > tolerance:
        raise ConfigError(f"{name}: sums to {worst:.6g}, not 1 within {tolerance:g}; divide by the sum")
