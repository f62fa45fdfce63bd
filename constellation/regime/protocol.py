"""What a regime detector answers, and what a recovery may do.

    advice = regime.judge(seen)                 after every step, from its numbers alone
    if advice: recovery.act(training, advice)   before the step is recorded and a checkpoint written

Both must be functions of what they are given and of their own state: a run that is killed goes on from its last
checkpoint, and judges and acts there a second time as it did the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from constellation.telemetry.training import Resumable, Training

if TYPE_CHECKING:
    import torch


class Advice(Enum):
    """False as a condition when nothing is to be done."""

    GO_ON = "go on"
    LESS_COMPUTE = "less compute"
    PAUSE = "pause"
    RECOVER = "recover"

    def __bool__(self) -> bool:
        return self is not Advice.GO_ON


class Regime(Resumable, Protocol):
    """Judges how a run is doing."""

    def judge(self, seen: Mapping[str, float]) -> Advice:
        """Advice after a step.

        `seen` has step, loss_nats, grad_norm and lr, every further term of the objective, and what was measured after
        this step. loss_nats or grad_norm may be infinite or NaN: then the optimizer did not step.
        """
        ...


class Saved(Protocol):
    """Weights, optimizer state and random numbers of some moment, on disk or in memory."""

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None: ...


class Recoverable(Training, Protocol):
    """A run that may be acted on: model and optimizer may be changed, and put back."""

    failure: str | None
    """Why the step's gradient cannot be followed. Left as it is, the run ends with it; None: the batch is skipped."""

    def snapshot(self) -> Saved:
        """This moment, in memory."""
        ...

    def last_checkpoint(self) -> Saved | None:
        """The newest checkpoint on disk, None before the first."""
        ...

    def keep(self) -> None:
        """This moment, on disk beside the run's checkpoints (recovery/); RunError where that cannot be written."""
        ...

    def batch_at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the step after `step` steps, which may be read again at any time."""
        ...

    def roll_back(self, saved: Saved) -> None:
        """Weights, optimizer and random numbers as `saved`, the failure forgotten; steps and data go on."""
        ...

    def evaluate(self) -> float | None:
        """Bits per byte on the held-out text, None without one."""
        ...

    def pause(self) -> None:
        """End this sitting with a checkpoint after the step; `fit` of the same job goes on from there."""
        ...


class Recovery(Resumable, Protocol):
    """Acts on advice."""

    def act(self, training: Recoverable, advice: Advice) -> None:
        """Do what `advice` asks for: try something, and keep it or roll back."""
        ...
