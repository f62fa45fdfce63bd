"""KroneckerNG: natural gradient with a Kronecker-factored Fisher, one batch deep.

For a weight W (rows, columns) with gradient G, Shampoo's factors of the empirical Fisher of one batch
are L = G G^T and R = G^T G, F = L^{1/2} (x) R^{1/2} (Gupta, Koren & Singer 2018). Then

    F^{-1/2} vec G  =  L^{-1/4} G R^{-1/4}  =  U V^T          for  G = U S V^T,

the polar factor of G: every singular direction moves by the same amount. It is computed without a
decomposition by five Newton-Schulz steps X <- a X + (b A + c A^2) X, A = X X^T, in bf16 products
(Jordan et al. 2024, "Muon"); they bring singular values near 1 (0.7 .. 1.2), not to 1.

    M <- mu M + (1 - mu) G,     N = (1 - mu) G + mu M         momentum, Nesterov
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) polar(N)

The factor makes the step's root mean square that of Adam at the same lr (Liu et al. 2025), so that one
rate serves all groups. Matrices of one shape are stacked and iterated together. Parameters of a group
with method "diagonal" (embeddings, vectors) get DiagonalNG's step. Tried without gain: q, k and v, or gate
and up, factored apart instead of as the one weight they are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.optim.diagonal import diagonal_step
from constellation.optim.natural import check_range

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c: steepest at 0 among those that keep [0.7, 1.2] (Jordan 2024)
NEWTON_SCHULZ_STEPS = 5


def polar(matrices_NRC: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T, singular values within about [0.7, 1.2]; zero matrices stay zero. bf16 inside."""
    largest = matrices_NRC.abs().amax(dim=(-2, -1), keepdim=True)  # first, or squares of huge entries overflow
    x = (matrices_NRC / torch.where(largest > 0, largest, 1)).bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class KroneckerNG(torch.optim.Optimizer):
    """Groups carry method "kronecker" (matrices, the default) or "diagonal". State is float32."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,  # mu of the Kronecker groups
        weight_decay: float = 0.0,
        alpha: float = 0.95,  # the last three are DiagonalNG's, for the diagonal groups
        eps: float = 1e-8,
        diagonal_momentum: float = 0.9,
    ):
        check_range("KroneckerNG", lr=(lr, math.inf), momentum=(momentum, 1), weight_decay=(weight_decay, math.inf))
        check_range("KroneckerNG", alpha=(alpha, 1), eps=(eps, math.inf), diagonal_momentum=(diagonal_momentum, 1))
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "alpha": alpha, "eps": eps,
            "diagonal_momentum": diagonal_momentum, "method": "kronecker",
        }  # fmt: skip
        super().__init__(params, defaults)
        for group in self.param_groups:
            if group["method"] not in ("kronecker", "diagonal"):
                raise ConfigError(f"KroneckerNG: method {group['method']!r}; choose kronecker or diagonal")
            for p in group["params"] if group["method"] == "kronecker" else ():
                if p.dim() != 2:
                    raise ConfigError(f"KroneckerNG: shape {tuple(p.shape)} is no matrix; give it method=diagonal")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets: dict[torch.Size, list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["method"] == "diagonal":
                diagonal_step(params, self.state, {**group, "momentum": group["diagonal_momentum"], "power": 0.5})
                continue
            for p in params:
                buckets.setdefault(p.shape, []).append((p, self._direction(p, group), group))
        for shape, members in buckets.items():
            parts = polar(torch.stack([direction for _, direction, _ in members])).float()
            scale = 0.2 * math.sqrt(max(shape))
            for (p, _, group), part in zip(members, parts, strict=True):
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(part, alpha=-group["lr"] * scale)
        return loss

    def _direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Momentum updated, and the Nesterov look ahead."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
        assert p.grad is not None
        grad = p.grad.float()
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        return grad.lerp(state["momentum"], group["momentum"])
