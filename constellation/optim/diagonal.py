"""DiagonalNG: natural gradient with the diagonal of the Fisher information.

    F_i <- a F_i + (1 - a) g_i^2          EMA of the batch gradient's square, bias-corrected
    m_i <- b m_i + (1 - b) g_i            EMA of the gradient, bias-corrected
    theta_i <- (1 - lr wd) theta_i - lr m_i / (F_i^power + damping)

power = 1 divides by the Fisher diagonal, the natural gradient of Amari (1998) restricted to a
diagonal metric; power = 1/2 is the seed's QIGDiagonalNG, which coincides with Adam (Kingma & Ba
2015) and, at b = 0 and without bias correction, with RMSprop. At 1/2 the step is invariant to the
scale of the loss and torch's fused AdamW kernel computes it; other powers run a foreach path.
Where we leave the theory: g is the gradient of the batch mean, so F is the empirical Fisher scaled
by 1 / batch (a constant that lr absorbs at power 1 and that cancels at power 1/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from constellation.errors import ConfigError


def check_range(who: str, **settings: tuple[float, float]) -> None:
    """Each setting (value, highest) must be finite and within [0, highest]."""
    for name, (value, high) in settings.items():
        if not 0 <= value <= high or value == math.inf:
            raise ConfigError(f"{who}: {name}={value} must be finite and lie in [0, {high}]")


class DiagonalNG(torch.optim.Optimizer):
    """Diagonal natural gradient. State per parameter: `step`, `momentum`, `fisher`, all float32."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        alpha: float = 0.95,  # decay of the Fisher average
        eps: float = 1e-8,  # damping lambda
        momentum: float = 0.9,
        power: float = 0.5,
        weight_decay: float = 0.0,
    ):
        check_range("DiagonalNG", lr=(lr, math.inf), alpha=(alpha, 1), eps=(eps, math.inf))
        check_range("DiagonalNG", momentum=(momentum, 1), power=(power, 1), weight_decay=(weight_decay, math.inf))
        settings = {"lr": lr, "alpha": alpha, "eps": eps, "momentum": momentum, "power": power}
        super().__init__(params, {**settings, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            diagonal_step([p for p in group["params"] if p.grad is not None], self.state, group)
        return loss


def diagonal_step(params: list[Tensor], state: Any, group: dict[str, Any]) -> None:
    """One step of the formula above on `params`, whose state is made when they are seen first."""
    if not params:
        return
    for p in params:
        if not state[p]:
            state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "momentum": torch.zeros_like(p, dtype=torch.float32),
                "fisher": torch.zeros_like(p, dtype=torch.float32),
            }
    grads = [p.grad for p in params if p.grad is not None]
    steps, momenta, fishers = ([state[p][name] for p in params] for name in ("step", "momentum", "fisher"))
    lr, alpha, momentum, power = group["lr"], group["alpha"], group["momentum"], group["power"]
    if power == 0.5 and all(p.dtype == torch.float32 for p in params):
        adamw(
            params, grads, momenta, fishers, [], steps, fused=True, amsgrad=False, beta1=momentum, beta2=alpha,
            lr=lr, weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        return
    grads = [g.float() for g in grads]
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(momenta, grads, 1 - momentum)
    torch._foreach_mul_(fishers, alpha)
    torch._foreach_addcmul_(fishers, grads, grads, 1 - alpha)
    t = float(steps[0])
    scale = torch._foreach_div(fishers, 1 - alpha**t)
    torch._foreach_pow_(scale, power)
    torch._foreach_add_(scale, group["eps"])
    delta = torch._foreach_div(momenta, scale)
    torch._foreach_mul_(delta, -lr / (1 - momentum**t))
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_add_(params, delta)
