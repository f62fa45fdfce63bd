"""Recording: gradients, curvature and the preconditioner of a run, as the settings record.* ask; nothing by default.

Each is a probe (telemetry/probe.py) that keeps what it saw until the next checkpoint, before which its file is written:
a killed run finds on disk all that its checkpoint has seen, forgets what came after it and sees that again, to the same
bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from constellation.artifacts.signal import Signal, read_about, read_signals, write_signals
from constellation.config import Recording
from constellation.errors import ArtifactError, ConfigError
from constellation.optim import curvature
from constellation.telemetry.probe import Probe
from constellation.telemetry.training import Training

LARGEST = 2**31  # bytes of one record: it is rewritten at every checkpoint
ROWS = 8  # curvature is seen in one sequence of so many, at least one


class Recorded:
    """A probe that measures no number and keeps rows, (P,) each, in `file`."""

    budget = None

    def __init__(self, name: str, every: int, file: Path):
        self.name, self.every, self.file = name, every, file
        self._rows: dict[str, list[np.ndarray]] = {"values": [], "stderr": []}
        self._step: list[int] = []
        self._about: dict[str, Any] = {}

    def see(self, training: Training) -> None:
        """Append a row."""
        raise NotImplementedError

    def measure(self, training: Training) -> Mapping[str, float]:
        self.see(training)
        return {}

    def keep(self, step: int, values: np.ndarray, stderr: np.ndarray | None = None) -> None:
        self._step.append(step)
        self._rows["values"].append(values)
        if stderr is not None:
            self._rows["stderr"].append(stderr)

    def go_on(self, step: int) -> None:
        """With the rows up to `step` that are on disk; ArtifactError when some that should be are not."""
        if step < self.every:
            return
        signal = read_signals(self.file)[self.name].until(step)
        if len(signal.step) != step // self.every:
            raise ArtifactError(
                f"{self.file} has {len(signal.step)} rows up to step {step}, {step // self.every} wanted"
            )
        self._about = read_about(self.file)
        self._step, self._rows = signal.step.tolist(), {"values": list(signal.values), "stderr": []}
        if signal.stderr is not None:
            self._rows["stderr"] = list(signal.stderr)

    def save(self) -> None:
        if not self._step:
            return
        stderr = np.stack(self._rows["stderr"]) if self._rows["stderr"] else None
        step = np.array(self._step, np.int64)
        signal = Signal(np.stack(self._rows["values"]), step, self._about.get("units", "1"), stderr)
        write_signals(self.file, {self.name: signal}, self._about)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass


class Gradients(Recorded):
    """The gradient that the optimizer was given, clipped, nats per unit of theta."""

    def see(self, training: Training) -> None:
        self._about = {"units": "nats"}
        params = list(training.model.parameters())
        self.keep(training.step, _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params]))


class Curvatures(Recorded):
    """A diagonal of curvature after the step (optim/curvature.py), in a part of the step's batch."""

    def __init__(self, name: str, every: int, file: Path, kind: str, probes: int):
        super().__init__(name, every, file)
        self.kind, self.probes = kind, probes

    def see(self, training: Training) -> None:
        inputs, targets = (rows[: max(1, len(rows) // ROWS)] for rows in training.batch)
        params = list(training.model.parameters())
        with torch.enable_grad():
            logits = training.model(inputs).flatten(0, 1)
            found = curvature.from_likelihood(
                self.kind, logits, targets.flatten(), params, probes=self.probes, seed=training.step
            )
        self._about = {"kind": found.kind, "units": found.units, "probes": found.probes}
        self.keep(training.step, _flat(found.diagonal), _flat(found.stderr))


class Preconditioner(Recorded):
    """The rates of the optimizer's next step, the newest alone (optim/precond.py)."""

    def see(self, training: Training) -> None:
        training.optimizer.save_preconditioner(self.file)  # type: ignore[attr-defined]

    def go_on(self, step: int) -> None:
        pass


class Records:
    """All that `settings` ask for of one run in `folder`."""

    def __init__(self, settings: Recording, folder: Path):
        s = settings
        self.signals = bool(s.signals)
        kinds: list[Recorded] = [
            Gradients("grads", s.grads_every, folder / "grads.npz"),
            Curvatures("curvature", s.curvature_every, folder / "curvature.npz", s.curvature_kind, s.curvature_probes),
            Preconditioner("precond", s.precond_every, folder / "precond.npz"),
        ]
        self._records = [kind for kind in kinds if kind.every]

    @property
    def probes(self) -> list[Probe]:
        return list(self._records)

    def begin(self, model: torch.nn.Module, step: int, steps: int) -> None:
        """Go on from `step`; ConfigError when the run's whole record would be too large."""
        size = sum(p.numel() for p in model.parameters())
        for record in self._records:
            rows = 1 if isinstance(record, Preconditioner) else steps // record.every
            if 4 * rows * size > LARGEST:
                raise ConfigError(
                    f"record.{record.name}_every={record.every}: {rows} rows of {size} numbers are"
                    f" {4 * rows * size / 2**30:.1f} GiB, at most {LARGEST / 2**30:.0f} are kept; raise it"
                )
            record.go_on(step)

    def save(self) -> None:
        """What was seen, on disk."""
        for record in self._records:
            record.save()


def _flat(tensors: Any) -> np.ndarray:
    whole: np.ndarray = torch.cat([t.detach().flatten().float() for t in tensors]).cpu().numpy()
    return whole
