"""Step: what one optimizer step reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

STEPS, TELEMETRY = "diag_steps.jsonl", "training_telemetry.jsonl"  # logs of a run: all steps, those that measured
NUMBERS = ("step", "loss_nats", "grad_norm", "lr")  # of every step, that a regime is told


@dataclass(frozen=True)
class Step:
    """The state after `step` optimizer steps of one model; step 0 is the state before the first.

    `loss_nats` is the mean cross-entropy of the batch at the weights *before* the step, nats per
    token; `dev_bits_per_byte` and `sample` are present only where an evaluation took place.
    """

    role: str
    step: int  # optimizer steps done, 0..steps
    steps: int  # planned
    tokens: int  # training tokens seen
    loss_nats: float
    grad_norm: float  # before clipping
    lr: float
    wall_s: float  # seconds of this step
    dev_bits_per_byte: float | None = None
    sample: str | None = None
    checkpoint: str | None = None  # name of the checkpoint written after this step
    measured: dict[str, float] | None = None  # further terms of the objective, and what probes measured after it
    advice: str | None = None  # of the regime, where it was not to go on

    def numbers(self) -> dict[str, float]:
        """What is told to trackers, by name: units are in the names."""
        own = {"loss_nats": self.loss_nats, "grad_norm": self.grad_norm, "lr": self.lr, "tokens": float(self.tokens)}
        if self.dev_bits_per_byte is not None:
            own["dev_bits_per_byte"] = self.dev_bits_per_byte
        return {**own, **(self.measured or {})}

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}
