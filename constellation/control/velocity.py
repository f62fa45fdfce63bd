"""VelocityPI: a proportional-integral controller that adds increments and remembers its output alone (nuPI).

    xi_t = nu xi_{t-1} + (1 - nu) e_t,  xi_0 = e_0
    u_{t+1} = clip(u_t + eta (K_I e_t dt + K_P (xi_t - xi_{t-1})), low, high)

e is measured minus target, u what it acts on, such as the weight of a loss. The output itself is the integral, so that
clipping it is the anti-windup: after any time at a bound the first error of the other sign moves it (Astrom & Hagglund,
PID Controllers, 1995, sections 3.4 and 3.5; nu and the projection: Sohrabi et al. 2024, arXiv:2406.04558).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from constellation.errors import ConfigError


@dataclass
class VelocityPI:
    """`value` is the output, in [low, high]; gains are per unit of time, 1 by default a call of `update`."""

    value: float
    integral: float = 0.1  # K_I, per unit of error and time
    proportional: float = 0.5  # K_P, per unit of error
    smoothing: float = 0.0  # nu in [0, 1), part of xi that is kept over a unit of time
    rate: float = 1.0  # eta
    low: float = 0.0
    high: float = math.inf
    smooth: float | None = None  # xi, None before the first error

    def __post_init__(self) -> None:
        """ConfigError unless the bounds hold the value and the gains are finite and not negative."""
        if not self.low <= self.value <= self.high:
            raise ConfigError(f"VelocityPI: value={self.value} must lie from low={self.low} to high={self.high}")
        gains = (self.integral, self.proportional, self.rate)
        if not all(0 <= gain < math.inf for gain in gains) or not 0 <= self.smoothing < 1:
            raise ConfigError(f"VelocityPI: gains {gains} must be finite and at least 0, smoothing in [0, 1)")

    def update(self, error: float, elapsed: float = 1.0) -> float:
        """The output after an error that stood for `elapsed` units of time; ConfigError where it is not finite.

        n calls of elapsed = 1 / n with the same errors do what one call does, up to the order of the steps.
        """
        if not math.isfinite(error):
            raise ConfigError(f"VelocityPI: the error is {error}; leave a measurement out that is no number")
        keep = self.smoothing**elapsed
        smooth = error if self.smooth is None else keep * self.smooth + (1 - keep) * error
        change = self.proportional * (smooth - (error if self.smooth is None else self.smooth))
        self.smooth = smooth
        moved = self.value + self.rate * (self.integral * error * elapsed + change)
        self.value = min(self.high, max(self.low, moved))
        return self.value

    @property
    def at_bound(self) -> bool:
        """Whether the output cannot go on in the direction of the last errors."""
        return self.value in (self.low, self.high)

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "smooth": self.smooth}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.value, self.smooth = state["value"], state["smooth"]
