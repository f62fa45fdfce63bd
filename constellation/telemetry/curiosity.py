"""Curiosity: learning progress of held-out loss at three time scales, and in which mood it is.

    progress_h = (L(t - h) - L(t)) / L(t - h)          h = 1, 4, 16 measurements; relative fall of the loss, below 1
    band_h     = 2 standard errors of it, paired by sequence of the held-out text

    regression    progress_4 < -band         stagnation   |progress_4| <= band
    exploration   progress_4 > band and progress_1 >= progress_4 / 4: it falls as fast as before, or faster
    exploitation  progress_4 > band, slower
    stuck         stagnation at 3 measurements in a row, with a gradient norm above its own median

(learning progress after Oudeyer, Kaplan 2007). `curiosity` is progress_4. Before there is a measurement h ago the
oldest one stands in for it; at the first all are 0 and the mood is stagnation.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

SCALES = (1, 4, 16)
BAND = 2.0  # standard errors
STUCK_AFTER = 3
KEPT = 64  # gradient norms, whose median is compared with


class Mood(IntEnum):
    """The numbers stand in logs; the names are what an optimizer's gate reads."""

    STAGNATION = 0
    EXPLORATION = 1
    EXPLOITATION = 2
    REGRESSION = 3
    STUCK = 4


@dataclass
class Curiosity:
    """Remembers the losses of the last 16 measurements, by sequence: plain lists, so that `vars` of it is JSON."""

    losses: list[list[float]] = field(default_factory=list)  # (up to 17, S) nats
    norms: list[float] = field(default_factory=list)
    stagnant: int = 0

    def see(self, losses_S: Sequence[float], grad_norm: float) -> tuple[dict[str, float], Mood]:
        """curiosity_1, _4, _16, curiosity and its band, and the mood, after losses (S,) that are all finite."""
        self.losses = [*self.losses, list(losses_S)][-(SCALES[-1] + 1) :]
        found, bands = {}, {}
        for h in SCALES:
            before = np.array(self.losses[max(0, len(self.losses) - 1 - h)])
            fall, mean = before - np.array(self.losses[-1]), max(float(before.mean()), 1e-12)
            found[f"curiosity_{h}"] = float(fall.mean()) / mean
            error = float(fall.std(ddof=1)) / len(fall) ** 0.5 if len(fall) > 1 else 0.0
            bands[h] = BAND * error / mean
        fast, middle, band = found["curiosity_1"], found["curiosity_4"], bands[4]
        if abs(middle) <= band:
            mood = Mood.STAGNATION
        elif middle < 0:
            mood = Mood.REGRESSION
        else:
            mood = Mood.EXPLORATION if fast >= middle / min(4, len(self.losses) - 1) else Mood.EXPLOITATION
        self.stagnant = self.stagnant + 1 if mood is Mood.STAGNATION and len(self.losses) > 1 else 0
        if self.stagnant >= STUCK_AFTER and self.norms and grad_norm > statistics.median(self.norms):
            mood = Mood.STUCK
        self.norms = [*self.norms, grad_norm][-KEPT:]
        return {**found, "curiosity": middle, "curiosity_band": band}, mood
