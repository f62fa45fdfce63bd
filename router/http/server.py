"""uvicorn that waits for nobody for ever (wire.py) and lets everyone finish: SIGTERM or SIGINT closes the gate, and
the process ends when it is empty.

first signal    new requests get 503 with Retry-After and /ready says no; answers under way go on to their end
then            the process ends, at the latest after `drain_s` seconds; a second signal ends it at once
"""

from __future__ import annotations

import functools
import time
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from router.http.wire import Wire

LOOPBACK = "127.0.0.1"
# longer than clients keep an idle connection (httpx 5 s, aiohttp 15 s): when the server closes it first, a request that
# is on its way is lost
KEEP_ALIVE_S = 75


class Server(uvicorn.Server):
    """`await Server(app).serve()`, or `.run()`; `close()` begins the end without a signal."""

    def __init__(self, app: Starlette, host: str = LOOPBACK, port: int = 8000, drain_s: float = 60.0, **options: Any):
        # log_config None: whoever starts the server has set up logging, or wants none
        self.gate, self.drain_s = app.state.gate, drain_s
        settings = {"log_config": None, "access_log": False, "server_header": False, **options}
        settings |= {"http": functools.partial(Wire, self.gate.front), "ws": "none"}
        waits = {"timeout_keep_alive": KEEP_ALIVE_S, "timeout_graceful_shutdown": 1}
        super().__init__(uvicorn.Config(app, host, port, **waits, **settings))
        self._ends_s: float | None = None

    def close(self) -> None:
        """Let nobody in any more, and end when nobody is inside."""
        self.gate.close()
        if self._ends_s is None:
            self._ends_s = time.monotonic() + self.drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._ends_s is None:
            self._captured_signals.append(sig)
            self.close()
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._ends_s is not None and (not self.gate.inside or time.monotonic() > self._ends_s):
            self.should_exit = True
        return await super().on_tick(counter)
