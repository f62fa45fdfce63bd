"""Curvature diagonals: four honest sources of one positive-by-intent number per parameter.

    hutchinson_hessian   mean_k v_k * (H v_k), v = +-1         diag of the Hessian; may be negative
    gauss_newton         mean_k (J^T S v_k)^2, S S^T = H_out   diag of J^T H_out J >= 0, for softmax the true Fisher
    empirical_fisher     mean_n g_n^2, one row's gradient each  of the labels seen, not of the model's own
    ema_grad2            EMA of the batch gradient's square    (mean gradient)^2 plus noise / batch

The first two are second derivatives (units loss / theta^2), the last two squared gradients (loss^2 /
theta^2): equal in expectation only for a negative log-likelihood at its optimum, so they are never blended.
Every estimate carries its standard error. J^T S v with random signs v has E (J^T S v)_i^2 = |S^T J e_i|^2,
one backward pass a probe; the Hessian needs two. References: Hutchinson (1990); Bekas, Kokiopoulou & Saad
(2007); Schraudolph (2002); Kunstner, Balles & Hennig (2019) on what the empirical Fisher is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from constellation.errors import ConfigError

SECOND_DERIVATIVE, SQUARED_GRADIENT = "loss / theta^2", "loss^2 / theta^2"
UNITS = {
    "hutchinson_hessian": SECOND_DERIVATIVE,
    "gauss_newton": SECOND_DERIVATIVE,
    "empirical_fisher": SQUARED_GRADIENT,
    "ema_grad2": SQUARED_GRADIENT,
}
CHUNK_ELEMENTS = 2**26  # gradient entries that exist at once where several rows go backward together


@dataclass(frozen=True)
class Curvature:
    """A diagonal with what is needed to trust it; `stderr` is inf where one sample alone was seen, 0 where exact."""

    diagonal: tuple[Tensor, ...]  # one tensor a parameter, its shape, float32 or float64
    stderr: tuple[Tensor, ...]  # standard error of `diagonal`, same unit
    kind: str  # a key of UNITS, or a blend of two
    units: str
    probes: int  # samples averaged: probes, rows or steps
    seed: int | None = None  # of the random probes


def hutchinson_diagonal(loss: Tensor, params: Sequence[Tensor], *, probes: int = 8, seed: int = 0) -> Curvature:
    """diag(H) of the scalar `loss`, whose graph must be alive; exact for a diagonal H whatever the probes.

    Off-diagonal mass is the noise: one probe has Var_i = sum_{j != i} H_ij^2. A linear loss gives zeros.
    """
    _check_probes(probes)
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    curved = [g for g in grads if g.requires_grad]
    moments = _Moments(params)
    for signs in _signs([p.detach() for p in params], probes, seed):
        if not curved:  # a linear loss
            moments.add([torch.zeros_like(s) for s in signs])
            continue
        along = [s for s, g in zip(signs, grads, strict=True) if g.requires_grad]
        products = torch.autograd.grad(curved, params, along, retain_graph=True, materialize_grads=True)
        moments.add([s * h for s, h in zip(signs, products, strict=True)])
    return moments.curvature("hutchinson_hessian", seed)


def gauss_newton_diagonal(
    outputs: Tensor,
    params: Sequence[Tensor],
    *,
    likelihood: str = "softmax",
    weights: Tensor | None = None,
    probes: int | None = 8,
    seed: int = 0,
) -> Curvature:
    """diag(J^T H_out J) of `outputs`, whose graph must be alive.

    likelihood = "softmax": outputs are logits (..., V), the loss their MEAN cross-entropy over rows; the true Fisher.
    likelihood = "squares": outputs are residuals r, the loss 1/2 SUM weights r^2; diag_j = sum_i W_i J_ij^2.
    probes = None takes every column of the factor instead of random signs: exact, as many passes as outputs.
    """
    flat = outputs.detach().flatten(0, -2) if likelihood == "softmax" else outputs.detach()
    if likelihood == "softmax":
        p = torch.softmax(flat.to(_wide(flat)), -1)
        root, rows = p.sqrt(), len(flat)

        def factor(v: Tensor) -> Tensor:  # S v, S = (diag sqrt p - p sqrt p^T) / sqrt N
            return (root * v - p * (root * v).sum(-1, keepdim=True)) / math.sqrt(rows)
    elif likelihood == "squares":
        scale = torch.ones_like(flat) if weights is None else weights.detach().expand_as(flat).sqrt()

        def factor(v: Tensor) -> Tensor:
            return scale * v
    else:
        raise ConfigError(f"gauss_newton_diagonal: likelihood={likelihood!r}; choose softmax or squares")

    def rows_of(v: Tensor) -> Tensor:
        return factor(v).to(outputs.dtype).view_as(outputs)

    if probes is None:
        total = [torch.zeros_like(p, dtype=_wide(p)) for p in params]
        chunk = _chunk(params)
        for start in range(0, flat.numel(), chunk):
            columns = torch.arange(start, min(start + chunk, flat.numel()), device=flat.device)
            units = torch.zeros(len(columns), flat.numel(), dtype=_wide(flat), device=flat.device)
            units.scatter_(1, columns[:, None], 1.0)
            cotangents = torch.vmap(rows_of)(units.view(-1, *flat.shape))
            parts = _vjps(outputs, params, cotangents)
            torch._foreach_add_(total, [part.to(_wide(part)).square().sum(0) for part in parts])
        exact = tuple(total)
        return Curvature(
            exact, tuple(torch.zeros_like(c) for c in exact), "gauss_newton", UNITS["gauss_newton"], flat.numel()
        )
    _check_probes(probes)
    moments = _Moments(params)
    for (v,) in _signs([flat], probes, seed):
        products = torch.autograd.grad(outputs, params, rows_of(v), retain_graph=True, materialize_grads=True)
        moments.add([g.to(_wide(g)).square() for g in products])
    return moments.curvature("gauss_newton", seed)


def empirical_fisher_diagonal(losses_N: Tensor, params: Sequence[Tensor]) -> Curvature:
    """mean_n g_n^2 over rows, g_n the gradient of losses_N[n]; one backward pass a row, in vectorised chunks."""
    flat = losses_N.flatten()
    moments = _Moments(params)
    chunk = _chunk(params)
    for start in range(0, len(flat), chunk):
        rows = torch.arange(start, min(start + chunk, len(flat)), device=flat.device)
        picks = torch.zeros(len(rows), len(flat), dtype=flat.dtype, device=flat.device).scatter_(1, rows[:, None], 1.0)
        moments.add_many([g.to(_wide(g)).square() for g in _vjps(flat, params, picks)])
    return moments.curvature("empirical_fisher", None)


def ema_grad2(second: Sequence[Tensor], fourth: Sequence[Tensor], steps: int, decay: float) -> Curvature:
    """The bias-corrected EMA of g^2 from raw EMAs of g^2 and g^4 after `steps` updates at `decay`.

    With weights w of the average, sum w^2 = (1 - b)(1 + b^t) / ((1 + b)(1 - b^t)) and
    Var(average) = sum w^2 / (1 - sum w^2) (EMA g^4 - (EMA g^2)^2): steps taken as independent.
    """
    if steps < 1:
        raise ConfigError(f"ema_grad2: steps={steps}; no gradient has been seen")
    b, t = decay, steps
    whole = 1 - b**t
    squared = (1 - b) * (1 + b**t) / ((1 + b) * whole)
    mean = tuple(s / whole for s in second)
    if squared >= 1 - 1e-12:
        stderr = tuple(torch.full_like(m, math.inf) for m in mean)
    else:
        spread = squared / (1 - squared)
        stderr = tuple(((f / whole - m * m).clamp(min=0) * spread).sqrt() for f, m in zip(fourth, mean, strict=True))
    return Curvature(mean, stderr, "ema_grad2", UNITS["ema_grad2"], t)


def blend(first: Curvature, second: Curvature, weight: float) -> Curvature:
    """weight first + (1 - weight) second, errors taken as independent; ConfigError where the units differ."""
    if first.units != second.units:
        raise ConfigError(
            f"blend: {first.kind} is in {first.units}, {second.kind} in {second.units}; blend curvatures of one unit"
        )
    if not 0 <= weight <= 1:
        raise ConfigError(f"blend: weight={weight} must lie in [0, 1]")
    a, b = weight, 1 - weight
    kind = first.kind if first.kind == second.kind else f"{a:g} {first.kind} + {b:g} {second.kind}"
    return Curvature(
        tuple(a * x + b * y for x, y in zip(first.diagonal, second.diagonal, strict=True)),
        tuple(torch.hypot(_scaled(a, x), _scaled(b, y)) for x, y in zip(first.stderr, second.stderr, strict=True)),
        kind,
        first.units,
        first.probes + second.probes,
        second.seed,
    )


def from_likelihood(
    kind: str, logits: Tensor, targets: Tensor | None, params: Sequence[Tensor], *, probes: int, seed: int
) -> Curvature:
    """The diagonal of `kind` for the mean cross-entropy of logits (..., V) against targets (...).

    `probes` random signs, or for the empirical Fisher as many rows drawn without replacement.
    """
    if kind == "gauss_newton":
        return gauss_newton_diagonal(logits, params, probes=probes, seed=seed)
    if targets is None:
        raise ConfigError(f"{kind}: the loss is of labels; pass step(logits=..., targets=...)")
    flat = logits.flatten(0, -2)
    rows = torch.nn.functional.cross_entropy(flat.to(_wide(flat)), targets.flatten(), reduction="none")
    if kind == "hutchinson_hessian":
        return hutchinson_diagonal(rows.mean(), params, probes=probes, seed=seed)
    if kind == "empirical_fisher":
        generator = torch.Generator(device=rows.device).manual_seed(seed)
        picked = torch.randperm(len(rows), generator=generator, device=rows.device)[:probes]
        return dataclasses.replace(empirical_fisher_diagonal(rows[picked], params), seed=seed)
    raise ConfigError(f"curvature {kind!r}: choose one of {', '.join(UNITS)}")


class _Moments:
    """Running mean and squared deviations (Welford; chunks merged as in Chan, Golub & LeVeque 1983)."""

    def __init__(self, params: Sequence[Tensor]):
        self.count = 0
        self.mean = [torch.zeros_like(p, dtype=_wide(p)) for p in params]
        self.squares = [torch.zeros_like(m) for m in self.mean]

    @torch.no_grad()
    def add(self, sample: Sequence[Tensor]) -> None:
        self.add_many([s.detach()[None] for s in sample])

    @torch.no_grad()
    def add_many(self, samples: Sequence[Tensor]) -> None:
        """`samples` carry their number as the first dimension."""
        new = len(samples[0])
        total = self.count + new
        for mean, squares, part in zip(self.mean, self.squares, samples, strict=True):
            wide = part.to(mean.dtype)
            centre = wide.mean(0)
            apart = centre - mean
            squares += (wide - centre).square().sum(0) + apart.square() * (self.count * new / total)
            mean += apart * (new / total)
        self.count = total

    def curvature(self, kind: str, seed: int | None) -> Curvature:
        n = self.count
        stderr = (
            tuple((s / (n * (n - 1))).sqrt() for s in self.squares)
            if n > 1
            else tuple(torch.full_like(s, math.inf) for s in self.squares)
        )
        return Curvature(tuple(self.mean), stderr, kind, UNITS[kind], n, seed)


def _signs(like: Sequence[Tensor], probes: int, seed: int) -> Iterator[list[Tensor]]:
    """`probes` times one tensor of random signs for each of `like`, from `seed` alone."""
    generator = torch.Generator(device=like[0].device).manual_seed(seed)
    for _ in range(probes):
        yield [
            torch.randint(0, 2, t.shape, generator=generator, device=t.device, dtype=torch.int8)
            .to(t.dtype)
            .mul_(2)
            .sub_(1)
            for t in like
        ]


def _vjps(outputs: Tensor, params: Sequence[Tensor], cotangents: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        outputs, params, cotangents, retain_graph=True, is_grads_batched=True, materialize_grads=True
    )


def _chunk(params: Sequence[Tensor]) -> int:
    return max(1, CHUNK_ELEMENTS // sum(p.numel() for p in params))


def _scaled(factor: float, error: Tensor) -> Tensor:
    return error * factor if factor else torch.zeros_like(error)  # 0 x inf is no error


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _check_probes(probes: int) -> None:
    if probes < 2:
        raise ConfigError(f"probes={probes}: must be at least 2, or no standard error exists")
