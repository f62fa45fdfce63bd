"""The parts that may be added to a run, and what they remember of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from constellation.errors import ConfigError
from constellation.regime.protocol import Recovery, Regime
from constellation.telemetry.probe import Probes
from constellation.train.clipping import Clipping
from constellation.train.objective import Objective
from constellation.train.schedule import Governor


@dataclass(frozen=True)
class Parts:
    """What is added to a run; a part that is None is absent, and the run is without it."""

    objective: Objective | None = None
    probes: Probes | None = None
    regime: Regime | None = None
    recovery: Recovery | None = None
    governor: Governor | None = None
    clipping: Clipping | None = None

    def state(self) -> dict[str, Any]:
        """What each part remembers, by its name; those that remember nothing are left out."""
        found = {name: part.state() for name, part in vars(self).items() if part is not None}
        return {name: state for name, state in found.items() if state}

    def load_state(self, states: Mapping[str, Any]) -> None:
        """Go on from `states`, each part that it does not know from the beginning; ConfigError where one is missing."""
        for name, state in states.items():
            part = getattr(self, name, None)
            if part is None:
                raise ConfigError(
                    f"the run was trained with a {name}: pass fit(job, {name}=...) again to go on with it"
                )
            part.load_state(state)
