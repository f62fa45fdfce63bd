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
rate serves all groups. Matrices of one shape are stacked and iterated together. Tried without gain: q, k and v, or
gate and up, factored apart instead of as the one weight they are stored in.

method   of a group
auto     each parameter by its kind (kinds.py): matrices and convolutions by kron, the others by diag
kron     Kronecker factors of a parameter's first axis and of all others together
diag     DiagonalNG's step at power 1/2
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from constellation import processor
from constellation.errors import ConfigError
from constellation.optim.elementwise import diagonal_step
from constellation.optim.kinds import is_rowwise, kinds_of, matrix_shape
from constellation.optim.natural import Evidence, NaturalOptimizer, check_range
from constellation.optim.polar import NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, polar, polar_single, polars
from constellation.optim.registry import KroneckerSettings
from constellation.optim.whiten import WHITENED, whitened_step

__all__ = ["KroneckerNG", "kronecker_step", "polar"]

VARIANTS = ("muon", *WHITENED)
ADJUSTMENTS = ("match_rms_adamw", "original")
PRODUCTS = ("full", "bfloat16")
PRECISIONS = ("auto", "fp32", "bf16")
METHODS = ("auto", "kron", "diag")
OLD_NAMES = {"kronecker": "kron", "diagonal": "diag"}  # in checkpoints of the first release
LARGEST_NORM = 1e18  # of a gradient whose square is averaged in float32
KRON: dict[str, Any] = {
    "variant": "muon", "momentum": 0.95, "weight_decay": 0.0, "fisher_decay": 0.95, "damping": 1e-8,
    "factor_decay": None, "refresh": 10, "refresh_above": 0.0, "max_dim": 1024, "max_aspect": 2.0,
    "products": "full", "nesterov": True,
    "adjust_lr_fn": "match_rms_adamw", "ns_coefficients": NEWTON_SCHULZ, "ns_steps": NEWTON_SCHULZ_STEPS,
    "ns_precision": "auto", "batched": True, "maximize": False,
}  # fmt: skip


class KroneckerNG(NaturalOptimizer):
    """`params` is a model, its parameters, its named parameters, or groups that may say their `method`.

    With names, embeddings and heads go by the diagonal; with a model they are known without names too (kinds.py).
    ns_precision="auto" is decided when a group is added, by the device of its parameters, and saved with it.
    batched=False goes matrix by matrix; at ns_precision="bf16" rounding as torch.optim.Muon, its trajectory to the bit.
    State is float32.
    """

    state_kind = ("method", "variant")
    _model: torch.nn.Module | None = None  # while it is looked at

    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,  # mu and b1 of the Kronecker groups
        weight_decay: float = 0.0,
        fisher_decay: float = 0.95,  # b2: of V, l and r, and of the diagonal groups' F
        damping: float = 1e-8,  # lambda, unit of the gradient
        diagonal_momentum: float = 0.9,
        *,
        variant: str = "muon",
        factor_decay: float | None = None,  # d of L and R; None: fisher_decay
        refresh: int = 10,  # steps between two looks at the bases
        refresh_above: float = 0.0,  # a basis is left alone while its off-diagonal part is at most this, [0, 1]
        max_dim: int = 1024,  # sides longer than this, or than max_aspect times the other, get no factor
        max_aspect: float = 2.0,
        products: str = "full",  # of factors and bases; bfloat16 is several times faster where processors have it
        nesterov: bool = True,
        adjust_lr_fn: str = "match_rms_adamw",  # 0.2 sqrt(max(r, c)); original: sqrt(max(1, r / c))
        ns_coefficients: tuple[float, float, float] = NEWTON_SCHULZ,
        ns_steps: int = NEWTON_SCHULZ_STEPS,
        ns_precision: str = "auto",  # of Newton-Schulz products: fp32 | bf16 | auto: bf16 where it is no emulation
        batched: bool = True,
        maximize: bool = False,
        check_finite: bool = True,
    ):
        check_range("KroneckerNG", momentum=(momentum, 1), weight_decay=(weight_decay, math.inf))
        check_range(
            "KroneckerNG",
            fisher_decay=(fisher_decay, 1),
            damping=(damping, math.inf),
            diagonal_momentum=(diagonal_momentum, 1),
        )
        check_range("KroneckerNG", factor_decay=(factor_decay or 0.0, 1), refresh_above=(refresh_above, 1))
        if refresh < 1 or max_dim < 1 or not max_aspect >= 1 or not 0 < ns_steps < 100 or len(ns_coefficients) != 3:
            raise ConfigError(
                f"KroneckerNG: refresh={refresh}, max_dim={max_dim}, max_aspect={max_aspect} must be at least 1, "
                f"ns_steps={ns_steps} in [1, 99], ns_coefficients={ns_coefficients} three numbers"
            )
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "fisher_decay": fisher_decay,
            "damping": damping, "diagonal_momentum": diagonal_momentum, "method": "auto",
            "variant": variant, "factor_decay": factor_decay,
            "refresh": refresh, "refresh_above": refresh_above, "max_dim": max_dim, "max_aspect": max_aspect,
            "products": products, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn, "ns_steps": ns_steps,
            "ns_coefficients": tuple(ns_coefficients), "ns_precision": ns_precision, "batched": batched,
            "maximize": maximize, "check_finite": check_finite,
        }  # fmt: skip
        self._model = params if isinstance(params, torch.nn.Module) else None
        super().__init__(params.named_parameters() if isinstance(params, torch.nn.Module) else params, defaults)
        self._model = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            if group["method"] == "auto":
                group["methods"] = kinds_of(group["params"], group.get("param_names"), self._model)
            _check_matrices([p for p, m in zip(group["params"], _methods(group), strict=True) if m == "kron"])
        except ConfigError:
            self.param_groups.pop()
            raise
        group["ns_precision"] = settled(group["ns_precision"], group["params"])

    def _advance(self, seen: Evidence) -> None:
        for group in self.param_groups:
            parts: dict[str, list[Tensor]] = {"kron": [], "diag": []}
            for p, method in zip(group["params"], _methods(group), strict=True):
                parts[method].append(p)
            diagonal_step(parts["diag"], self.state, {**group, "momentum": group["diagonal_momentum"], "power": 0.5})
            kronecker_step(parts["kron"], self.state, group)

    def _largest_norm(self) -> float:
        whitened = any("kron" in _methods(g) and g["variant"] in WHITENED for g in self.param_groups)
        return LARGEST_NORM if whitened else math.inf

    def _fishers(self) -> list[Tensor]:
        values = [s for s in self.state.values() if "left_values" in s]
        return super()._fishers() + [torch.outer(s["left_values"], s["right_values"]) for s in values]

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state.get("param_groups", ()):
            group.setdefault("ns_precision", "bf16")  # of states older than the option
        super().__setstate__(state)
        for group in self.param_groups:
            group["method"] = OLD_NAMES.get(group["method"], group["method"])


def build(settings: KroneckerSettings, model: torch.nn.Module) -> KroneckerNG:
    """Linear weights by Kronecker factors; embeddings, heads and vectors by the diagonal."""
    s, modules = settings, model.named_modules()
    matrices = [m.weight for name, m in modules if isinstance(m, torch.nn.Linear) and not is_rowwise(name)]
    taken = {id(p) for p in matrices}
    groups = [
        {"params": matrices, "method": "kron", "weight_decay": s.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in taken], "method": "diag", "weight_decay": 0.0},
    ]
    return KroneckerNG(
        groups, lr=s.lr, momentum=s.kronecker_momentum, fisher_decay=s.fisher_decay, damping=s.damping,
        diagonal_momentum=s.momentum, variant=s.variant, ns_precision=s.ns_precision,
    )  # fmt: skip


def settled(precision: str, params: Sequence[Tensor]) -> str:
    """ "auto" by what the devices of all `params` have instructions for."""
    if precision != "auto":
        return precision
    fast = all(processor.fast_bf16(kind) for kind in {p.device.type for p in params})
    return "bf16" if fast else "fp32"


def _methods(group: dict[str, Any]) -> Sequence[str]:
    """kron or diag for each parameter of the group."""
    return group["methods"] if group["method"] == "auto" else [group["method"]] * len(group["params"])


def _check_group(group: dict[str, Any]) -> None:
    choices = {
        "method": METHODS, "variant": VARIANTS, "adjust_lr_fn": ADJUSTMENTS, "products": PRODUCTS,
        "ns_precision": PRECISIONS,
    }  # fmt: skip
    for name, known in choices.items():
        if group[name] not in known:
            raise ConfigError(f"KroneckerNG: {name}={group[name]!r}; choose one of {', '.join(known)}")


def _check_matrices(params: Sequence[Tensor]) -> None:
    for p in params:
        if p.dim() < 2:
            raise ConfigError(f"KroneckerNG: shape {tuple(p.shape)} is no matrix; give it method=diag or auto")
        if hasattr(p, "full_tensor"):
            raise ConfigError(f"KroneckerNG: {type(p).__name__} of {p.dtype} has no Kronecker step; use method=diag")


def kronecker_step(params: Sequence[Tensor], state: Any, group: dict[str, Any]) -> None:
    """One step of `group["variant"]` on those of the matrices `params` that have a gradient.

    Of `group` only lr is needed; the other options are KroneckerNG's, with its defaults.
    """
    group = {**KRON, **group}
    params = [p for p in params if p.grad is not None and p.numel()]
    if not params:
        return
    group["ns_precision"] = settled(group["ns_precision"], params)
    whitened_step(params, state, group) if group["variant"] in WHITENED else _muon(params, state, group)


def _muon(params: list[Tensor], state: Any, group: dict[str, Any]) -> None:
    """The formula of this file."""
    lr, mu = float(group["lr"]), group["momentum"]
    for p in params:
        if "momentum" not in state[p]:
            state[p]["momentum"] = torch.zeros_like(p, dtype=torch.float32)
    momenta = [state[p]["momentum"] for p in params]
    grads = [p.grad.float() for p in params if p.grad is not None]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    torch._foreach_lerp_(momenta, grads, 1 - mu)
    directions = list(torch._foreach_lerp(grads, momenta, mu)) if group["nesterov"] else momenta
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    alike: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for i, p in enumerate(params):
        alike.setdefault((p.shape, p.device), []).append(i)
    matrices = [[directions[i].reshape(matrix_shape(shape)) for i in some] for (shape, _), some in alike.items()]
    newton_schulz = tuple(group["ns_coefficients"]), group["ns_steps"], group["ns_precision"]
    if group["batched"]:
        parts = [list(stack.float().unbind()) for stack in polars([torch.stack(m) for m in matrices], *newton_schulz)]
    else:
        parts = [[polar_single(matrix, *newton_schulz) for matrix in some] for some in matrices]
    for (shape, _), some, part in zip(alike, alike.values(), parts, strict=True):
        rows, columns = matrix_shape(shape)
        original = group["adjust_lr_fn"] == "original"
        length = math.sqrt(max(1, rows / columns)) if original else 0.2 * math.sqrt(max(rows, columns))
        torch._foreach_add_([params[i] for i in some], [t.reshape(shape) for t in part], alpha=-lr * length)
