"""The ladder: which protocol a fault or a breakdown asks for, tried, and kept or undone.

    breakdown  < 20 consecutive steps cooldown, < 50 light sleep, < 100 deep sleep, then mushroom
    a fault    nonfinite: rollback. Otherwise, one after another until one is kept: rollback, cooldown

    1  the moment is kept, in memory and on disk under recovery/; where that cannot be written nothing is tried
    2  act
    3  held-out bits per byte <= those before + tolerance: kept. Else the moment of 1 is put back, the next is tried

Where the weights are damaged, so that "before" is no number, whatever gives one is kept. A gradient that was not finite
beside sound weights costs its batch, nothing else. After `actions` tries the ladder does nothing any more. The order
for faults is a choice that `constellation bench recovery` puts to the test; no result is in yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from constellation.config import Regimes
from constellation.errors import ConfigError, RunError
from constellation.regime.actions import ACTIONS, Brake
from constellation.regime.detector import Detector
from constellation.regime.protocol import Advice, Recoverable

BY_SEVERITY = ((20, "cooldown"), (50, "light_sleep"), (100, "deep_sleep"), (math.inf, "mushroom"))
FOR_FAULTS = {"nonfinite": ("rollback",)}
OTHERWISE = ("rollback", "cooldown")


class Ladder:
    """Recovery of protocol.py; `outcomes` are what it did, in order."""

    def __init__(self, settings: Regimes, detector: Detector, brake: Brake):
        self.settings, self.detector, self.brake = settings, detector, brake
        self.outcomes: list[dict[str, Any]] = []

    def act(self, training: Recoverable, advice: Advice) -> None:
        s = self.settings
        if advice is Advice.LESS_COMPUTE or s.recovery == "off":
            return
        sound = all(bool(torch.isfinite(p).all()) for p in training.model.parameters())
        if training.failure is not None and sound:
            training.failure = None
            self._tell(training, "skip", "kept", None, None)
            return
        if self._tried() >= s.actions:
            return
        before = training.evaluate() if sound else None
        if before is None and sound:
            raise ConfigError("regime.enabled=true needs held-out text to accept an action by; set data.dev_fraction")
        moment, braked = training.snapshot(), self.brake.left
        try:
            training.keep()
        except RunError as error:
            self._tell(training, "none", f"unwritable: {error}", before, None)
            return
        for name in self._chosen():
            if self._tried() >= s.actions:
                return
            ACTIONS[name](training, s.recovery_steps, self.brake)
            after = training.evaluate()
            kept = after is not None and math.isfinite(after)
            kept = kept and (before is None or not math.isfinite(before) or after <= before + s.tolerance)  # type: ignore[operator]
            self._tell(training, name, "kept" if kept else "rolled back", before, after)
            if kept:
                training.failure = None
                self.detector.released()
                return
            self.brake.left = braked
            failure = training.failure
            training.roll_back(moment)
            training.failure = failure

    def _chosen(self) -> tuple[str, ...]:
        if self.settings.recovery != "ladder":
            return (self.settings.recovery,)
        if self.detector.fault == "breakdown":
            return (next(name for below, name in BY_SEVERITY if self.detector.severity < below),)
        return FOR_FAULTS.get(self.detector.fault, OTHERWISE)

    def _tried(self) -> int:
        return sum(outcome["action"] not in ("skip", "none") for outcome in self.outcomes)

    def _tell(self, training: Recoverable, action: str, result: str, before: Any, after: Any) -> None:
        plain = {name: value if value is None or math.isfinite(value) else None
                 for name, value in (("before", before), ("after", after))}  # fmt: skip
        self.outcomes.append(
            {"step": training.step, "fault": self.detector.fault, "action": action, "result": result, **plain}
        )

    def state(self) -> dict[str, Any]:
        return {"outcomes": self.outcomes} if self.outcomes else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.outcomes = list(state["outcomes"])
