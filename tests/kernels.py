"""Kernels for tests that decode."""

from __future__ import annotations

import torch

from constellation.config import Kernel
from constellation.kernel.model import KernelLM


def random_kernel(config: Kernel, seed: int) -> KernelLM:
    """Random, far from uniform, so that every kernel writes its own nonsense, valid UTF-8 or not."""
    made = KernelLM(config, seed=seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(1.6 if weight.dim() == 2 else 1.0)
    return made
