"""KroneckerNG: natural gradient with a Kronecker-factored Fisher; the default of the project.

variant     factors of the Fisher
muon        of one batch, L = G G^T and R = G^T G, below
soap        averaged; Adam in their eigenbases          } whiten.py
kl_shampoo  averaged so as to minimise a KL divergence  }
soap_muon   soap's division, then muon's polar factor   }

For a weight W (rows, columns) with gradient G, Shampoo's factors of the empirical Fisher of one batch
are L = G G^T and R = G^T G, F = L^{1/2} (x) R^{1/2} (Gupta, Koren & Singer 2018). Then

    F^{-1/2} vec G  =  L^{-1/4} G R^{-1/4}  =  U V^T          for  G = U S V^T,

the polar factor of G: every singular direction moves by the same amount (polar.py, without a decomposition;
Jordan et al. 2024, "Muon").

    M <- mu M + (1 - mu) G,     N = (1 - mu) G + mu M         momentum, Nesterov
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) polar(N)

The factor makes the step's root mean square that of Adam at the same lr (Liu et al. 2025), so that one
rate serves all groups. Matrices of one shape are stacked and iterated together. Parameters of a group
with method "diag" (embeddings, vectors) get DiagonalNG's step at power 1/2. Tried without gain: q, k and v, or
gate and up, factored apart instead of as the one weight they are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.optim.elementwise import diagonal_step
from constellation.optim.natural import NaturalOptimizer, check_range
from constellation.optim.polar import NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, polar, polar_single
from constellation.optim.whiten import WHITENED, whitened_step

__all__ = ["KroneckerNG", "kronecker_step", "polar"]

VARIANTS = ("muon", *WHITENED)
ADJUSTMENTS = ("match_rms_adamw", "original")
PRODUCTS = ("full", "bfloat16")
OLD_NAMES = {"kronecker": "kron", "diagonal": "diag"}  # in checkpoints of the first release
LARGEST_NORM = 1e18  # of a gradient whose square is averaged in float32
KRON: dict[str, Any] = {
    "variant": "muon", "momentum": 0.95, "weight_decay": 0.0, "alpha": 0.95, "eps": 1e-8, "factor_decay": None,
    "refresh": 10, "refresh_above": 0.0, "max_dim": 1024, "max_aspect": 2.0, "products": "full", "nesterov": True,
    "adjust_lr_fn": "match_rms_adamw", "ns_coefficients": NEWTON_SCHULZ, "ns_steps": NEWTON_SCHULZ_STEPS,
    "batched": True, "maximize": False,
}  # fmt: skip


class KroneckerNG(NaturalOptimizer):
    """Groups carry method "kron" (matrices, the default) or "diag". State is float32.

    batched=False goes matrix by matrix, rounding as torch.optim.Muon: its trajectory to the bit.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,  # mu and b1 of the Kronecker groups
        weight_decay: float = 0.0,
        alpha: float = 0.95,  # b2: of V, l and r, and of the diagonal groups' F
        eps: float = 1e-8,  # damping, unit of the gradient
        diagonal_momentum: float = 0.9,
        *,
        variant: str = "muon",
        factor_decay: float | None = None,  # d of L and R; None: alpha
        refresh: int = 10,  # steps between two looks at the bases
        refresh_above: float = 0.0,  # a basis is left alone while its off-diagonal part is at most this, [0, 1]
        max_dim: int = 1024,  # sides longer than this, or than max_aspect times the other, get no factor
        max_aspect: float = 2.0,
        products: str = "full",  # of factors and bases; bfloat16 is several times faster where processors have it
        nesterov: bool = True,
        adjust_lr_fn: str = "match_rms_adamw",  # 0.2 sqrt(max(r, c)); original: sqrt(max(1, r / c))
        ns_coefficients: tuple[float, float, float] = NEWTON_SCHULZ,
        ns_steps: int = NEWTON_SCHULZ_STEPS,
        batched: bool = True,
        maximize: bool = False,
        check_finite: bool = True,
    ):
        check_range("KroneckerNG", momentum=(momentum, 1), weight_decay=(weight_decay, math.inf))
        check_range("KroneckerNG", alpha=(alpha, 1), eps=(eps, math.inf), diagonal_momentum=(diagonal_momentum, 1))
        check_range("KroneckerNG", factor_decay=(factor_decay or 0.0, 1), refresh_above=(refresh_above, 1))
        choices = {"variant": VARIANTS, "adjust_lr_fn": ADJUSTMENTS, "products": PRODUCTS}
        for name, value in {"variant": variant, "adjust_lr_fn": adjust_lr_fn, "products": products}.items():
            if value not in choices[name]:
                raise ConfigError(f"KroneckerNG: {name}={value!r}; choose one of {', '.join(choices[name])}")
        if refresh < 1 or max_dim < 1 or not max_aspect >= 1 or not 0 < ns_steps < 100 or len(ns_coefficients) != 3:
            raise ConfigError(
                f"KroneckerNG: refresh={refresh}, max_dim={max_dim}, max_aspect={max_aspect} must be at least 1, "
                f"ns_steps={ns_steps} in [1, 99], ns_coefficients={ns_coefficients} three numbers"
            )
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "alpha": alpha, "eps": eps,
            "diagonal_momentum": diagonal_momentum, "method": "kron", "variant": variant, "factor_decay": factor_decay,
            "refresh": refresh, "refresh_above": refresh_above, "max_dim": max_dim, "max_aspect": max_aspect,
            "products": products, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn, "ns_steps": ns_steps,
            "ns_coefficients": tuple(ns_coefficients), "batched": batched, "maximize": maximize,
            "check_finite": check_finite,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except ConfigError:
            self.param_groups.pop()
            raise

    def _advance(self, logits: Any, targets: Any, curvature: Any) -> None:
        for group in self.param_groups:
            if group["method"] == "diag":
                diagonal = {**group, "momentum": group["diagonal_momentum"], "power": 0.5}
                diagonal_step(group["params"], self.state, diagonal)
            else:
                kronecker_step(group["params"], self.state, group)

    def _largest_norm(self) -> float:
        whitened = any(g["method"] == "kron" and g["variant"] in WHITENED for g in self.param_groups)
        return LARGEST_NORM if whitened else math.inf

    def _fishers(self) -> list[Tensor]:
        values = [s for s in self.state.values() if "left_values" in s]
        return super()._fishers() + [torch.outer(s["left_values"], s["right_values"]) for s in values]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["method"] = OLD_NAMES.get(group["method"], group["method"])


def _check_group(group: dict[str, Any]) -> None:
    if group["method"] not in ("kron", "diag"):
        raise ConfigError(f"KroneckerNG: method {group['method']!r}; choose kron or diag")
    if group["variant"] not in VARIANTS:
        raise ConfigError(f"KroneckerNG: variant={group['variant']!r}; choose one of {', '.join(VARIANTS)}")
    for p in group["params"] if group["method"] == "kron" else ():
        if p.dim() != 2:
            raise ConfigError(f"KroneckerNG: shape {tuple(p.shape)} is no matrix; give it method=diag")
        if p.is_complex() or hasattr(p, "full_tensor"):
            raise ConfigError(f"KroneckerNG: {type(p).__name__} of {p.dtype} has no Kronecker step; use method=diag")


def kronecker_step(params: Sequence[Tensor], state: Any, group: dict[str, Any]) -> None:
    """One step of `group["variant"]` on those of the matrices `params` that have a gradient.

    Of `group` only lr is needed; the other options are KroneckerNG's, with its defaults.
    """
    group = {**KRON, **group}
    params = [p for p in params if p.grad is not None]
    if group["variant"] in WHITENED:
        whitened_step(params, state, group)
        return
    shapes: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
    for p in params:
        shapes.setdefault((p.shape, p.device), []).append(p)
    for members in shapes.values():
        _muon(members, state, group)


def _muon(members: list[Tensor], state: Any, group: dict[str, Any]) -> None:
    """The formula of this file on matrices of one shape."""
    lr, mu, shape = float(group["lr"]), group["momentum"], members[0].shape
    for p in members:
        if "momentum" not in state[p]:
            state[p]["momentum"] = torch.zeros_like(p, dtype=torch.float32)
    momenta = [state[p]["momentum"] for p in members]
    grads = [p.grad.float() for p in members if p.grad is not None]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    torch._foreach_lerp_(momenta, grads, 1 - mu)
    directions = list(torch._foreach_lerp(grads, momenta, mu)) if group["nesterov"] else momenta
    newton_schulz = tuple(group["ns_coefficients"]), group["ns_steps"]
    if group["batched"]:
        parts = list(polar(torch.stack(directions), *newton_schulz).float().unbind())
    else:
        parts = [polar_single(d, *newton_schulz) for d in directions]
    if group["adjust_lr_fn"] == "original":
        length = math.sqrt(max(1, shape[0] / shape[1]))
    else:
        length = 0.2 * math.sqrt(max(shape))
    if group["weight_decay"]:
        torch._foreach_mul_(members, 1 - lr * group["weight_decay"])
    torch._foreach_add_(members, parts, alpha=-lr * length)
