"""A run as it lies on disk, read: whole up to its last checkpoint, or refused in one line."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation.artifacts import schema
from constellation.artifacts.derive import derive
from constellation.artifacts.run import CHANNELS
from constellation.artifacts.signal import Signal, read_arrays, read_signals
from constellation.errors import ArtifactError
from constellation.telemetry.step import STEPS


@dataclass(frozen=True)
class SavedRun:
    """The folder of one model's run; everything is read when it is asked for, and ArtifactError where it is damaged."""

    path: Path

    @cached_property
    def meta(self) -> dict[str, Any]:
        return schema.read(self.path / "meta.json", "meta")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """status "running" alone where none is written yet."""
        file = self.path / "summary.json"
        return schema.read(file, "summary") if file.exists() else {"schema": 2, "status": "running", "changes": {}}

    @cached_property
    def trace(self) -> dict[str, NDArray[Any]]:
        """The channels of T+1 states; of none before the first checkpoint."""
        file = self.path / "trace.npz"
        if not file.exists():
            return {name: np.empty(0, dtype) for name, dtype in CHANNELS.items()}
        arrays = read_arrays(file)
        rows = {len(array) for array in arrays.values()} if set(CHANNELS) <= set(arrays) else set()
        if len(rows) != 1:
            raise ArtifactError(f"{file} is damaged: {', '.join(CHANNELS)} of one length are wanted")
        return arrays

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The logged steps, without a torn last line."""
        file = self.path / STEPS
        found = []
        for line in file.read_bytes().splitlines() if file.exists() else ():
            try:
                step = json.loads(line)
            except ValueError:
                continue
            if isinstance(step, dict) and isinstance(step.get("step"), int):
                found.append(step)
        return found

    @cached_property
    def signals(self) -> dict[str, Signal]:
        """Those derived from trace and log, and what signals.npz holds: it stands before them unless it ends earlier.

        A truth that it knows of a derived signal is kept.
        """
        file, found = self.path / "signals.npz", derive(self.trace, self.steps)
        for name, saved in (read_signals(file) if file.exists() else {}).items():
            own = found.get(name)
            if own is None or (len(saved.step) and saved.step[-1] >= own.step[-1:].max(initial=-1)):
                found[name] = saved
            elif saved.truth is not None and saved.truth.shape == own.values.shape[1:]:
                found[name] = replace(own, truth=saved.truth)
        return found

    def signal(self, name: str) -> Signal:
        """ArtifactError that names those there are, when there is no such signal."""
        if name not in self.signals:
            raise ArtifactError(f"{self.path} has no signal {name!r}; it has {', '.join(sorted(self.signals))}")
        return self.signals[name]


def open_run(path: Path) -> SavedRun:
    """The run in `path`; ArtifactError when there is none, or what identifies it is damaged."""
    run = SavedRun(path)
    if not (path / "meta.json").exists():
        raise ArtifactError(f"{path} is not the folder of a run (no meta.json)")
    assert run.meta
    return run
