"""AdaptiveMixedQIG: a gate decides at every step whether the basin block gets its natural step.

    open    the basin block by its natural method (exact or diag), the rest by theirs: HybridGeometricOptimizer
    closed  the basin block joins the group of the rest it would be in without a block: the cheap optimizer

The rules are gate.py's. What they need and the caller does not tell is measured here: kappa_eff by a Fisher product
every `kappa_every` steps, the angle by which the mean gradient of the block has turned since the last natural step,
predicted and actual reduction, seconds. `max_overhead` is a budget for the whole run: a natural step whose expected
seconds would exceed it is refused, whatever asked for it, and before the first was timed it is expected to cost a
gradient for each of its cg_iters products. Decisions under a budget follow the clock, so runs that must repeat
themselves bit for bit on any machine set max_overhead=0 or bring a `clock` of their own.

    decision = optimizer.should_apply_ng(telemetry, step)       or step(telemetry={...}) alone
    loss.backward(create_graph=decision)                        retain_graph=True is enough, a logits callable better
    optimizer.step(logits=...)
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.geometry.fisher import FisherBlock, flatten, twice_differentiable
from constellation.optim.gate import AdaptiveConfig, GateDecision, should_apply_ng
from constellation.optim.gate_costs import GateCosts
from constellation.optim.mixed import HybridGeometricOptimizer, arguments
from constellation.optim.natural import Evidence, state_like
from constellation.optim.registry import SCHEDULED, AdaptiveSettings, PhaseSchedule, phase_settings

MEAN_DECAY = 0.9  # of the gradient whose turning is watched


class AdaptiveMixedQIG(HybridGeometricOptimizer):
    """`settings` are HybridGeometricOptimizer's. The gate's memory is in param_groups[0]["gate"], plain numbers."""

    wants = ("logits", "targets", "telemetry")
    decision: GateDecision  # of the last step
    _pending: GateDecision | None  # of the coming one
    _seen: dict[str, Any]  # telemetry told for it
    _ended: float | None  # clock at the end of the last step
    _measuring_s: float

    def __init__(
        self,
        model: Any,
        lr_ng: float = 1e-2,
        lr_rest: float = 1e-3,
        use_exact_ng: bool = False,
        adaptive_config: AdaptiveConfig | None = None,
        *,
        schedule: PhaseSchedule | None = None,  # phases on the way; wants telemetry's "progress", share of the run
        clock: Callable[[], float] = time.perf_counter,  # seconds
        **settings: Any,
    ):
        self.config, self.schedule, self._clock = adaptive_config or AdaptiveConfig(), schedule, clock
        self._forget()
        super().__init__(model, lr_ng, lr_rest, use_exact_ng=use_exact_ng, **settings)
        if "home" not in self.param_groups[0]:
            raise ConfigError("AdaptiveMixedQIG: tagged groups have no cheap home; pass a model or named_parameters()")
        self.param_groups[0]["gate"] = dict(vars(GateCosts()))

    def should_apply_ng(self, telemetry: Mapping[str, Any], step: int | None = None) -> GateDecision:
        """Whether and why the coming step is natural, by which step() then goes. `step` None: its own count."""
        costs = self._costs()
        own = costs.telemetry(self._unmeasured()) | self._staleness()
        decision = should_apply_ng(
            {**own, **{name: value for name, value in telemetry.items() if value is not None}},
            costs.steps if step is None else step,
            self._gate(telemetry),
        )
        self._pending, self._seen = decision, dict(telemetry)
        return decision

    def _gate(self, telemetry: Mapping[str, Any]) -> AdaptiveConfig:
        """The rules in force: the configured ones, with the row of a scheduled phase."""
        if self.schedule is None:
            return self.config
        if telemetry.get("progress") is None:
            raise ConfigError('AdaptiveMixedQIG: a schedule of phases needs telemetry={"progress": share of the run}')
        return dataclasses.replace(self.config, **phase_settings(self.schedule.at(float(telemetry["progress"]))))

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        logits: Tensor | Callable[[], Tensor] | None = None,
        targets: Tensor | None = None,
        curvature: Any = None,
        jacobian: Tensor | Callable[[], Tensor] | None = None,
        telemetry: Mapping[str, Any] | None = None,
    ) -> Any:
        """One step as decided, or with `telemetry` decided now; its "loss", or the closure's, measures reductions."""
        loss: Any = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if isinstance(loss, tuple):
                loss, logits = loss
        if telemetry is not None:
            self._seen, self._pending = dict(telemetry), None
        if loss is not None:
            self._seen.setdefault("loss", float(loss.detach() if isinstance(loss, Tensor) else loss))
        began, costs = self._now(), self._costs()
        costs.note_gap(None if self._ended is None else began - self._ended)
        if self._seen.get("loss") is not None:
            costs.note_loss(float(self._seen["loss"]))
        self._remember(costs)
        self._measuring_s = 0.0
        super().step(logits=_once(logits), targets=targets, jacobian=jacobian)
        costs = self._costs()
        if self._outcome == "stepped":
            self._ended = self._now()
            predicted = self._block.stats.get("predicted_reduction") if self.decision.apply else None
            costs.note_step(self.decision.apply, self._ended - began - self._measuring_s, predicted)
            costs.refused_steps += bool(self.decision.reasons) and not self.decision.apply
        else:
            costs.steps += 1
            self._ended = None
        self._remember(costs)
        self._pending, self._seen = None, {}
        return loss

    def _advance(self, seen: Evidence) -> None:
        self._measure(seen.logits)
        if self._pending is None:
            self.should_apply_ng(self._seen)
        assert self._pending is not None
        self.decision = self._pending
        basin, *rest = self.param_groups
        if self.decision.apply:
            self._follow(basin, basin["params"], Natural(self.state), seen)
            for group in rest:
                self._follow(group, group["params"], self.state, Evidence())
            self._look_back(basin["params"], natural=True)
            return
        self._look_back(basin["params"], natural=False)
        for number, group in enumerate(rest, start=1):
            joined = [p for p, home in zip(basin["params"], basin["home"], strict=True) if home == number]
            self._follow(group, [*joined, *group["params"]], self.state, Evidence())

    def _measure(self, logits: Any) -> None:
        """kappa_eff from one Fisher product along the gradient, when it is due, affordable and not told."""
        costs, every, limit = self._costs(), self.config.kappa_every, self.config.max_overhead
        told = self._seen.get("kappa_eff") is not None
        if logits is None or told or not every or costs.steps % every:
            return
        expected = costs.measuring_s or costs.gap_s or math.inf  # before the first a gradient's time is assumed
        if limit and costs.overhead_after(expected) > limit:
            return
        began = self._now()
        params = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        with torch.enable_grad():
            rows = logits() if callable(logits) else logits
            block = FisherBlock(rows, params)
            g = flatten([p.grad for p in params if p.grad is not None]).to(block.dtype)
            curved, squared = torch.stack([g @ block.matvec(g), g @ g]).tolist()
        self._measuring_s = self._now() - began
        if squared > 0 and math.isfinite(curved):
            costs.note_curvature(curved / squared, self._measuring_s)
            self._remember(costs)

    def _staleness(self) -> dict[str, float]:
        """Angle between the mean gradient now and at the last natural step, [0, pi]; pi before there was one."""
        if not self.config.max_staleness:
            return {}
        held = [s for p in self.param_groups[0]["params"] if "gate.mean" in (s := self.state.get(p, {}))]
        if not held or "gate.mean_then" not in held[0]:
            return {"staleness_rad": math.pi}
        now, then = (flatten([s[name] for s in held]) for name in ("gate.mean", "gate.mean_then"))
        u, v = (x / torch.linalg.vector_norm(x).clamp(min=1e-30) for x in (now, then))
        return {"staleness_rad": 2 * math.atan2(*torch.stack([(u - v).norm(), (u + v).norm()]).tolist())}

    def _look_back(self, params: list[Tensor], natural: bool) -> None:
        if not self.config.max_staleness:
            return
        for p in params:
            if p.grad is not None:
                mean = self.state[p].setdefault("gate.mean", state_like(p))
                mean.lerp_(p.grad.to(mean.dtype), 1 - MEAN_DECAY)
                if natural:
                    self.state[p]["gate.mean_then"] = mean.clone()

    def _unmeasured(self) -> float:
        """Gradients that a natural step may cost before one was timed."""
        basin = self.param_groups[0]
        return float(basin["cg_iters"]) if basin["method"] == "exact" else 0.0

    def _costs(self) -> GateCosts:
        return GateCosts(**self.param_groups[0]["gate"])

    def _remember(self, costs: GateCosts) -> None:
        self.param_groups[0]["gate"] = dict(vars(costs))

    def _forget(self) -> None:
        """What belongs to this process: the moment the last step ended, and what is told for the next."""
        self.decision = GateDecision(False)
        self._ended = None
        self._pending = None
        self._seen = {}
        self._measuring_s = 0.0

    def _now(self) -> float:
        device = self.param_groups[0]["params"][0].device
        if device.type == "cuda":  # or the clock would time the launch alone
            torch.cuda.synchronize(device)
        return self._clock()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "config" not in self.__dict__:
            self.config, self.schedule, self._clock = AdaptiveConfig(), None, time.perf_counter
            self._forget()

    def _fishers(self) -> list[Tensor]:
        held = [self.state.get(p, {}) for p in self.param_groups[0]["params"]]
        return [s[name] for s in held if (name := NaturalEntry.prefix + "fisher") in s]

    def get_stats(self) -> dict[str, float]:
        """The hybrid's, with natural steps counted over the whole run, their seconds, and the gate's measurements."""
        costs = self._costs()
        natural = float(costs.natural_steps)
        own = {
            "natural_steps": natural, "ng_applications": natural, "refused_steps": float(costs.refused_steps),
            "natural_rate": natural / costs.steps if costs.steps else 0.0, "natural_seconds": costs.natural_s,
            "overhead": costs.overhead,
        }  # fmt: skip
        measured = {"kappa_eff": costs.kappa_eff, "natural_gain": costs.natural_gain, "cheap_gain": costs.cheap_gain}
        return {**super().get_stats(), **own, **{name: v for name, v in measured.items() if v is not None}}


def build(settings: AdaptiveSettings, model: torch.nn.Module) -> AdaptiveMixedQIG:
    schedule = settings.schedule if settings.phase == SCHEDULED else None
    return AdaptiveMixedQIG(model, **arguments(settings), adaptive_config=settings.gate, schedule=schedule)


class Natural:
    """Optimizer state in which the basin block's natural method keeps apart from its cheap one."""

    def __init__(self, state: Any):
        self._state = state

    def __getitem__(self, p: Tensor) -> NaturalEntry:
        return NaturalEntry(self._state[p])


class NaturalEntry(MutableMapping[str, Any]):
    """The entries of one parameter's state that are called "natural.<name>"."""

    prefix = "natural."

    def __init__(self, entry: dict[str, Any]):
        self._entry = entry

    def __getitem__(self, name: str) -> Any:
        return self._entry[self.prefix + name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._entry[self.prefix + name] = value

    def __delitem__(self, name: str) -> None:
        del self._entry[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter([name.removeprefix(self.prefix) for name in self._entry if name.startswith(self.prefix)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __ior__(self, other: Mapping[str, Any]) -> NaturalEntry:
        self.update(other)
        return self


def _once(logits: Any) -> Any:
    """A callable that makes its graph once a step, however many ask: kappa and the natural step share one.

    Without gradients it is asked anew: that is how a step is measured, after the parameters have moved.
    """
    if not callable(logits):
        return logits
    made: list[Tensor] = []

    def rows() -> Tensor:
        if not torch.is_grad_enabled():
            found: Tensor = logits()
            return found
        if not made:
            with twice_differentiable():
                made.append(logits())
        return made[0]

    return rows
