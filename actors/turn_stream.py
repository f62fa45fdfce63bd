"""What a kernel's turns write while they are under way, told to a front in another process.

    turn(packet, budget, listener)   one call, whose result is all that counts
    listen(listener)                 one stream of messages for all turns of that listener: what they wrote since the
                                     last message, at most one message every `GATHER_S`

So the messages do not grow with the number of requests, and nothing depends on them: one that is lost, with its actor
or because it came after its turn's end, is text that is seen a little later.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

if TYPE_CHECKING:
    from router.answer.turn import Ear

GATHER_S = 0.02
IDLE_S = 60.0  # after which nobody may be there any more: a front that is asks again
AHEAD = 16  # messages that may wait for a front

News = tuple[str, int, tuple[int, ...], tuple[Any, ...]]  # request, number of the first token, tokens, their scores


class TurnNews:
    """In the actor: who listens, and what is to be told."""

    def __init__(self) -> None:
        self._listeners: dict[str, Callable[[News], None]] = {}

    def ear(self, listener: str, request: str) -> Ear | None:
        """Of a turn, for any thread."""
        tell = self._listeners.get(listener)
        return (lambda *news: tell((request, *news))) if tell else None

    async def messages(self, listener: str) -> AsyncIterator[list[News]]:
        """The first one, which is empty, says that the listener is known."""
        from router.answer.concurrency import Post

        waiting, came, post = deque[News](), asyncio.Event(), Post(asyncio.get_running_loop())

        def tell(news: News) -> None:
            waiting.append(news)
            post(came.set)

        self._listeners[listener] = tell
        try:
            yield []
            while True:
                await asyncio.wait_for(came.wait(), IDLE_S)
                await asyncio.sleep(GATHER_S)
                came.clear()
                yield [waiting.popleft() for _ in range(len(waiting))]
        except TimeoutError:
            return
        finally:
            del self._listeners[listener]


class Listening:
    """In a front: the ears of all turns of one kernel that are under way."""

    def __init__(self, actor: Callable[[], Awaitable[Any]]):
        self.name = uuid.uuid4().hex
        self.ears: dict[str, Ear] = {}  # by the turn's request
        self.known: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.ensure_future(self._hear(actor))

    @property
    def ended(self) -> bool:
        return self._task.done()

    async def _hear(self, actor: Callable[[], Awaitable[Any]]) -> None:
        stream: Any = None
        try:
            listen = (await actor()).listen.options(_generator_backpressure_num_objects=AHEAD)
            stream = listen.remote(self.name)
            async for message in stream:
                for request, *news in await message:
                    if ear := self.ears.get(request):
                        ear(*news)
                if not self.known.done():
                    self.known.set_result(None)
        except (RayError, ValueError):
            pass  # the actor is lost: whoever waits for its turns will know
        finally:
            if not self.known.done():
                self.known.set_result(None)
            if stream is not None:
                with contextlib.suppress(RayError, ValueError):
                    ray.cancel(stream)
