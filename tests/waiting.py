"""Waiting for an event.

No wait has a limit of its own, for a busy machine takes as long as it takes: pytest's timeout (pyproject.toml) ends
what hangs, and shows where.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

EVERY_S = 0.01


def wait_for(event: Callable[[], object]) -> None:
    """Return once `event()` is true; it asserts itself what makes further waiting useless."""
    while not event():
        time.sleep(EVERY_S)


async def wait_until(event: Callable[[], object]) -> None:
    """The same between other tasks of the loop."""
    while not event():
        await asyncio.sleep(EVERY_S)
