"""Which probe of telemetry/ a configuration asks for: telemetry.*; none by default.

The windows are the first of a fixed order of the held-out text, the same for every model of a run; the reference of a
kernel is the checkpoint it branches from, OCEAN, and OCEAN has none.
"""

from __future__ import annotations

from pathlib import Path

import torch

from constellation.config import Kernel
from constellation.data.batches import Batches
from constellation.data.cache import open_cache
from constellation.errors import ConfigError
from constellation.kernel.model import KernelLM
from constellation.telemetry.monitor import Telemetry, Windows
from constellation.train import checkpoint
from constellation.train.job import Job, device


def windows_of(dev: Path, context: int, count: int) -> Windows:
    """The first `count` windows of the held-out text, on the device that trains."""
    batches = Batches(open_cache(dev, verify=False), None, context, count, seed=0)
    x, y = (torch.from_numpy(a).to(device()) for a in batches.at(0))
    return Windows(x, y)


def telemetry_of(job: Job) -> list[Telemetry]:
    """The probe of `job`, none where it is switched off; ConfigError where there is nothing to measure on."""
    t = job.config.telemetry
    if not t.enabled:
        return []
    if job.dev is None:
        raise ConfigError("telemetry.enabled=true needs held-out text, and this run has none; set data.dev_fraction")
    windows = windows_of(job.dev, job.config.kernel.context, t.windows)
    windows.check(job.config.kernel.width)
    reference = None if job.branch is None else _frozen(job.branch)
    return [Telemetry(windows, t.every, t.budget or None, reference, t.emotions)]


def _frozen(branch: Path) -> KernelLM:
    found = checkpoint.open_checkpoint(branch)
    model = KernelLM(Kernel(**found.state["kernel"]), seed=None)
    found.restore(model)
    return model.requires_grad_(False).to(device()).eval()
