"""An application on a port of this process, or shared with other processes of this machine. No Ray here."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from constellation.errors import ConfigError, RunError
from router.http.limits import Front

if TYPE_CHECKING:
    from fastapi import FastAPI

    from router.http.server import Server

BACKLOG = 2048
GRACE_S = 30.0


@dataclass(frozen=True)
class Place:
    """Where, how and for whom an application listens."""

    run: Path
    name: str  # of the constellation, whose namespace its kernels are in
    host: str
    port: int
    shared: bool  # several fronts on one port
    key_file: Path | None = None
    grace_s: float = GRACE_S  # for those who are being answered when the service ends
    front: Front = field(default_factory=Front)


def bind(host: str, port: int, shared: bool = False) -> socket.socket:
    """A socket that listens at host:port, 0: any free one. `shared` ones of one machine divide who connects.

    ConfigError when the port is taken.
    """
    made = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, where = found[0]
        made = socket.socket(family, kind, proto)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(where)
        made.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        if made is not None:
            made.close()
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen at {host}:{port} ({why}); choose another --port or --host") from None
    return made


def url_of(host: str, port: int) -> str:
    """Where a browser on this machine finds who listens at host:port."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


class Listener:
    """`app` on the sockets: `await start()`, and in the end `await drain()`; signals are left alone."""

    def __init__(self, app: FastAPI, sock: socket.socket, grace_s: float, *more: socket.socket):
        self.sockets, self.grace_s = [sock, *more], grace_s
        self.port = int(sock.getsockname()[1])
        self._gate = app.state.gate
        self._server = _server(app, grace_s)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when requests are answered."""
        self._task = asyncio.create_task(self._server.serve(sockets=self.sockets))
        while not self._server.started:
            if self._task.done():
                raise RunError("the application ended before it had begun; see the lines above")
            await asyncio.sleep(0.01)

    async def drain(self) -> bool:
        """Let nobody in any more, wait for those inside, end; False if some were cut off after `grace_s`."""
        assert self._task is not None
        self._server.close()
        until = time.monotonic() + self.grace_s
        while self._gate.inside and time.monotonic() < until:
            await asyncio.sleep(0.01)
        whole = not self._gate.inside
        await self._task
        for sock in self.sockets:
            sock.close()
        return whole


def _server(app: FastAPI, grace_s: float) -> Server:
    from router.http.server import Server

    class Unsignalled(Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Unsignalled(app, drain_s=grace_s, backlog=BACKLOG)
