"""What every optimizer of the family does around its formula, so that the siblings hold formulas alone.

Closures    evaluated with gradients on; they return the loss or (loss, logits)
GradScaler  its scale is divided out of the gradients; `found_inf` skips the step
Damage      one NaN or infinity in a gradient skips the whole step: parameters and state stay, the outcome is
            `optimizer.outcome == "skipped"`, counted in `get_stats()`
State       float32 under half-precision parameters, also after `load_state_dict`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from inspect import unwrap
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from constellation.errors import ConfigError


def check_range(who: str, **settings: tuple[Any, float]) -> None:
    """Each setting (value, highest) must be finite and within [0, highest]; a tensor must hold one element."""
    for name, (value, high) in settings.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ConfigError(f"{who}: Tensor {name} must be 1-element, this one has shape {tuple(value.shape)}")
        number = float(value.detach() if isinstance(value, Tensor) else value)
        if not 0 <= number <= high or number == math.inf:
            raise ConfigError(f"{who}: {name}={value} must be finite and lie in [0, {high}]")


def state_like(p: Tensor) -> Tensor:
    """Zeros of the shape of `p`, float32 or wider."""
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))


def finite(tensors: Sequence[Tensor], largest: float = math.inf) -> bool:
    """Whether every entry is finite: one read for the norm; only where that overflows, entry by entry.

    With `largest`, whether the norm is below it.
    """
    kinds = {(t.device, t.dtype) for t in tensors}
    alike = [[t for t in tensors if (t.device, t.dtype) == kind] for kind in kinds] if len(kinds) > 1 else [tensors]
    return all(
        float(torch.stack(torch._foreach_norm(same)).sum()) < largest  # type: ignore[arg-type]
        or (largest == math.inf and all(bool(torch.isfinite(t).all()) for t in same))
        for same in alike
    )


def curvature_stats(fishers: Iterable[Tensor], damping: float) -> dict[str, float]:
    """Mean and standard deviation of the entries F_i, and condition number max(F + damping) / min(F + damping)."""
    entries = [f.detach().flatten().double() for f in fishers if f.numel()]
    if not entries:
        return {}
    f = torch.cat([e.cpu() for e in entries])
    low, high = float(f.min()) + damping, float(f.max()) + damping
    return {
        "fisher_mean": float(f.mean()),
        "fisher_std": float(f.std(correction=0)),
        "condition_number": high / low if low > 0 else math.inf,
    }


OLD_OPTIONS = {"alpha": "fisher_decay", "eps": "damping"}  # of options, in states of the first release
GONE_OPTIONS = ("compile",)  # they had these too


def renamed(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a saved group under the names of today; those of torch's AdamW (betas, eps) are torch's."""
    if "betas" in group:
        return group
    return {OLD_OPTIONS.get(name, name): value for name, value in group.items() if name not in GONE_OPTIONS}


def wants(optimizer: torch.optim.Optimizer, known: Sequence[str]) -> tuple[str, ...]:
    """Keywords that `optimizer.step` is to be given, of those in `known`; ConfigError when it wants another."""
    names: tuple[str, ...] = getattr(optimizer, "wants", ())
    for name in names:
        if name not in known:
            raise ConfigError(f"{type(optimizer).__name__}: step wants {name!r}; it can be told {', '.join(known)}")
    return names


def may_inherit(optimizer: torch.optim.Optimizer, saved: Sequence[dict[str, Any]]) -> bool:
    """Whether state that was saved beside the param groups `saved` means the same to `optimizer`.

    It does where the parameters are divided alike, the options named in `optimizer.state_kind` are equal, and no
    option of the saved groups is unknown to it (those younger than the state are its own).
    """
    names: tuple[str, ...] = getattr(optimizer, "state_kind", ())
    saved = [renamed(group) for group in saved]

    def kind(groups: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return [(len(group["params"]), *(group.get(name) for name in names)) for group in groups]

    return kind(saved) == kind(optimizer.param_groups) and set(saved[0]) <= set(optimizer.param_groups[0])


class Evidence(NamedTuple):
    """What a step is told of the likelihood beside gradients; an optimizer that has no use for it leaves it."""

    logits: Tensor | Callable[[], Tensor] | None = None  # (..., V) with their graph alive, or what makes them
    targets: Tensor | None = None  # of those logits
    curvature: Any = None  # of the parameters, where it is known
    jacobian: Tensor | Callable[[], Tensor] | None = None  # d logits / d parameters (..., V, P), where it is known


class NaturalOptimizer(torch.optim.Optimizer):
    """Abstract: a sibling gives `_advance`, the update of parameters whose gradients are in order.

    wants       keywords that a training loop is to give `step`: logits and targets of a part of the batch, telemetry
    state_kind  options of a param group that say what its state holds; where they differ it cannot be inherited
    """

    wants: ClassVar[tuple[str, ...]] = ()
    state_kind: ClassVar[tuple[str, ...]] = ()

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf
    _stepping = False
    # torch's own, but for the wrapper that imports its compiler: a second of every process that trains
    _add = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    _load = unwrap(torch.optim.Optimizer.load_state_dict)

    def __init__(self, params: Any, defaults: dict[str, Any]):
        check_range(type(self).__name__, lr=(defaults["lr"], math.inf))
        self._natural_steps = self._skipped_steps = 0
        self._outcome = "none"
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's; complex parameters are refused."""
        self._add(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                self.param_groups.pop()
                raise ConfigError(
                    f"{type(self).__name__}: a parameter of shape {tuple(p.shape)} is {p.dtype}, and no step here is"
                    " defined for complex numbers; keep it as two real ones, torch.view_as_real(p)"
                )

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's hooks around a step, once: a step that calls its parent's is one step."""
        hooked = torch.optim.Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: NaturalOptimizer, *args: Any, **kwargs: Any) -> Any:
            if self._stepping:
                return func(self, *args, **kwargs)
            self._stepping = True
            try:
                return hooked(self, *args, **kwargs)
            finally:
                self._stepping = False

        return step

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        logits: Tensor | Callable[[], Tensor] | None = None,
        targets: Tensor | None = None,
        curvature: Any = None,
        jacobian: Tensor | Callable[[], Tensor] | None = None,
    ) -> Any:
        """One step; returns the closure's loss. The keywords are for optimizers that see the likelihood.

        logits     (..., V) with their graph alive, or a callable that makes them, or what closure() -> (loss, logits)
                   returns. A callable may take a part of the batch: F is then that part's, cheaper, and knows less, so
                   that damping must be larger. It must run the module itself, not its compiled form, and is run
                   without fused attention, neither of which can be differentiated twice
        targets    of those logits: to leave out rows of -100, for the kinds that need them, to measure the loss
        curvature  as the optimizer says, where it is known from elsewhere
        jacobian   d logits / d parameters (..., V, P), or a callable, where known (fisher.jacobian_rows); one group
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if isinstance(loss, tuple):
                loss, logits = loss
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            if self._in_order():
                self._advance(Evidence(logits, targets, curvature, jacobian))
                self._outcome, self._natural_steps = "stepped", self._natural_steps + 1
            else:
                self._outcome, self._skipped_steps = "skipped", self._skipped_steps + 1
        return loss

    def _advance(self, seen: Evidence) -> None:
        raise NotImplementedError

    def _in_order(self) -> bool:
        """Gradients unscaled; False when they must not be followed."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(g.layout is not torch.strided for g in grads):
            raise ConfigError(f"{type(self).__name__}: sparse gradients are not supported; make the layer dense")
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf) > 0:
            return False
        if scale is not None:
            for g in grads:
                g.div_(scale.to(g.device))
        if not self.defaults.get("check_finite", True) or self.defaults.get("capturable", False):
            return True  # a CUDA graph cannot decide
        return not grads or finite(grads, self._largest_norm())

    def _largest_norm(self) -> float:
        """Gradients of this norm or more cannot be followed."""
        return math.inf

    @property
    def outcome(self) -> str:
        """Of the last step: none, stepped or skipped."""
        return self._outcome

    def get_stats(self) -> dict[str, float]:
        """Plain numbers, computed when asked: of the curvature held, and of the steps this process made."""
        return {
            **curvature_stats(self._fishers(), float(self.defaults.get("damping", 0.0))),
            "natural_steps": float(self._natural_steps),
            "ng_applications": float(self._natural_steps),
            "skipped_steps": float(self._skipped_steps),
        }

    def _fishers(self) -> list[Tensor]:
        return [s["fisher"] for s in self.state.values() if "fisher" in s]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but state keeps the dtype in which it was saved instead of taking its parameter's."""
        self._load(state_dict)
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, p in zip(ids, params, strict=True):
            for key, saved in state_dict["state"].get(i, {}).items():
                loaded = self.state[p][key]
                if isinstance(saved, Tensor) and saved.dtype != loaded.dtype:
                    self.state[p][key] = saved.to(loaded.device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = dict(state.get("defaults", self.__dict__.get("defaults", {})))  # torch adds to them
        if "param_groups" in state:
            state = {**state, "param_groups": [renamed(group) for group in state["param_groups"]]}
        super().__setstate__(state)
        for name, value in {"_natural_steps": 0, "_skipped_steps": 0, "_outcome": "none"}.items():
            self.__dict__.setdefault(name, value)
        for group in self.param_groups:
            for name, value in defaults.items():  # options younger than the state
                group.setdefault(name, value)
        for entry in self.state.values():
            if "step" in entry and not isinstance(entry["step"], Tensor):
                entry["step"] = torch.tensor(float(entry["step"]), dtype=torch.float32)
