"""What natural steps cost and bring, measured: seconds, loss, curvature. Plain numbers that any checkpoint can hold.

    overhead = (cheap_s + extra_s) / cheap_s          cheap_s   seconds of the run, had every step been cheap
                                                      extra_s   seconds that natural steps and measurements added
    kappa_eff = 64 q / median(first 16 q)             q = g^T F g / g^T g: 64 is as curved as the run's own reference

A step's seconds are those between the end of the last step and the end of this one: the caller's forward and backward
passes are part of what an overhead is relative to. A pause (an evaluation, a checkpoint) counts as three usual gaps at
most. Every average is exponential with decay 0.9 and starts at its first value.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

DECAY, PAUSE = 0.9, 3.0
CALIBRATION = 16  # measurements of q whose median is the reference
REFERENCE_KAPPA = 64.0


def _mix(old: float | None, new: float) -> float:
    return new if old is None else DECAY * old + (1 - DECAY) * new


@dataclass
class GateCosts:
    """Fields are numbers, None where nothing was measured yet, so that `vars()` of it is JSON."""

    steps: int = 0
    natural_steps: int = 0
    refused_steps: int = 0  # opened by a trigger, closed by a veto
    cheap_s: float = 0.0
    extra_s: float = 0.0
    natural_s: float = 0.0  # seconds inside natural steps
    gap_s: float | None = None  # average: between two steps
    cheap_step_s: float | None = None  # average: inside a cheap step
    natural_step_s: float | None = None  # average: inside a natural step
    measuring_s: float | None = None  # average: of one measurement of kappa
    loss: float | None = None  # of the last step, before it
    last_was_natural: bool = False
    natural_gain: float | None = None  # average fall of the loss by a natural step
    cheap_gain: float | None = None
    predicted: float | None = None  # by the last natural step
    predicted_gain: float | None = None  # average of those
    kappa_eff: float | None = None
    curvatures: list[float] = field(default_factory=list)  # q of the calibration window

    def note_gap(self, seconds: float | None) -> None:
        """None where a process began: what is usual then."""
        if self.gap_s is None:
            usual = seconds or 0.0
            self.gap_s = seconds
        else:
            usual = self.gap_s if seconds is None else min(seconds, PAUSE * self.gap_s)
            self.gap_s = _mix(self.gap_s, usual)
        self.cheap_s += usual

    def note_loss(self, loss: float) -> None:
        """The loss at this step's weights: the last step's doing, and the batch's."""
        if self.loss is not None:
            fall = self.loss - loss
            if self.last_was_natural:
                self.natural_gain = _mix(self.natural_gain, fall)
                if self.predicted is not None:
                    self.predicted_gain = _mix(self.predicted_gain, self.predicted)
            else:
                self.cheap_gain = _mix(self.cheap_gain, fall)
        self.loss = loss

    def note_curvature(self, q: float, seconds: float) -> None:
        self.measuring_s = _mix(self.measuring_s, seconds)
        self.extra_s += seconds
        if len(self.curvatures) < CALIBRATION:
            self.curvatures.append(q)
        elif (reference := statistics.median(self.curvatures)) > 0:
            self.kappa_eff = REFERENCE_KAPPA * q / reference

    def note_step(self, natural: bool, seconds: float, predicted: float | None) -> None:
        self.steps += 1
        self.last_was_natural, self.predicted = natural, predicted
        if natural:
            cheap = min(seconds, self.cheap_step_s or 0.0)
            self.natural_steps += 1
            self.natural_s += seconds
            self.natural_step_s = _mix(self.natural_step_s, seconds)
            self.cheap_s += cheap
            self.extra_s += seconds - cheap
        else:
            self.cheap_step_s = _mix(self.cheap_step_s, seconds)
            self.cheap_s += seconds

    @property
    def overhead(self) -> float:
        """Seconds of the run over those of cheap steps alone, >= 1."""
        return 1 + self.extra_s / self.cheap_s if self.cheap_s else 1.0

    def overhead_after(self, extra_s: float) -> float:
        """What `overhead` would be if this step took `extra_s` more than a cheap one; inf while nothing is measured."""
        after, cheap_s = self.extra_s + extra_s, self.cheap_s + (self.cheap_step_s or 0.0)
        return 1 + after / cheap_s if cheap_s else (1.0 if after == 0 else float("inf"))

    def natural_extra(self, unmeasured: float) -> float:
        """Expected seconds of a natural step beyond a cheap one; before the first, `unmeasured` gaps."""
        if self.natural_step_s is None:
            return unmeasured * self.gap_s if self.gap_s is not None else (float("inf") if unmeasured else 0.0)
        return max(0.0, self.natural_step_s - (self.cheap_step_s or 0.0))

    def telemetry(self, unmeasured: float) -> dict[str, float]:
        """What gate.py's intrinsic rules read; absent where nothing was measured."""
        found = {"overhead_after": self.overhead_after(self.natural_extra(unmeasured))}
        if self.kappa_eff is not None:
            found["kappa_eff"] = self.kappa_eff
        if self.natural_gain is not None and self.predicted_gain:
            found["reduction_ratio"] = self.natural_gain / self.predicted_gain
        for name, gain, inside in (
            ("natural", self.natural_gain, self.natural_step_s),
            ("cheap", self.cheap_gain, self.cheap_step_s),
        ):
            if gain is not None and inside is not None and self.gap_s is not None:
                found[f"{name}_s_per_nat"] = (self.gap_s + inside) / gain if gain > 0 else float("inf")
        return found
