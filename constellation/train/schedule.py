"""The learning rate: rising, flat, falling, for OCEAN and kernels each in their own way; a governor may correct it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from constellation.telemetry.training import Resumable
from constellation.train.job import Job


def learning_rate(step: int, steps: int, peak: float, warmup: float, decay: float) -> float:
    """Rises linearly over the first `warmup` part, stays, falls linearly to 0 over the last `decay` part."""
    rise = (step + 1) / max(1.0, warmup * steps)
    fall = (steps - step) / max(1.0, decay * steps)
    return peak * min(1.0, rise, fall)


@dataclass(frozen=True)
class Schedule:
    """`learning_rate` of one run: kernels, which start from OCEAN, have a peak, a rise and a fall of their own."""

    steps: int
    peak: float
    warmup: float  # part of the run, [0, 1]
    decay: float  # part of the run, [0, 1]

    @classmethod
    def of(cls, job: Job) -> Schedule:
        t, peak = job.config.train, job.config.optim.lr
        if job.is_kernel:
            return cls(job.steps, peak * t.kernel_lr_scale, t.kernel_warmup, t.decay)
        return cls(job.steps, peak, t.warmup, t.ocean_decay)

    def at(self, step: int) -> float:
        """The rate of the step after `step` steps."""
        return learning_rate(step, self.steps, self.peak, self.warmup, self.decay)


class Governor(Resumable, Protocol):
    """Controls the learning rate by what is seen of the run."""

    def observe(self, seen: Mapping[str, float]) -> None:
        """What a regime is told too (regime/protocol.py), after every step that is recorded."""
        ...

    def rate(self, step: int, scheduled: float) -> float:
        """The rate of the step after `step` steps, at least 0; `scheduled` is the schedule's."""
        ...
