"""Steps in the eigenbases of Kronecker factors: soap, soap_muon and kl_shampoo.

For a weight (R, C) with gradient G, factors L (R, R) and R (C, C) and their eigenbases Q_L, Q_R, a prime
means "in the bases", X' = Q_L^T X Q_R. The momentum M' is kept there and turned along when a basis moves.

soap (Vyas et al. 2024): Adam in the bases. The first gradient that is not zero only makes the bases.

    M' <- b1 M' + (1 - b1) G',     V <- b2 V + (1 - b2) G'^2,     t counts from the second gradient on
    W  <- (1 - lr wd) W - lr sqrt(1 - b2^t) / (1 - b1^t)  Q_L [M' / (sqrt V + damping)] Q_R^T
    L  <- d L + (1 - d) G G^T,     R <- d R + (1 - d) G^T G;     every `refresh` steps Q <- followed(factor, Q)

soap_muon (Acqua 2026, modded-nanogpt #278, after Vyas et al.): the same factors, but the Nesterov momentum is
divided, and the polar factor of the quotient taken; lengths are those of KroneckerNG's muon.

    U' = (1 - b1) G' + b1 M',      V <- b2 V + (1 - b2) U'^2
    W  <- (1 - lr wd) W - lr 0.2 sqrt(max(R, C))  Q_L polar(U' / (sqrt V + damping)) Q_R^T

kl_shampoo (Lin et al. 2025): factors that minimise the Kullback-Leibler divergence between Gaussians of
covariance E[g g^T] and L (x) R. Each sees the gradient whitened by the other; l, r are the eigenvalues.

    l_i <- b2 l_i + (1 - b2) mean_j G'_ij^2 / r_j,      r_j <- b2 r_j + (1 - b2) mean_i G'_ij^2 / l_i
    L   <- d L + (1 - d) G R^-1 G^T / C,                R   <- d R + (1 - d) G^T L^-1 G / R
    W   <- (1 - lr wd) W - lr / (1 - b1^t)  Q_L [M'_ij / sqrt(l_i r_j)] Q_R^T

    It starts from L = R = c 1, c the root mean square of the first gradient that is not zero, so that steps
    do not depend on the scale of the loss. damping bounds l and r from below.

A side longer than `max_dim`, or than `max_aspect` times the other, gets no factor and Q = 1 (one-sided); its
r or l remain as a diagonal. Left out of the papers: weight decay is AdamW's (before the step), and the momentum
lives in the bases, which is the same up to rounding and saves a third of the products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from constellation.optim.bucket import buckets, stacked
from constellation.optim.eigenbasis import eigenbasis, followed
from constellation.optim.kinds import matrix_shape
from constellation.optim.natural import state_like
from constellation.optim.polar import polar

WHITENED = ("soap", "soap_muon", "kl_shampoo")


def sides(shape: Sequence[int], max_dim: int, max_aspect: float) -> tuple[bool, bool]:
    """Whether rows, and whether columns, get a factor."""
    rows, columns = shape
    return (
        rows <= max_dim and rows <= max_aspect * columns,
        columns <= max_dim and columns <= max_aspect * rows,
    )


def whitened_step(params: Sequence[Tensor], state: Any, group: dict[str, Any]) -> None:
    """One step on the matrices `params` that have a gradient."""
    for members, steps in buckets(params, state):
        if steps == 0:
            members = _begin(members, state, group)
        if members:
            _step(members, steps, state, group)


def _begin(members: list[Tensor], state: Any, group: dict[str, Any]) -> list[Tensor]:
    """State of new parameters; those whose gradient is still zero wait."""
    for p in members:
        s = state[p]
        if "step" in s:
            continue
        shape = matrix_shape(p.shape)
        s["step"], s["momentum"] = torch.zeros((), dtype=torch.float32), state_like(p).reshape(shape)
        if group["variant"] != "kl_shampoo":
            s["fisher"] = torch.zeros_like(s["momentum"])
        for side, dim, wanted in zip(("left", "right"), shape, _sides(p, group), strict=True):
            like = s["momentum"]
            if group["variant"] == "kl_shampoo":
                s[f"{side}_values"] = like.new_zeros(dim)
            if wanted:
                s[side], s[f"{side}_basis"] = like.new_zeros(dim, dim), torch.eye(dim, dtype=like.dtype).to(like)
    return [p for p in members if p.grad is not None and bool(p.grad.any())]


def _sides(p: Tensor, group: dict[str, Any]) -> tuple[bool, bool]:
    return sides(matrix_shape(p.shape), group["max_dim"], group["max_aspect"])


def _step(members: list[Tensor], steps: int, state: Any, group: dict[str, Any]) -> None:
    states = [state[p] for p in members]
    momentum_NRC = stacked(states, "momentum")
    shape = momentum_NRC.shape[1:]
    grads = [p.grad.to(momentum_NRC.dtype).reshape(shape) for p in members if p.grad is not None]
    g_NRC = torch.stack(grads).neg_() if group.get("maximize") else torch.stack(grads)
    left, right = ("left" in states[0]), ("right" in states[0])
    bases = [stacked(states, f"{side}_basis") if has else None for side, has in (("left", left), ("right", right))]
    torch._foreach_add_([s["step"] for s in states], 1.0)
    kl = group["variant"] == "kl_shampoo"
    if not kl and steps == 0:
        _update_factors(states, g_NRC, g_NRC, group)
        for side in ("left", "right"):
            if side in states[0]:
                stacked(states, f"{side}_basis").copy_(eigenbasis(stacked(states, side)))
        return
    t = steps + 1 if kl else steps
    dtype = torch.bfloat16 if group["products"] == "bfloat16" else g_NRC.dtype
    half_NRC = g_NRC if bases[1] is None else _product(g_NRC, bases[1], dtype)  # G Q_R
    turned_NRC = half_NRC if bases[0] is None else _product(bases[0].mT, half_NRC, dtype)
    momentum_NRC.lerp_(turned_NRC, 1 - group["momentum"])
    if kl:
        delta_NRC = _kl(states, bases, g_NRC, half_NRC, turned_NRC, momentum_NRC, t, group)
    else:
        delta_NRC = _soap(states, turned_NRC, momentum_NRC, t, group)
        _update_factors(states, g_NRC, g_NRC, group)
    delta_NRC = delta_NRC if bases[0] is None else _product(bases[0], delta_NRC, dtype)
    delta_NRC = delta_NRC if bases[1] is None else _product(delta_NRC, bases[1].mT, dtype)
    lr = float(group["lr"])
    if group["weight_decay"]:
        torch._foreach_mul_(members, 1 - lr * group["weight_decay"])
    torch._foreach_add_(members, [delta.reshape(members[0].shape) for delta in delta_NRC.unbind()], alpha=-lr)
    if t % group["refresh"] == 0 and (left or right):
        _refresh(states, bases, momentum_NRC, group)


def _soap(
    states: list[dict[str, Any]], turned_NRC: Tensor, momentum_NRC: Tensor, t: int, group: dict[str, Any]
) -> Tensor:
    b1, b2 = group["momentum"], group["fisher_decay"]
    fisher_NRC = stacked(states, "fisher")
    muon = group["variant"] == "soap_muon"
    u_NRC = turned_NRC.lerp(momentum_NRC, b1) if muon else turned_NRC
    fisher_NRC.mul_(b2).addcmul_(u_NRC, u_NRC, value=1 - b2)
    scale_NRC = fisher_NRC.sqrt().add_(group["damping"] or torch.finfo(fisher_NRC.dtype).tiny)
    if muon:
        newton_schulz = tuple(group["ns_coefficients"]), group["ns_steps"], group["ns_precision"]
        part = polar(u_NRC / scale_NRC, *newton_schulz).to(u_NRC.dtype)
        return part * (0.2 * math.sqrt(max(u_NRC.shape[-2:])))
    return (momentum_NRC / scale_NRC).mul_(math.sqrt(1 - b2**t) / (1 - b1**t))


def _kl(
    states: list[dict[str, Any]], bases: list[Tensor | None], g_NRC: Tensor, half_NRC: Tensor, turned_NRC: Tensor,
    momentum_NRC: Tensor, t: int, group: dict[str, Any],
) -> Tensor:  # fmt: skip
    b2, least = group["fisher_decay"], group["damping"] or torch.finfo(g_NRC.dtype).tiny
    l_NR, r_NC = stacked(states, "left_values"), stacked(states, "right_values")
    if t == 1:
        c_N1 = g_NRC.square().mean((-2, -1)).sqrt()[:, None]
        l_NR.add_(c_N1)
        r_NC.add_(c_N1)
        for side in ("left", "right"):
            if side in states[0]:
                stacked(states, side).diagonal(dim1=-2, dim2=-1).add_(c_N1)
    inverse_l, inverse_r = (
        l_NR.clamp(min=least).reciprocal()[:, :, None],
        r_NC.clamp(min=least).reciprocal()[:, None, :],
    )
    dtype = torch.bfloat16 if group["products"] == "bfloat16" else g_NRC.dtype
    other_NRC = g_NRC if bases[0] is None else _product(bases[0].mT, g_NRC, dtype)  # Q_L^T G
    _update_factors(
        states,
        half_NRC * (inverse_r / g_NRC.shape[2]).sqrt(),
        other_NRC * (inverse_l / g_NRC.shape[1]).sqrt(),
        group,
    )
    square_NRC = turned_NRC.square()
    l_NR.lerp_((square_NRC * inverse_r).mean(2), 1 - b2)
    r_NC.lerp_((square_NRC * inverse_l).mean(1), 1 - b2)
    scale_NRC = l_NR.clamp(min=least).rsqrt()[:, :, None] * r_NC.clamp(min=least).rsqrt()[:, None, :]
    return scale_NRC.mul_(momentum_NRC).div_(1 - group["momentum"] ** t)


def _update_factors(states: list[dict[str, Any]], rows_NRC: Tensor, columns_NRC: Tensor, group: dict[str, Any]) -> None:
    """L <- d L + (1 - d) X X^T, R <- d R + (1 - d) Y^T Y."""
    decay = group["fisher_decay"] if group["factor_decay"] is None else group["factor_decay"]
    dtype = torch.bfloat16 if group["products"] == "bfloat16" else rows_NRC.dtype
    for side, x, y in (("left", rows_NRC, rows_NRC.mT), ("right", columns_NRC.mT, columns_NRC)):
        if side in states[0] and dtype == x.dtype:
            stacked(states, side).baddbmm_(x, y, beta=decay, alpha=1 - decay)
        elif side in states[0]:
            stacked(states, side).mul_(decay).add_(_product(x, y, dtype), alpha=1 - decay)


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.to(dtype) @ y.to(dtype)).to(x.dtype)


def _refresh(
    states: list[dict[str, Any]], bases: list[Tensor | None], momentum_NRC: Tensor, group: dict[str, Any]
) -> None:
    """Both bases one iteration on; momentum and variances follow."""
    for side, basis, axis in zip(("left", "right"), bases, (1, 2), strict=True):
        if basis is None:
            continue
        factor = stacked(states, side)
        moved = followed(factor, basis, group["refresh_above"])
        if moved is None:
            continue
        new, order_ND = moved
        turn = new.mT @ basis  # Q_new^T Q_old
        momentum_NRC.copy_(turn @ momentum_NRC if axis == 1 else momentum_NRC @ turn.mT)
        basis.copy_(new)
        if "fisher" in states[0]:
            fisher_NRC = stacked(states, "fisher")
            index = order_ND[:, :, None] if axis == 1 else order_ND[:, None, :]
            fisher_NRC.copy_(fisher_NRC.gather(axis, index.expand_as(fisher_NRC)))
        else:
            stacked(states, f"{side}_values").copy_((new * (factor @ new)).sum(-2))
