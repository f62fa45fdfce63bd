"""SimpleFisherOptimizer: the original design's first optimizer, kept by its name as a baseline.

    theta_i <- (1 - lr wd) theta_i - lr g_i / (|g_i| + damping)

It divides by the square root of the last gradient's square, the diagonal Fisher of a single look: what is
left is a softened sign, +-1 wherever |g| >> damping. It is signSGD (Bernstein et al. 2018), has no memory and no
curvature, and is not a natural gradient. Steps have length lr per entry however flat or steep the loss is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.optim.kinds import decayed
from constellation.optim.natural import Evidence, NaturalOptimizer, check_range
from constellation.optim.registry import SimpleSettings


class SimpleFisherOptimizer(NaturalOptimizer):
    """Soft-sign descent; no state."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        damping: float = 1e-8,  # unit of the gradient; below it the step is linear
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        check_finite: bool = True,
    ):
        check_range("SimpleFisherOptimizer", damping=(damping, math.inf), weight_decay=(weight_decay, math.inf))
        if differentiable and foreach:
            raise ConfigError("SimpleFisherOptimizer: differentiable=True has no list path; leave foreach unset")
        defaults = {
            "lr": lr, "damping": damping, "weight_decay": weight_decay, "foreach": foreach, "maximize": maximize,
            "differentiable": differentiable, "check_finite": check_finite,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _advance(self, seen: Evidence) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["foreach"] is False or group["differentiable"]:
                for p in params:
                    _one(p, group)
            elif params:
                _all(params, group)


def build(settings: SimpleSettings, model: torch.nn.Module) -> SimpleFisherOptimizer:
    return SimpleFisherOptimizer(decayed(model, settings.weight_decay), lr=settings.lr, damping=settings.damping)


def _one(p: Tensor, group: dict[str, Any]) -> None:
    assert p.grad is not None
    lr = group["lr"] if not group["maximize"] else -group["lr"]
    g = p.grad
    delta = g / (g.abs() + group["damping"]).clamp(min=torch.finfo(g.dtype).tiny)  # 0 / 0 is no step
    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(-lr * delta)


def _all(params: list[Tensor], group: dict[str, Any]) -> None:
    lr = float(group["lr"])
    grads = [p.grad for p in params if p.grad is not None]
    scale = torch._foreach_abs(grads)
    torch._foreach_add_(scale, group["damping"])
    torch._foreach_clamp_min_(scale, min(torch.finfo(g.dtype).tiny for g in grads))
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_addcdiv_(params, grads, scale, lr if group["maximize"] else -lr)
