"""What asyncio leaves to us: awaiting several things as one, sharing a budget of bytes, calling back from threads."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order, or the first error. Whatever still runs then, or when the caller leaves, is cancelled and
    has ended."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Room:
    """A budget that several share: `async with room.of(amount): ...` waits, in order, until `amount` is free.

    What is larger than all of it has it alone.
    """

    def __init__(self, size: int):
        self.size = self.free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def of(self, amount: int) -> AsyncIterator[None]:
        amount = min(amount, self.size)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        self._give()
        try:
            await turn
            yield
        finally:
            turn.cancel()  # who leaves while waiting was given nothing
            if not turn.cancelled():
                self.free += amount
            self._give()

    def _give(self) -> None:
        while self._waiting and (self._waiting[0][1].cancelled() or self._waiting[0][0] <= self.free):
            amount, turn = self._waiting.popleft()
            if not turn.cancelled():
                self.free -= amount
                turn.set_result(None)


class Post:
    """`post(call)` from any thread: `call()` in the loop's thread, in the order of posting.

    What is posted while the loop is busy arrives by one wake-up, which writes to a pipe and makes both threads want the
    interpreter: engines finish several turns in a step, and one wake-up for all costs what one for each of them would.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False

    def __call__(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        if not self._woken:  # two threads may both wake it, which is harmless; none may think that the other did
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to hear
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # before looking: what comes from here on wakes anew
        for _ in range(len(self._calls)):
            self._calls.popleft()()
