"""CurvatureScaledSGD: gradient descent with a learning rate of its own for every parameter.

    c_i   a curvature diagonal (curvature.py), refreshed every few steps and smoothed, C <- s C + (1 - s) c
    m_i   = max(|C_i|, floor, trust * stderr_i)       magnitude; what is below its own error counts as its error
    lr_i  = clip(lr (m_i + damping)^-q, lr_min, lr_max)
    b_i   <- momentum b_i + g_i                        theta_i <- (1 - lr wd) theta_i - lr_i b_i

q = 1/2 is the original design's rate and turns condition number k into sqrt(k); q = 1 with lr = 1 is Newton's method
for a diagonal Hessian, |C| keeps it descending at negative curvature (Dauphin et al. 2014). lr carries the unit that q
leaves over, theta per gradient times curvature^q. Every param group is a block with its own q, floors and clips.

    step()                          source = "ema_grad2" looks at the gradients alone
    step(logits=..., targets=...)   the other three, of the mean cross-entropy; logits may be a callable
    step(curvature=...)             any Curvature of the source's unit, or a callable that makes one when it is due
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.geometry.fisher import twice_differentiable
from constellation.optim import precond
from constellation.optim.curvature import UNITS, Curvature, ema_grad2, from_likelihood
from constellation.optim.kinds import decayed
from constellation.optim.natural import Evidence, check_range, finite, state_like
from constellation.optim.registry import ScaledSettings

SEED_STRIDE = 1_000_003  # seeds of two runs meet after as many steps
_TINY = 1e-30  # a curvature of 0 with damping = 0 has a long step, not an infinite one


class CurvatureScaledSGD(precond.Scaled):
    """State per parameter: `step`, `looks`, `scale` = (m + damping)^-q, the curvature held and, if any, `momentum`."""

    wants = ("logits", "targets")
    state_kind = ("source",)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        exponent: float = 0.5,  # q
        *,
        source: str = "ema_grad2",
        momentum: float = 0.0,
        weight_decay: float = 0.0,  # decoupled
        damping: float = 1e-12,  # unit of the curvature
        floor: float = 0.0,  # least curvature, same unit
        trust: float = 1.0,  # standard errors a curvature counts at least; 0: errors are ignored
        lr_min: float = 0.0,
        lr_max: float = math.inf,
        refresh: int | None = None,  # steps between looks; 0: the first look stays; None: 1 for ema_grad2, else 20
        smooth: float | None = None,  # s; None: 0.99 for ema_grad2, 0.5 for the others
        probes: int = 8,
        seed: int = 0,
        maximize: bool = False,
        check_finite: bool = True,
    ):
        defaults = {
            "lr": lr, "exponent": exponent, "source": source, "momentum": momentum, "weight_decay": weight_decay,
            "damping": damping, "floor": floor, "trust": trust, "lr_min": lr_min, "lr_max": lr_max, "refresh": refresh,
            "smooth": smooth, "probes": probes, "seed": seed, "maximize": maximize, "check_finite": check_finite,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group, who = {**self.defaults, **param_group}, "CurvatureScaledSGD"
        if group["source"] not in UNITS:
            raise ConfigError(f"{who}: source={group['source']!r}; choose one of {', '.join(UNITS)}")
        ema = group["source"] == "ema_grad2"
        refresh = (1 if ema else 20) if group["refresh"] is None else group["refresh"]
        smooth = (0.99 if ema else 0.5) if group["smooth"] is None else group["smooth"]
        check_range(
            who, **{n: (group[n], math.inf) for n in ("lr", "weight_decay", "damping", "floor", "trust", "lr_min")}
        )
        check_range(who, exponent=(group["exponent"], 1), momentum=(group["momentum"], 1), smooth=(smooth, 1))
        if not group["lr_min"] <= group["lr_max"]:
            raise ConfigError(f"{who}: lr_min={group['lr_min']} must not exceed lr_max={group['lr_max']}")
        if refresh < 0 or group["probes"] < 2:
            raise ConfigError(f"{who}: refresh={refresh}, probes={group['probes']}; at least 0 and 2")
        super().add_param_group({**param_group, "refresh": refresh, "smooth": smooth})

    def _advance(self, seen: Evidence) -> None:
        blocks = [(g, [p for p in g["params"] if p.grad is not None]) for g in self.param_groups]
        due = [(group, params) for group, params in blocks if params and self._is_due(group, params)]
        looked = [(group, params) for group, params in due if group["source"] != "ema_grad2"]
        if looked:
            self._look(looked, seen)
        for group, params in blocks:
            if not params:
                continue
            grads = [p.grad.to(torch.promote_types(p.dtype, torch.float32)) for p in params if p.grad is not None]
            if group["maximize"]:
                grads = list(torch._foreach_neg(grads))
            if group["source"] == "ema_grad2":
                self._average(params, grads, group["smooth"])
            if any(group is g for g, _ in due):
                self.rescale(group, params)
            self._move(group, params, grads)

    def _is_due(self, group: dict[str, Any], params: list[Tensor]) -> bool:
        for p in params:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
        step, every = int(self.state[params[0]]["step"]), group["refresh"]
        return bool(every and step and step % every == 0) or any("scale" not in self.state[p] for p in params)

    def _look(self, blocks: list[Any], seen: Evidence) -> None:
        """New curvature of the blocks that are due, smoothed into the one held.

        It is `seen.curvature`, a Curvature over all parameters in order or a callable that makes it, or is measured.
        """
        logits, curvature = seen.logits, seen.curvature
        if curvature is None and logits is None:
            raise ConfigError(
                f"source={blocks[0][0]['source']!r} is due a look: pass step(logits=..., targets=...) or curvature=..."
            )
        with torch.enable_grad(), twice_differentiable():
            given = curvature() if callable(curvature) else curvature
            rows: Any = logits() if given is None and callable(logits) else logits
        order = [p for g in self.param_groups for p in g["params"]]
        for group, params in blocks:
            if given is None:
                seed = SEED_STRIDE * group["seed"] + int(self.state[params[0]]["step"])
                with torch.enable_grad():
                    found = from_likelihood(
                        group["source"], rows, seen.targets, params, probes=group["probes"], seed=seed
                    )
                pairs = list(zip(found.diagonal, found.stderr, strict=True))
            else:
                found = self._checked(given, group, order)
                at = {
                    id(p): pair for p, pair in zip(order, zip(found.diagonal, found.stderr, strict=True), strict=True)
                }
                pairs = [at[id(p)] for p in params]
            if not finite([diagonal for diagonal, _ in pairs]):
                raise ConfigError(f"curvature {found.kind} is not finite; look at the logits it was made of")
            for p, (diagonal, stderr) in zip(params, pairs, strict=True):
                s, keep = self.state[p], group["smooth"]
                if "curvature" not in s:
                    s["looks"] = torch.ones((), dtype=torch.float32)
                    s["curvature"], s["stderr"] = (t.to(state_like(p), copy=True) for t in (diagonal, stderr))
                else:  # errors of two looks are independent
                    s["looks"] += 1
                    s["curvature"].lerp_(diagonal.to(s["curvature"]), 1 - keep)
                    s["stderr"] = torch.hypot(s["stderr"] * keep, stderr.to(s["stderr"]) * (1 - keep))

    def _checked(self, given: Curvature, group: dict[str, Any], order: list[Tensor]) -> Curvature:
        if given.units != UNITS[group["source"]]:
            raise ConfigError(
                f"curvature {given.kind} is in {given.units}, source={group['source']!r} in {UNITS[group['source']]};"
                " scale by curvatures of one unit"
            )
        if [t.shape for t in given.diagonal] != [p.shape for p in order]:
            raise ConfigError(f"curvature has {len(given.diagonal)} tensors; one for each of {len(order)} parameters")
        return given

    def _average(self, params: list[Tensor], grads: Any, keep: float) -> None:
        """EMAs of g^2 and g^4."""
        for p in params:
            if "second" not in self.state[p]:
                self.state[p] |= {"looks": torch.zeros(()), "second": state_like(p), "fourth": state_like(p)}
        held = [self.state[p] for p in params]
        squares = torch._foreach_mul(grads, grads)
        for name, powers in (("second", squares), ("fourth", torch._foreach_mul(squares, squares))):
            torch._foreach_lerp_([s[name] for s in held], powers, 1 - keep)
        torch._foreach_add_([s["looks"] for s in held], 1)

    def held(self, group: dict[str, Any], params: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Curvature and standard error of each parameter."""
        if group["source"] != "ema_grad2":
            return [(self.state[p]["curvature"], self.state[p]["stderr"]) for p in params]
        alike: dict[int, list[int]] = {}
        for i, p in enumerate(params):
            alike.setdefault(int(self.state[p]["looks"]), []).append(i)
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for looks, indices in alike.items():
            raw = [[self.state[params[i]][name] for i in indices] for name in ("second", "fourth")]
            found = ema_grad2(raw[0], raw[1], looks, group["smooth"])
            pairs |= dict(zip(indices, zip(found.diagonal, found.stderr, strict=True), strict=True))
        return [pairs[i] for i in range(len(params))]

    def rescale(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """`scale` from the curvature held."""
        pairs = self.held(group, params)
        magnitudes = torch._foreach_abs([c for c, _ in pairs])
        if group["floor"]:
            torch._foreach_clamp_min_(magnitudes, group["floor"])
        if group["trust"]:  # a single look has an infinite error, which says nothing about the curvature
            errors = [torch.where(e.isfinite(), e, 0) for _, e in pairs]
            torch._foreach_mul_(errors, group["trust"])
            torch._foreach_maximum_(magnitudes, errors)
        torch._foreach_add_(magnitudes, group["damping"])
        torch._foreach_clamp_min_(magnitudes, _TINY)
        torch._foreach_pow_(magnitudes, -group["exponent"])
        for p, scale in zip(params, magnitudes, strict=True):
            self.state[p]["scale"] = scale

    def _rates(self, group: dict[str, Any], params: list[Tensor]) -> Any:
        rates = torch._foreach_mul([self.state[p]["scale"] for p in params], float(group["lr"]))
        if group["lr_min"]:
            torch._foreach_clamp_min_(rates, group["lr_min"])
        if group["lr_max"] < math.inf:
            torch._foreach_clamp_max_(rates, group["lr_max"])
        return rates

    def _move(self, group: dict[str, Any], params: list[Tensor], directions: list[Tensor]) -> None:
        if group["momentum"]:
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = state_like(p)
            buffers = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, directions)
            directions = buffers
        delta = torch._foreach_mul(self._rates(group, params), directions)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - float(group["lr"]) * group["weight_decay"])
        torch._foreach_add_(params, delta, alpha=-1)
        torch._foreach_add_([self.state[p]["step"] for p in params], 1)

    def learning_rates(self) -> list[Tensor]:
        """lr_i of every parameter in order, as the next step would use them; zeros before the first look."""
        return [
            self._rates(group, [p])[0] if "scale" in self.state.get(p, {}) else state_like(p)
            for group in self.param_groups
            for p in group["params"]
        ]

    def _fishers(self) -> list[Tensor]:
        """The curvature held, for get_stats()."""
        return [c for group, params in self._looked_at() for c, _ in self.held(group, params)]

    def _looked_at(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        return [(g, [p for p in g["params"] if "scale" in self.state.get(p, {})]) for g in self.param_groups]

    def save_preconditioner(self, path: str | Path) -> Path:
        """precond.npz and its JSON (optim/precond.py); returns the file."""
        return precond.save(self, path)

    def load_preconditioner(self, path: str | Path) -> None:
        """Take the curvature saved in `path`; the rates follow from it and from this optimizer's own settings.

        ArtifactError when the file is damaged or was saved for other parameters or another source.
        """
        precond.load(self, path)


def build(settings: ScaledSettings, model: torch.nn.Module) -> CurvatureScaledSGD:
    s = settings
    lr = s.lr * (1 - s.momentum)  # momentum sums gradients here, `lr` is meant for their average
    return CurvatureScaledSGD(
        decayed(model, s.weight_decay), lr, s.exponent, source=s.curvature, damping=s.damping, momentum=s.momentum,
        refresh=s.refresh, probes=s.probes,
    )  # fmt: skip
