"""PrimalDual: a multiplier for each constraint C_k <= eps_k, raised while it is violated.

    minimise L(theta) + sum_k lambda_k (C_k(theta) - eps_k)      lambda_k <- clip(lambda_k + eta (C_k - eps_k), 0, most)

theta descends in anybody's loop, lambda ascends here (Arrow, Hurwicz & Uzawa 1958). At a solution the
Karush-Kuhn-Tucker conditions hold: C_k <= eps_k, lambda_k >= 0, lambda_k (C_k - eps_k) = 0, and the gradient of the sum
is 0. `report` says how far from that it is, and which constraints look infeasible: a multiplier at its bound that is
still violated. With a proportional gain the multiplier is a VelocityPI, which damps the oscillation of ascent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from constellation.control.velocity import VelocityPI
from constellation.errors import ConfigError


@dataclass(frozen=True)
class Held:
    """One constraint as it stands."""

    multiplier: float  # lambda, at least 0
    excess: float  # C - eps, the constraint's own unit; above 0 it is violated
    at_bound: bool  # lambda is at its greatest and the constraint violated: with this bound it cannot be met

    @property
    def slackness(self) -> float:
        """|lambda (C - eps)|, 0 at a solution."""
        return abs(self.multiplier * self.excess)


@dataclass(frozen=True)
class Standing:
    """All constraints, and the largest departure from the KKT conditions."""

    held: Mapping[str, Held]
    stationarity: float  # norm of the gradient of the sum, NaN where it was not told

    @property
    def infeasible(self) -> tuple[str, ...]:
        """Constraints that are violated although their multiplier is at its bound."""
        return tuple(name for name, one in self.held.items() if one.at_bound)

    @property
    def residual(self) -> float:
        """max of violations, complementary slackness and, where it is known, stationarity; at least 0."""
        parts = [max(0.0, one.excess) for one in self.held.values()] + [one.slackness for one in self.held.values()]
        return max([0.0, *parts, *([] if math.isnan(self.stationarity) else [self.stationarity])])

    def __str__(self) -> str:
        """One line a constraint."""
        lines = [
            f"{name}: lambda {one.multiplier:.4g}, C - eps {one.excess:+.4g}"
            + (", INFEASIBLE at the bound: raise the limit or the bound" if one.at_bound else "")
            for name, one in self.held.items()
        ]
        return "\n".join([*lines, f"KKT residual {self.residual:.3g}"])


class PrimalDual:
    """Constraints C_k <= limit_k by name."""

    def __init__(self, limits: Mapping[str, float], rate: float = 0.01, most: float = 1e4, proportional: float = 0.0):
        if not 0 < rate < math.inf or not most > 0:
            raise ConfigError(f"PrimalDual: rate={rate} and most={most} must be above 0")
        self.limits = dict(limits)
        self._multipliers = {
            name: VelocityPI(0.0, 1.0, proportional, rate=rate, low=0.0, high=most) for name in self.limits
        }
        self._excess: dict[str, float] = dict.fromkeys(self.limits, math.nan)

    @property
    def multipliers(self) -> dict[str, float]:
        return {name: one.value for name, one in self._multipliers.items()}

    def update(self, measured: Mapping[str, float], elapsed: float = 1.0) -> dict[str, float]:
        """The multipliers after C_k were measured; ConfigError names a constraint that was not, or is no number."""
        for name, limit in self.limits.items():
            if not math.isfinite(measured.get(name, math.nan)):
                raise ConfigError(f"PrimalDual: constraint {name!r} was measured as {measured.get(name)}")
            self._excess[name] = measured[name] - limit
            self._multipliers[name].update(self._excess[name], elapsed)
        return self.multipliers

    def report(self, stationarity: float = math.nan) -> Standing:
        """How the constraints stood at the last update."""
        held = {
            name: Held(one.value, self._excess[name], one.value >= one.high and self._excess[name] > 0)
            for name, one in self._multipliers.items()
        }
        return Standing(held, stationarity)

    def state(self) -> dict[str, Any]:
        known = {name: excess for name, excess in self._excess.items() if not math.isnan(excess)}
        return {"multipliers": {name: one.state() for name, one in self._multipliers.items()}, "excess": known}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, one in self._multipliers.items():
            one.load_state(state["multipliers"][name])
        self._excess |= state["excess"]
