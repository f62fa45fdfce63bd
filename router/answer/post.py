"""From other threads to an event loop: what is posted while the loop is busy arrives together, by one wake-up.

A wake-up writes to a pipe that the loop reads, and both threads want the interpreter. Engines finish several turns in a
step, and tell of tokens of all of them: one wake-up for all costs what one for each of them would.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Post:
    """`post(call)` from any thread: `call()` in the loop's thread, in the order of posting."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False

    def __call__(self, call: Callable[[], None]) -> None:
        if self.loop.is_closed():  # nobody is there to hear
            return
        self._calls.append(call)
        if not self._woken:  # two threads may both wake it, which is harmless; none may think that the other did
            self._woken = True
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # before looking: what comes from here on wakes anew
        for _ in range(len(self._calls)):
            self._calls.popleft()()
