"""Those who answer, for a service: many requests at once, each waiting for its own turn and for no other.

`AsyncKernels` is the seam under service.py. Here is its version in one process, `LocalAsyncKernels`;
the other one, with an actor for each kernel, is in actors/remote.py. Both give the same tokens.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from router.local import LocalKernels, log_probs
from router.turn import Answerer


class AsyncKernels(Protocol):
    """Kernels that are asked by many at once."""

    @property
    def names(self) -> tuple[str, ...]:
        """Who can be asked, OCEAN among them."""
        ...

    async def turn(self, kernel: str, packet: bytes, budget_bytes: int) -> bytes:
        """The packet after one turn (turn.py); it shares the kernel's batch with whoever else is there."""
        ...

    async def bits(self, kernel: str, packet: bytes, count: int) -> float:
        """Bits `kernel` needs for the last `count` tokens of the packet's window."""
        ...

    async def log_probs(self, kernel: str, windows: Sequence[Sequence[int]], tail: int) -> NDArray[np.float32]:
        """Log-probability of the next token after each of the last `tail` tokens of each window, (B, tail, V).

        Windows shorter than `tail` have -inf before their first token.
        """
        ...

    async def cancel(self, kernel: str, request: str) -> None:
        """Take the request out of the kernel's batch; its turn, if one is going on, ends with an error."""
        ...

    async def stats(self) -> dict[str, dict[str, Any]]:
        """What each kernel says of its load."""
        ...


class LocalAsyncKernels:
    """The kernels of this process, a thread each."""

    def __init__(self, kernels: LocalKernels):
        self._kernels = kernels
        self._lock = threading.Lock()
        self._threads: dict[str, ThreadPoolExecutor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return self._kernels.names

    async def turn(self, kernel: str, packet: bytes, budget_bytes: int) -> bytes:
        return (await self._do(kernel, lambda: self._answerer(kernel).turn([packet], budget_bytes)))[0]

    async def bits(self, kernel: str, packet: bytes, count: int) -> float:
        return float(await self._do(kernel, lambda: self._answerer(kernel).bits(packet, count)))

    async def log_probs(self, kernel: str, windows: Sequence[Sequence[int]], tail: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = await self._do(kernel, lambda: log_probs(self._answerer(kernel), windows, tail))
        return found

    async def cancel(self, kernel: str, request: str) -> None:
        pass

    async def stats(self) -> dict[str, dict[str, Any]]:
        return {name: {} for name in self._kernels.loaded}

    def _answerer(self, name: str) -> Answerer:
        with self._lock:
            return self._kernels._answerer(name)

    async def _do(self, kernel: str, work: Callable[[], Any]) -> Any:
        if kernel not in self._threads:
            self._threads[kernel] = ThreadPoolExecutor(1, thread_name_prefix=kernel)
        return await asyncio.wrap_future(self._threads[kernel].submit(work))
