"""Weights & Biases: one run for a constellation, role/name against role/step.

Offline unless WANDB_MODE says otherwise: `wandb sync trackers/wandb/wandb/offline-run-*` sends it later. The run's id
follows from its folder's name and place, so that a resumed run goes on with it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from constellation.trackers.tracker import Told

PROJECT = "constellation"  # unless WANDB_PROJECT names another


class WandB:
    """One W&B run."""

    def __init__(self, run: Any):
        self._run = run
        self._roles: set[str] = set()

    def tell(self, step: Told) -> None:
        if step.role not in self._roles:
            self._roles.add(step.role)
            self._run.define_metric(f"{step.role}/step")
            self._run.define_metric(f"{step.role}/*", step_metric=f"{step.role}/step")
        own = {f"{step.role}/{name}": value for name, value in step.numbers().items()}
        self._run.log({f"{step.role}/step": step.step, **own})

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "done" else 1)


def begin(folder: Path, title: str, settings: Mapping[str, Any]) -> WandB:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    return WandB(wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), name=title, dir=str(folder), config=dict(settings),
        id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16], resume="allow",
        mode=mode,
        settings=wandb.Settings(silent=True, console="off", disable_git=True),
    ))  # fmt: skip
