"""What judges a run and acts on it: the parts that fit is given, or those that regime.* asks for; none by default."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from constellation.errors import ConfigError
from constellation.regime.actions import Brake
from constellation.regime.detector import Detector
from constellation.regime.ladder import Ladder
from constellation.regime.protocol import Recovery, Regime
from constellation.train.job import Job
from constellation.train.schedule import Governor


@dataclass(frozen=True)
class Repair:
    """Three parts of a run; None is absent."""

    regime: Regime | None
    recovery: Recovery | None
    governor: Governor | None

    @classmethod
    def of(cls, job: Job, regime: Regime | None, recovery: Recovery | None, governor: Governor | None) -> Repair:
        """ConfigError where the configuration and the arguments both say something."""
        settings = job.config.regime
        if not settings.enabled:
            return cls(regime, recovery, governor)
        if given := [name for name, part in vars(cls(regime, recovery, governor)).items() if part is not None]:
            raise ConfigError(f"regime.enabled=true and fit({given[0]}=...) both say what acts on a run: leave one out")
        if job.dev is None:
            raise ConfigError("regime.enabled=true needs held-out text to accept an action by; set data.dev_fraction")
        detector, brake = Detector(settings), Brake()
        return cls(detector, Ladder(settings, detector, brake), brake)

    def share(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The part of a batch that is trained on: its first sequences, all of them, or none in a pause."""
        compute = self.regime.compute if isinstance(self.regime, Detector) else 1.0
        rows = math.ceil(compute * len(batch[0]))
        return batch[0][:rows], batch[1][:rows]
