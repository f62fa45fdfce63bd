"""The constellation over HTTP: fronts, each an actor without a CPU of its own in which uvicorn runs.

    Front       one application on one port, and on one of its own that Prometheus asks; it holds no state that a
                request needs twice
    Fronts      all of a command's: started, looked after, drained

A front asks the kernels by their names, so kernels may die and come back while it streams. Fronts on one
machine share a port (the system divides who connects), fronts on several machines want a load balancer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import lifecycle
from actors import record as records
from actors.specs import options_of
from actors.supervisor_actor import namespace_of
from constellation.errors import ConstellationError, RunError
from constellation.storage.mirror import address_of
from router.http.listen import Place

FRONT = "front-"  # how names of fronts begin, in the namespace of their constellation
START_S, LOOK_S, SILENCE_S = 300.0, 1.0, 30.0


class FrontMailbox:
    """An application in an actor."""

    def __init__(self, place: Place, run: Path | str):
        self._place, self._run = place, run
        self._listener: Any = None
        self._own: Any = None

    def __repr__(self) -> str:
        return f"front of {self._place.name}"

    async def listen(self) -> int:
        """The port on which requests are answered from now on; a no-op when they are already."""
        from actors.serve_app import front_of
        from router.http.listen import Listener, bind

        if self._listener is None:
            place = self._place
            app = front_of(self._run, place.name, place.key_file, place.front)
            shared, self._own = bind(place.host, place.port, place.shared), bind(place.host, 0)
            self._listener = Listener(app, shared, place.grace_s, self._own)
            await self._listener.start()
        return int(self._listener.port)

    @ray.method(concurrency_group="control")
    async def report(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "node": ray.util.get_node_ip_address()}

    @ray.method(concurrency_group="control")
    async def target(self) -> str:
        """host:port of this front alone: who asks at the shared port is answered by any of them."""
        while self._listener is None:
            await asyncio.sleep(0.1)
        host = self._place.host
        anywhere = host in ("0.0.0.0", "::", "")
        return f"{ray.util.get_node_ip_address() if anywhere else host}:{self._own.getsockname()[1]}"

    async def drain(self) -> bool:
        """Returns when everybody who was being answered has been; False if some were cut off."""
        return bool(await self._listener.drain()) if self._listener is not None else True


FrontActor: Any = ray.remote(num_cpus=0, concurrency_groups={"control": 4}, max_restarts=0, max_task_retries=0)(
    FrontMailbox
)


@dataclass
class Fronts:
    """The fronts of one command, which end with it."""

    place: Place
    count: int = 1
    say: Callable[[str], None] = print
    actors: list[Any] = field(default_factory=list)
    asked: list[tuple[Any, float]] = field(default_factory=list)  # the report that is awaited, and since when
    where: list[str] = field(default_factory=list)  # node of each

    def start(self) -> int:
        """The port they listen on."""
        for number in range(self.count):
            self.actors.append(None)
            self.asked.append((None, 0.0))
            self.where.append("")
            port = self._start(number)
            self.place = Place(**{**vars(self.place), "port": port})  # the first may have taken any free one
        return self.place.port

    def look(self) -> None:
        """Replace fronts that died, or say nothing any more."""
        for number, (ref, since) in enumerate(self.asked):
            done, _ = ray.wait([ref], timeout=0)
            why = "" if done or time.monotonic() - since < SILENCE_S else f"no answer for {SILENCE_S:g} s"
            if done:
                try:
                    self.where[number] = ray.get(ref)["node"]
                    self._ask(number)
                except RayError as error:
                    why = type(error).__name__
            if why:
                self.say(f"front {number}: {why}; starting another one")
                ray.kill(self.actors[number])
                self._start(number)

    def drain(self) -> bool:
        """Let those who are being answered come to their end; False if some were cut off."""
        refs = [actor.drain.remote() for actor in self.actors]
        try:
            return all(ray.get(refs, timeout=self.place.grace_s + SILENCE_S))
        except RayError:
            return False

    def end(self) -> None:
        for actor in self.actors:
            if actor is not None:
                ray.kill(actor)
        self.actors.clear()

    def _start(self, number: int) -> int:
        """The first front sits where the command runs, the others wherever there are nodes."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = options_of({}, 1, "SPREAD" if number else here) | {"namespace": namespace_of(self.place.name)}
        until = time.monotonic() + START_S
        while True:
            actor = FrontActor.options(**options, name=f"{FRONT}{number}-{secrets.token_hex(4)}")
            self.actors[number] = actor.remote(self.place, address_of(self.place.run))
            try:
                port: int = ray.get(self.actors[number].listen.remote(), timeout=START_S)
                break
            except RayTaskError as error:
                ray.kill(self.actors[number])
                cause = error.cause
                if number < len(self.where) and self.where[number] and time.monotonic() < until:
                    time.sleep(LOOK_S)  # a replacement waits for the port that its predecessor still holds
                    continue
                raise cause if isinstance(cause, ConstellationError) else RunError(f"front: {cause!r}") from None
            except (RayError, GetTimeoutError) as error:
                ray.kill(self.actors[number])
                raise RunError(f"front: does not start ({type(error).__name__})") from None
        self._ask(number)
        return port

    def _ask(self, number: int) -> None:
        self.asked[number] = (self.actors[number].report.remote(), time.monotonic())


def serve(
    place: Place,
    *,
    fronts: int = 1,
    address: str | None = None,
    changes: Mapping[str, Any] | None = None,
    ready: Callable[[int], None] = lambda port: None,
    ended: Callable[[float], bool],
    say: Callable[[str], None] = print,
) -> bool:
    """Serve `place.run` until `ended(seconds)`, which waits for so long, says True; False if somebody was cut off.

    A constellation that is up is used and left up; one that is not is brought up, and taken down in the end.
    """
    with contextlib.ExitStack() as stack:
        record = records.read(place.run)
        ours = record is None or bool(record.unreachable())
        lifecycle.up(place.run, address=address, changes=changes, say=say)
        if ours:
            stack.callback(lifecycle.down, place.run, say=say)
        record = records.read(place.run)
        assert record is not None
        stack.enter_context(records.in_use(place.run, record))
        stack.enter_context(record.connected())
        crew = Fronts(Place(**{**vars(place), "name": record.name}), fronts, say)
        stack.callback(crew.end)
        ready(crew.start())
        while not ended(LOOK_S):
            records.check_up(place.run, record)
            crew.look()
        say("ending: nobody new is let in, those inside are answered")
        return crew.drain()
