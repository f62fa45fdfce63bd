"""Server-sent events: one flush an event, several answers in one stream, and an end when the client leaves.

data: {...}\\n\\n    for every chunk          data: [DONE]\\n\\n    after the last
event: error\\ndata: {"error": {...}}\\n\\n    instead of all the rest when something fails midway
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.http.middleware import Visit

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies are to pass each event on at once
_AHEAD = 16  # pieces of all answers that may wait for a slow client


def event(data: bytes) -> bytes:
    """JSON holds no line end, so an event is one line and an empty one."""
    return b"data: " + data + b"\n\n"


def error_event(data: bytes) -> bytes:
    return b"event: error\ndata: " + data + b"\n\n"


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """(i, item) of every stream as they come, each stream in its order; the first error ends all of them.

    Leaving early, or a stream's error, closes every stream before this ends.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]):
            async for item in streams[0]:
                yield 0, item
        return
    waiting: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(_AHEAD)

    async def pump(i: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    await waiting.put((i, item))
            await waiting.put(None)
        except Exception as error:
            await waiting.put(error)

    pumps = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        going = len(pumps)
        while going:
            got = await waiting.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                going -= 1
            else:
                yield got
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def while_connected(work: Awaitable[T], receive: Receive) -> T | None:
    """What `work` returns; None when the client left before, and `work` has been cancelled and has ended then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        both: list[asyncio.Future[Any]] = [task, gone]
        for one in both:
            one.cancel()
        await asyncio.gather(*both, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response that sends each event by itself, and closes `events` when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str], visit: Visit):
        self.events, self.visit = events, visit
        self.status_code, self.background = 200, None
        self.init_headers({**HEADERS, **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.visit.left = await while_connected(self._send(send), receive) is None

    async def _send(self, send: Send) -> bool:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self.events):
            async for data in self.events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True


async def first_of(events: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same events, the first one made already: what goes wrong before it is raised here, not midway."""
    head = await anext(events)

    async def going_on() -> AsyncGenerator[T, None]:
        async with contextlib.aclosing(events):
            yield head
            async for item in events:
                yield item

    return going_on()
