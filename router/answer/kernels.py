"""Those who answer, for a service: many requests at once, each waiting for its own turn and for no other.

`AsyncKernels` is the seam under service.py. Here is its version in one process, `LocalAsyncKernels`;
the other one, with an actor for each kernel, is in actors/remote.py. Both give the same tokens.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from constellation.decoding.sample import Scored
from router.answer.local import LocalKernels
from router.answer.packet import Packet
from router.answer.post import Post
from router.answer.turn import Answerer, Ear


class AsyncKernels(Protocol):
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
    ) -> list[list[Scored]]:
        """Log-probability of each window's last `tail` tokens (None: all but the first), and the `top` likeliest."""
        ...

    async def stats(self) -> dict[str, dict[str, Any]]:
        """What each kernel says of its load."""
        ...


class LocalAsyncKernels:
    """The kernels of this process, which decode in threads of their own (kernel/engine.py)."""

    def __init__(self, kernels: LocalKernels):
        self._kernels = kernels
        self._lock = threading.Lock()
        self._post: Post | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self._kernels.names

    async def load(self) -> None:
        """All of them now, so that nobody's first token waits for it."""
        for name in self.names:
            await self._answerer(name)

    async def turn(self, kernel: str, packet: Packet, budget_bytes: int, ear: Ear | None = None) -> Packet:
        answerer, loop = await self._answerer(kernel), asyncio.get_running_loop()
        if self._post is None or self._post.loop is not loop:
            self._post = Post(loop)
        post, ended = self._post, loop.create_future()

        def end() -> None:
            if not ended.done():
                ended.set_result(None)

        def tell(*news: Any) -> None:
            post(lambda: None if ended.done() or ear is None else ear(*news))

        turn = answerer.begin(packet, budget_bytes, tell if ear else None)
        turn.add_done_callback(lambda done: post(end))
        try:
            await ended
        finally:
            turn.cancel()  # when it has ended: nothing
        return turn.result()

    async def bits(self, kernel: str, packet: bytes, count: int) -> float:
        return await asyncio.wrap_future((await self._answerer(kernel)).submit_bits(packet, count))

    async def log_probs(self, kernel: str, windows: Sequence[Sequence[int]], tail: int) -> NDArray[np.float32]:
        return await asyncio.wrap_future((await self._answerer(kernel)).submit_log_probs(windows, tail))

    async def score(
        self, kernel: str, windows: Sequence[Sequence[int]], top: int, tail: int | None = None
    ) -> list[list[Scored]]:
        return await asyncio.wrap_future((await self._answerer(kernel)).submit_score(windows, top, tail))

    async def stats(self) -> dict[str, dict[str, Any]]:
        return {name: (await self._answerer(name)).stats() for name in self._kernels.loaded}

    async def _answerer(self, name: str) -> Answerer:
        """Loaded when it is asked for the first time, beside the event loop."""
        return self._find(name) if name in self._kernels.loaded else await asyncio.to_thread(self._find, name)

    def _find(self, name: str) -> Answerer:
        with self._lock:
            return self._kernels.answerer(name)
