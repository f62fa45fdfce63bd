"""The controllers of one training, put together as `topo.control.*` says; without any, nothing changes.

weights     setpoints: a PI on each of three entropies, an epoch's mean its measurement, and a dual for I(X;K)
            precision: learned precisions of the two sums of squares, in the model's own optimizer
commitment  balanced: the points' pull to their codes has half the gradient of the reconstruction
balance     a bias on the choice of charts
rate        a governor, whose signal is the reconstruction alone
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from constellation.control.dual import PrimalDual, Standing
from constellation.control.governor import RateGovernor
from constellation.control.gradients import GradientBalance
from constellation.control.load import LossFreeBalance
from constellation.control.velocity import VelocityPI
from constellation.topo.settings import Topo

SHORTFALL = "shortfall"  # window_nats - I(X;K), what the dual holds at 0 or below
SHARE = 0.5  # of the reconstruction's gradient norm at the points that a balanced commitment has
LEAST_CUT = 0.05


class Adaptive:
    """`weights` and `commitment` of the losses now, `bias` of the charts, `factor` of the rate."""

    def __init__(self, settings: Topo, weights: Mapping[str, float], steps: int):
        c, m = settings.control, settings.model
        self.settings, self.weights = settings, dict(weights)
        self.commitment = settings.loss.commitment
        most = math.log(m.charts)
        self.targets = {
            "routing_entropy": c.route_entropy * most,
            "diversity": (1 - c.usage_entropy) * most,
            "chart_code_entropy": (1 - c.code_entropy) * math.log(m.codes),
        }
        self.loops: dict[str, VelocityPI] = {}
        self.dual: PrimalDual | None = None
        if c.weights == "setpoints":
            self.loops = {
                name: VelocityPI(min(c.most, self.weights.get(name, 0.0)), c.integral, c.proportional, 0.5, high=c.most)
                for name in self.targets
            }
            self.weights |= {name: loop.value for name, loop in self.loops.items()}
            if self.weights.pop("window", 0.0):
                self.dual = PrimalDual({SHORTFALL: 0.0}, rate=c.integral, most=c.most)
        self.balance = LossFreeBalance(m.charts, c.balance) if c.balance else None
        self.gradients = GradientBalance(self.commitment, SHARE) if c.commitment == "balanced" else None
        self.governor: RateGovernor | None = None
        if c.rate == "governor":
            grounding = max(1, round(settings.train.warmup * steps))
            self.governor = RateGovernor(
                "reconstruction", grounding=grounding, cap=c.cap, plateau=max(50, round(LEAST_CUT * steps)), patience=50
            )

    @property
    def bias(self) -> list[float] | None:
        return None if self.balance is None else self.balance.bias.tolist()

    @property
    def pressure(self) -> float:
        """The dual's multiplier of the shortfall, 0 without one."""
        return 0.0 if self.dual is None else self.dual.multipliers[SHORTFALL]

    def after_step(self, reconstruction: float, ratio: float | None, loads: np.ndarray) -> None:
        if self.governor is not None:
            seen = {"reconstruction": reconstruction}
            self.governor.observe(seen if ratio is None else {**seen, "update_ratio": ratio})
        if self.balance is not None:
            self.balance.update(loads)

    def after_epoch(self, means: Mapping[str, float], norms: tuple[float, float] | None) -> None:
        """Means of the losses over the epoch; gradient norms of reconstruction and commitment where they are wanted."""
        for name, loop in self.loops.items():
            self.weights[name] = loop.update(means[name] - self.targets[name])
        if self.dual is not None:
            self.dual.update({SHORTFALL: means[SHORTFALL]})
        if self.gradients is not None and norms is not None:
            self.commitment = self.gradients.update(*norms)

    def standing(self) -> Standing | None:
        """How the dual's constraint stands."""
        return None if self.dual is None else self.dual.report()

    def numbers(self) -> dict[str, float]:
        """What the controllers set, by name, for the record."""
        found = {f"weight_{name}": value for name, value in self.weights.items()} if self.loops else {}
        if self.dual is not None:
            found["weight_shortfall"] = self.pressure
        if self.gradients is not None:
            found["commitment"] = self.commitment
        if self.governor is not None:
            found |= {"rate_factor": self.governor.factor, "rate_cuts": float(self.governor.memory["cuts"])}
        if self.balance is not None:
            found["bias_range"] = float(np.ptp(self.balance.bias))
        return found

    def state(self) -> dict[str, Any]:
        """What all of them remember, as JSON has it."""
        own = {name: part.state() for name, part in self._parts().items()}
        loops = {name: loop.state() for name, loop in self.loops.items()}
        return {**own, "loops": loops, "weights": self.weights, "commitment": self.commitment}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.weights, self.commitment = dict(state["weights"]), state["commitment"]
        for name, loop in self.loops.items():
            loop.load_state(state["loops"][name])
        for name, part in self._parts().items():
            part.load_state(state[name])

    def _parts(self) -> dict[str, Any]:
        """The controllers that there are, but for the loops."""
        parts = {"dual": self.dual, "balance": self.balance, "gradients": self.gradients, "governor": self.governor}
        return {name: part for name, part in parts.items() if part is not None}
