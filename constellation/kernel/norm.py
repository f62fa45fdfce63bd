"""RMSNorm as a formula and by hand (derivative.py). N rows, D width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from constellation.kernel.derivative import by_hand, first_alone, pulled_back


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) weight, over the last axis (Zhang & Sennrich 2019)."""
    return _RMSNorm.apply(x, weight, eps) if by_hand(x) else _formula(x, weight, eps)


def _formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


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
            return pulled_back(_formula, (x, weight, ctx.eps), g)
        gu = g * u
        along = gu @ weight / -x.shape[-1]
        dx = (g * weight).addcmul_(u, along[..., None]).mul_(r)
        return dx, gu.flatten(0, -2).sum(0), None
