"""So many bytes and no more, for what several would like to hold at once: they wait for room, in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Room:
    """`async with room.of(amount): ...`; what is larger than all of it has it alone."""

    def __init__(self, size: int):
        self.size = self.free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
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
