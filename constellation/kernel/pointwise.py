"""RMSNorm and SwiGLU, each as a formula and by hand (derivative.py). N rows, D width, F inner width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from constellation.kernel.derivative import by_hand, first_alone, pulled_back


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) weight, over the last axis (Zhang & Sennrich 2019)."""
    return _RMSNorm.apply(x, weight, eps) if by_hand(x) else _rms_norm(x, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) up of (..., 2F), silu(z) = z sigmoid(z) (Shazeer 2020)."""
    return _SwiGLU.apply(gate_up) if by_hand(gate_up) else _swiglu(gate_up)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _RMSNorm(torch.autograd.Function):
    """u = x r, r = 1 / sqrt(mean x^2 + eps), y = u w:  dx = r (g w - u <g w, u> / D),  dw = sum_n g u."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        u = x * r
        ctx.save_for_backward(x, weight, r, u)
        ctx.eps = eps
        return u * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, weight, r, u = ctx.saved_tensors
        if not first_alone(g):
            return pulled_back(_rms_norm, (x, weight, ctx.eps), g)
        gu = g * u
        along = gu @ weight / -x.shape[-1]
        dx = (g * weight).addcmul_(u, along[..., None]).mul_(r)
        return dx, gu.flatten(0, -2).sum(0), None


class _SwiGLU(torch.autograd.Function):
    """s = sigmoid(gate), y = gate s up:  d gate = g up s (1 + gate (1 - s)),  d up = g gate s."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        s = torch.sigmoid(gate)
        ctx.save_for_backward(gate_up, s)
        return (gate * s).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        gate_up, s = ctx.saved_tensors
        if not first_alone(g):
            return pulled_back(_swiglu, (gate_up,), g)
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        d_gate, d_up = both.chunk(2, dim=-1)
        gs = g * s
        torch.mul(gs, gate, out=d_up)
        torch.addcmul(gs, d_up, 1 - s, out=d_gate).mul_(up)
        return both
