"""The regime of a run, by its phi, and its faults, by what its numbers were before.

    detect_regime(phi)   below .30  linear     .30 of the compute
                         below .80  geometric  1.0
                         else       breakdown  0: a pause

with a hysteresis around both bounds. The bounds are the original design's; that phi says which compute is worth its
price is a claim that nothing here has measured yet.

    nonfinite       loss or gradient norm is none, or the model's predictions on held-out text are none
    loss spike      ln loss more than k deviations above its trailing mean, n steps in a row
    gradient spike  ln gradient norm likewise
    collapse        the model's likely text repeats itself more than the text by a bound, or phi is degenerate

Means and deviations are exponential over about 10 steps and leave spikes out. A fault asks for recovery at once, and
is then silent for 20 steps, in which a recovery can show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from constellation.config import Regimes
from constellation.regime.protocol import Advice

Name = Literal["linear", "geometric", "breakdown"]
ORDER: tuple[Name, ...] = ("linear", "geometric", "breakdown")
DECAY, SETTLED, SILENT = 0.9, 20, 20  # of the means; steps before which nothing is a spike; after a fault


def detect_regime(phi: float, bounds: Regimes | None = None, before: Name | None = None) -> tuple[Name, float]:
    """(name, share of the compute) of `phi`; with `before` a bound must be passed by the hysteresis to leave it.

    >>> detect_regime(0.1), detect_regime(0.5), detect_regime(0.9)
    (('linear', 0.3), ('geometric', 1.0), ('breakdown', 0.0))
    >>> detect_regime(0.31, before="linear"), detect_regime(0.33, before="linear")
    (('linear', 0.3), ('geometric', 1.0))
    """
    b = bounds or Regimes()
    low, high = b.linear_below, b.breakdown_from
    if before is not None:
        low += b.hysteresis if before == "linear" else -b.hysteresis
        high += -b.hysteresis if before == "breakdown" else b.hysteresis
    name: Name = "linear" if phi < low else "geometric" if phi < high else "breakdown"
    return name, {"linear": b.linear_compute, "geometric": 1.0, "breakdown": 0.0}[name]


class Detector:
    """Regime of protocol.py. All but `bounds` is remembered."""

    def __init__(self, bounds: Regimes):
        self.bounds = bounds
        self.name: Name = "geometric"
        self.fault = ""  # newest, "" before the first
        self.severity = 0  # consecutive steps in breakdown
        self.resting = 0  # steps that are still to be left out
        self.silent = 0
        self.steps = 0
        self.means: dict[str, float] = {}
        self.variances: dict[str, float] = {}
        self.spikes: dict[str, int] = {}

    @property
    def compute(self) -> float:
        """Share of the next step's batch that is trained on, [0, 1]."""
        if self.name == "breakdown":
            return 0.0 if self.resting else 1.0
        return self.bounds.linear_compute if self.name == "linear" else 1.0

    def released(self) -> None:
        """A recovery acted: the pause is over, and what was usual before may not be any more."""
        self.resting = 0
        self.silent = SILENT
        self.spikes = {}

    def judge(self, seen: Mapping[str, float]) -> Advice:
        self.steps += 1
        self.silent = max(0, self.silent - 1)
        self.resting = max(0, self.resting - 1)
        fault = self._fault(seen)
        if fault == "nonfinite" or (fault and not self.silent):
            self.fault, self.silent = fault, SILENT
            return Advice.RECOVER
        if "phi" in seen and not seen.get("phi_degenerate"):
            self.name, _ = detect_regime(seen["phi"], self.bounds, self.name)
            self.severity = self.severity if self.name == "breakdown" else 0
            if self.name == "breakdown":
                self.resting, self.fault = self.bounds.pause_steps, "breakdown"
                self.severity += 1
                return Advice.PAUSE
        self.severity += self.severity > 0
        return Advice.LESS_COMPUTE if self.name == "linear" else Advice.GO_ON

    def _fault(self, seen: Mapping[str, float]) -> str:
        if seen.get("telemetry_nan") or not all(math.isfinite(seen[name]) for name in ("loss_nats", "grad_norm")):
            return "nonfinite"
        for name in ("loss_nats", "grad_norm"):
            if self._spikes(name, math.log(max(seen[name], 1e-12))) >= self.bounds.debounce:
                return "loss spike" if name == "loss_nats" else "gradient spike"
        if seen.get("phi_degenerate") or (
            seen.get("repeat_rate", 0.0) - seen.get("text_repeat_rate", 0.0) > self.bounds.collapse_repeat
        ):
            return "collapse"
        return ""

    def _spikes(self, name: str, value: float) -> int:
        """How many steps in a row `value` has been a spike; what is none moves the means."""
        mean, variance = self.means.get(name, value), self.variances.get(name, 0.0)
        deviation = max(math.sqrt(variance), 0.01)
        if self.steps > SETTLED and value - mean > self.bounds.spike_sigma * deviation:
            self.spikes[name] = self.spikes.get(name, 0) + 1
            return self.spikes[name]
        self.spikes[name] = 0
        gain = max(1 - DECAY, 1 / self.steps)
        self.variances[name] = (1 - gain) * (variance + gain * (value - mean) ** 2)
        self.means[name] = mean + gain * (value - mean)
        return 0

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "bounds"}

    def load_state(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
