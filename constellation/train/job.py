"""Job: what the training of one model needs, as plain data; and how long it is, where and in which precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from constellation import processor
from constellation.config import Config, override
from constellation.roster import OCEAN


class Source(Protocol):
    """Where batches come from: a pure function of the step."""

    def at(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...


@dataclass(frozen=True)
class Job:
    """Everything that the training of one model needs; small, plain, picklable."""

    role: str  # "ocean" or a kernel's role
    folder: Path  # its run folder
    config: Config  # as this role sees it
    steps: int
    train: Path  # token cache of the training text
    dev: Path | None = None  # token cache of the held-out text
    tokenizer: Path | None = None  # for sample texts
    segments: Path | None = None  # .npy (S, 2) token ranges this role reads; None: everything
    branch: Path | None = None  # checkpoint to start from; None: random weights
    home: str | None = None  # URL that the run is kept at; None: its folder is all there is

    def here(self, run: Path) -> Job:
        """The same job on a machine where its run lies in the folder `run`."""
        paths: dict[str, Any] = {name: path for name, path in vars(self).items() if isinstance(path, Path)}
        return replace(self, **{name: run / path.relative_to(self.folder.parent) for name, path in paths.items()})

    @property
    def is_kernel(self) -> bool:
        return self.role != OCEAN

    @property
    def batch(self) -> int:
        """Sequences in a step."""
        return batch_of(self.config, self.role)

    @property
    def threads(self) -> int:
        t = self.config.train
        return t.threads if self.is_kernel else t.ocean_threads


def batch_of(config: Config, role: str) -> int:
    return config.train.batch if role == OCEAN else config.train.kernel_batch


def steps_for(config: Config, role: str) -> int:
    """Steps of `role` when the constellation may see `train.tokens` tokens in all; 0 of an OCEAN without a share."""
    t = config.train
    if role == OCEAN and not t.ocean_share:
        return 0
    share = t.ocean_share if role == OCEAN else (1 - t.ocean_share) / config.constellation.kernels
    return max(1, round(t.tokens * share / (batch_of(config, role) * config.kernel.context)))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(config: Config) -> Config:
    """`auto` of train.precision and optim.ns_precision decided by processor.py, as a config that says so.

    Where kernels get GPUs of their own it is those that count: the driver's machine may have none.
    """
    found = "bf16" if config.cluster.gpus_per_kernel > 0 else processor.precision(device().type)
    asked = {"train.precision": config.train.precision, "optim.ns_precision": getattr(config.optim, "ns_precision", "")}
    return override(config, {name: found for name, precision in asked.items() if precision == "auto"})
