"""The seam between a service and those who answer: `Kernels`, asked by many at once, each waiting for its own turn.

In one process they are `LocalKernels` (local.py), with an actor for each kernel `RayKernels` (actors/remote.py). Both
give the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from constellation.decoding.sample import TokenScore
from router.answer.packet import Packet
from router.answer.turn import Ear


class Kernels(Protocol):
    """Kernels that are asked by many at once. A call that is cancelled is taken out of its kernel's batch."""

    @property
    def names(self) -> tuple[str, ...]:
        """Who can be asked, OCEAN among them."""
        ...

    async def turn(self, kernel: str, packet: Packet, budget_bytes: int, ear: Ear | None = None) -> Packet:
        """The packet after one turn (turn.py); it shares the kernel's batch with whoever else is there.

        `ear` is told of tokens while the turn is under way, in the event loop, and never after the turn's end.
        """
        ...

    async def bits(self, kernel: str, packet: bytes, count: int) -> float:
        """Bits `kernel` needs for the last `count` tokens of the packet's window."""
        ...

    async def log_probs(self, kernel: str, windows: Sequence[Sequence[int]], tail: int) -> NDArray[np.float32]:
        """Log-probability of the next token after each of the last `tail` tokens of each window, (B, tail, V).

        Windows shorter than `tail` have -inf before their first token.
        """
        ...

    async def score(
        self, kernel: str, windows: Sequence[Sequence[int]], top: int, tail: int | None = None
    ) -> list[list[TokenScore]]:
        """Log-probability of each window's last `tail` tokens (None: all but the first), and the `top` likeliest."""
        ...

    async def stats(self) -> dict[str, dict[str, Any]]:
        """What each kernel says of its load."""
        ...
