"""Probes: measurements of a run under way, at a cadence of their own and within a share of its time.

    due          steps done % every == 0
    affordable   spent + last <= budget * elapsed     seconds; the first measurement always is, to learn its cost

so that a probe with a budget never takes more of a run than this share and one measurement. What is not affordable
is left out and counted. With budget=None no clock is asked, and two runs measure at the same steps.

A measurement changes no bit of the run: random numbers drawn and gradients left behind by it are undone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from constellation.errors import ConfigError
from constellation.telemetry.training import Resumable, Training


class Probe(Resumable, Protocol):
    """One measurement: the named numbers that `measure` returns."""

    @property
    def name(self) -> str: ...

    @property
    def every(self) -> int:
        """Optimizer steps between two measurements, at least 1."""
        ...

    @property
    def budget(self) -> float | None:
        """Share of the run's seconds that measuring may take, (0, 1]; None: no limit."""
        ...

    def measure(self, training: Training) -> Mapping[str, float]:
        """Numbers by name, of the weights after the step; weights and optimizer are to be left as they are."""
        ...


@dataclass
class Cost:
    """What one probe has taken of the run."""

    spent_s: float = 0.0
    last_s: float | None = None  # of the newest measurement
    skipped: int = 0  # measurements that were due and not affordable


class Probes:
    """All probes of a run; `clock` in seconds."""

    def __init__(self, probes: Sequence[Probe] = (), clock: Callable[[], float] = time.perf_counter):
        for probe in probes:
            if probe.every < 1 or not (probe.budget is None or 0 < probe.budget <= 1):
                raise ConfigError(
                    f"probe {probe.name!r}: every={probe.every} must be at least 1, budget={probe.budget} in (0, 1],"
                    " or None for no limit"
                )
        self._probes = {probe.name: probe for probe in probes}
        if len(self._probes) < len(probes):
            raise ConfigError(f"probes {', '.join(p.name for p in probes)}: each needs a name of its own")
        self.costs = {name: Cost() for name in self._probes}
        self.latest: dict[str, float] = {}
        self._clock, self._elapsed_s = clock, 0.0
        self._last: float | None = None  # clock at the last step of this sitting
        self._absent: dict[str, Any] = {}  # what probes remember that this sitting goes without

    def after(self, training: Training) -> dict[str, float]:
        """The numbers of the last step and, where a probe was due, those measured after it.

        ConfigError when two of them have the same name.
        """
        seen = dict(training.numbers)
        if not self._probes:
            return seen
        now = self._clock()
        self._elapsed_s += 0.0 if self._last is None else now - self._last
        self._last = now
        for name, probe in self._probes.items():
            if training.step % probe.every == 0 and self._affordable(probe):
                found = self._measure(probe, training)
                if taken := sorted(seen.keys() & found.keys()):
                    raise ConfigError(f"probe {name!r} measures {taken[0]!r}, which this step has already; rename it")
                seen |= found
                self.latest |= found
        return seen

    def _affordable(self, probe: Probe) -> bool:
        cost = self.costs[probe.name]
        if probe.budget is None or cost.last_s is None:
            return True
        affordable = cost.spent_s + cost.last_s <= probe.budget * self._elapsed_s
        cost.skipped += not affordable
        return affordable

    def _measure(self, probe: Probe, training: Training) -> dict[str, float]:
        began = self._clock()
        device = next(training.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            found = {name: float(value) for name, value in probe.measure(training).items()}
        cost = self.costs[probe.name]
        cost.last_s = self._clock() - began
        cost.spent_s += cost.last_s
        return found

    def state(self) -> dict[str, Any]:
        if not self._probes and not self._absent:
            return {}
        own = {n: {"cost": vars(self.costs[n]), "state": p.state()} for n, p in self._probes.items()}
        return {"elapsed_s": self._elapsed_s, "latest": self.latest, "probes": {**self._absent, **own}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Probes that `state` does not know begin anew; what it knows of others is kept for their return."""
        self._elapsed_s, self.latest = state["elapsed_s"], dict(state["latest"])
        self._absent = {name: saved for name, saved in state["probes"].items() if name not in self._probes}
        for name, probe in self._probes.items():
            if name in state["probes"]:
                saved = state["probes"][name]
                self.costs[name] = Cost(**saved["cost"])
                probe.load_state(saved["state"])
