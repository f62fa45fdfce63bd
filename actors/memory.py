"""Memory that training takes and this machine has: what cannot fit is told at once, and not by a kernel's death."""

from __future__ import annotations

from constellation.config import Config
from constellation.errors import PlacementError

DRIVER_BYTES = 900 * 2**20  # the driver with its corpus and its Ray; measured with the tiny preset, as is the next
ACTOR_BYTES = 220 * 2**20  # an actor with torch; what all of them share is counted once
STATE_BYTES = 16  # of a parameter: weight, gradient and two moments (or factors as large) in float32


def needed_bytes(config: Config, kernels: int) -> int:
    """What training `kernels` side by side takes on one machine, at least."""
    from constellation.kernel.model import parameter_count

    return DRIVER_BYTES + kernels * (ACTOR_BYTES + STATE_BYTES * parameter_count(config.kernel))


def free_bytes() -> int:
    """What is free on this machine, or below the limit of this container."""
    from ray._private.utils import estimate_available_memory

    return int(estimate_available_memory())


def check_memory(config: Config, kernels: int, free: int) -> None:
    """PlacementError when `free` bytes cannot hold it."""
    if (needed := needed_bytes(config, kernels)) > free:
        raise PlacementError(
            f"training {kernels} kernels of the preset {config.preset} takes at least {gib(needed)} of memory, "
            f"{gib(free)} are free here; end something, or join a larger machine with --address"
        )


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
