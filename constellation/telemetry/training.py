"""What the parts added to a training run see of it, and how they are resumed with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Resumable(Protocol):
    """A part of a run that remembers something; the run's checkpoints hold it (state.json, "parts")."""

    def state(self) -> dict[str, Any]:
        """What is remembered, as JSON has it: text, finite or infinite numbers, lists, and dicts with text for keys."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, which `state()` returned when the checkpoint was written."""
        ...


class Training(Protocol):
    """A run under way, between two optimizer steps."""

    @property
    def step(self) -> int:
        """Optimizer steps done, 0..steps."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps planned."""
        ...

    @property
    def model(self) -> torch.nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the last step, int64 (batch, context); its clipped gradients are still in `.grad`."""
        ...

    @property
    def numbers(self) -> Mapping[str, float]:
        """Of the last step: step, loss_nats, grad_norm, lr, and each further term of the objective by its name."""
        ...

    @property
    def latest(self) -> Mapping[str, float]:
        """Of every name that a probe has measured the newest value."""
        ...


class Language(Protocol):
    """What telemetry asks of a language model: hidden states (B, T, D) of tokens (B, T), and their logits (..., V)."""

    def hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...
