"""What a policy sees of one text that is being written, and the decisions it leads to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.decide.fisher_rao import FisherRaoRouter
from router.decide.mixture import judged
from router.decide.policy import ABSTAINED, Policy, RouteChoice, Trajectory, decide, kernel_name
from router.decide.stream import RouterStream


@dataclass(frozen=True)
class Look:
    """A decision: which kernel is in force from byte `at_bytes` of prompt and answer on."""

    at_bytes: int
    kernel: str
    likeliest: str  # the kernel of largest posterior, whether in force or not
    posterior: float  # its posterior, [0, 1]
    distance_rad: float | None  # Fisher-Rao distance to the nearest centre, [0, pi]; None for a policy without centres
    abstained: bool
    reason: str  # why it abstained
    weights: tuple[tuple[str, float], ...] = ()  # who answers from here on, with weights that sum to 1


class View:
    """What a policy sees of one text that is being written."""

    def __init__(self, policy: Policy):
        self.names, self.integration = policy.names, integration_of(policy)
        self.stream = RouterStream(policy) if isinstance(policy, FisherRaoRouter) else WholeText(policy)
        self.current = ABSTAINED
        self.choice: RouteChoice | None = None

    def update(self, data: bytes) -> None:
        self.stream.update(data)

    def judged(self, mode: str) -> NDArray[Any]:
        """The posterior of the last look, as `mode` weighs it (mixture.py)."""
        assert self.choice is not None
        return judged(mode, self.choice.posterior, self.integration)

    def decide(self, at_bytes: int, hysteresis: float) -> Look:
        """Who is in force from here on, by the rule that also assigned the training text."""
        choice = self.stream.choice()
        nearest = choice.distances_rad.min(initial=np.inf)
        now = Trajectory(
            at_bytes=np.array([at_bytes]),
            posterior=choice.posterior[None],
            distance_rad=np.array([nearest], np.float32),
            abstain=np.array([choice.abstained]),
        )
        self.current, self.choice = int(decide(now, hysteresis, self.current)[0]), choice
        return Look(
            at_bytes=at_bytes,
            kernel=kernel_name(self.names, self.current),
            likeliest=self.names[int(choice.posterior.argmax())],
            posterior=round(float(choice.posterior.max()), 6),
            distance_rad=round(float(nearest), 6) if np.isfinite(nearest) else None,
            abstained=choice.abstained,
            reason=choice.reason,
        )


def integration_of(policy: Policy) -> NDArray[np.float64] | None:
    """phi of each kernel where a fitted router has it."""
    return policy.integration if isinstance(policy, FisherRaoRouter) else None


class WholeText:
    """Any policy's view of a text, read anew at each look: the oracle of `RouterStream`."""

    def __init__(self, policy: Policy):
        self.policy, self.text = policy, b""

    def update(self, data: bytes) -> None:
        self.text += data

    def choice(self) -> RouteChoice:
        return self.policy.route([self.text])[0]
