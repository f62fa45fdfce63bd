"""Kernels that are actors, behind a service (router/answer/kernels.py).

A turn is a pure function of its packet, so a turn whose actor dies is asked again of its replacement, and the answer is
the one that was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError

from actors import record as records
from actors.connect import connected, find, where
from actors.placement import reserve, share
from actors.record import Record
from actors.specs import servers
from actors.supervisor import Supervisor
from actors.supervisor_actor import SUPERVISOR, namespace_of
from actors.turn_stream import Listening
from constellation.errors import ConstellationError, RunError
from constellation.pipeline.request import open_plan
from constellation.pipeline.status import models_of
from constellation.storage.mirror import address_of

if TYPE_CHECKING:
    from constellation.decoding.sample import TokenScore
    from router.answer.packet import Packet
    from router.answer.turn import Ear
    from router.decide.policy import RouteChoice

LOOK_S = 0.2  # between two looks at whether the constellation was taken down
TURN_S = 120.0  # one turn of one kernel on one batch
RECOVER_S = 300.0  # until a lost actor is replaced: as long as the supervisor lets one start
RETRY_EVERY_S = 0.5
SAY_EVERY_S = 5.0
STATS_S = 2.0
KNOWN_S = 1.0  # until a kernel knows a listener; text that is not told of comes with its turn's end


@contextlib.contextmanager
def open_kernels(
    run: Path, *, address: str | None = None, num_cpus: int | None = None, say: Callable[[str], None] = print
) -> Iterator[RayKernels]:
    """The kernels of `run` as actors: those that are up, else actors of our own for the length of the block.

    With an `address` those that are up in that Ray. Our own are started when they are asked for the first time.
    """
    record = records.read(run)
    if record is not None and (address is None or find(address)[1] == find(record.address)[1]):
        why = record.unreachable()
        if not why:
            with kernels_of(run, record, say) as kernels:
                yield kernels
            return
        say(f"{run} was up, but {why}; starting actors of our own")
    config = open_plan(run).config
    with contextlib.ExitStack() as stack:
        stack.enter_context(connected(where(address), num_cpus=num_cpus))
        placement = reserve([share(config)] * len(config.kernels), config.cluster.placement_timeout_s, say)
        stack.callback(placement.release)
        yield RayKernels(config.models, stack.enter_context(_on_demand(Supervisor(config, placement, say), run)), say)


@contextlib.contextmanager
def kernels_of(run: Path, record: Record, say: Callable[[str], None] = print) -> Iterator[RayKernels]:
    """The kernels of the constellation that is up by `record`; RunError soon after somebody takes it down."""

    def actor(role: str) -> Any:
        return ray.get_actor(role, namespace=namespace_of(record.name))

    with records.in_use(run, record), record.connected():
        yield RayKernels(models_of(run), actor, say, lambda: records.check_up(run, record))


@contextlib.contextmanager
def _on_demand(supervisor: Supervisor, run: Path) -> Iterator[Callable[[str], Any]]:
    """Finds an actor of `run` by role and starts it if it is not there; a thread watches over them meanwhile."""
    specs = {spec.role: spec for spec in servers(supervisor.placement, address_of(run), supervisor.config)}
    end, failures, one_at_a_time = threading.Event(), list[BaseException](), threading.Lock()

    def watch() -> None:
        try:
            while not end.is_set():
                supervisor.beat(0.2)
        except BaseException as error:
            failures.append(error)

    def find(role: str) -> Any:
        if failures:
            raise failures[0]
        with one_at_a_time:
            if role not in supervisor.members:
                supervisor.start([specs[role]])
        return supervisor.members[role].actor

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield find
    finally:
        end.set()
        thread.join()
        supervisor.dismiss()


class RayKernels:
    """The actors of a constellation, for many askers at once; `find` gives an actor's handle by its name, ValueError
    when there is none.

    Every call waits for itself alone. One whose actor is lost is asked again of the replacement, for `RECOVER_S` at
    most, and `say` tells of it; one that is left, or took too long, is cancelled in its actor too. `check` raises when
    nobody will answer any more.
    """

    def __init__(
        self,
        names: Sequence[str],
        find: Callable[[str], Any],
        say: Callable[[str], None] = lambda text: None,
        check: Callable[[], None] | None = None,
    ):
        self.names = tuple(names)
        self._find, self._say, self._check = find, say, check
        self._said = self._checked = 0.0  # when something was said, and looked at, last
        self._actors: dict[str, Any] = {}
        self._heard: dict[str, Listening] = {}

    async def turn(self, kernel: str, packet: Packet, budget_bytes: int, ear: Ear | None = None) -> Packet:
        from router.answer.packet import Packet

        if ear is None:
            return Packet.decode(await self._ask(kernel, "turn", packet.encode(), budget_bytes))
        listening = await self._listening(kernel)
        listening.ears[packet.request] = ear
        try:
            call = packet.encode(), budget_bytes, listening.name, packet.request
            return Packet.decode(await self._ask(kernel, "turn", *call))
        finally:
            del listening.ears[packet.request]

    async def bits(self, kernel: str, packet: bytes, count: int) -> float:
        return float(await self._ask(kernel, "bits", packet, count))

    async def log_probs(self, kernel: str, windows: Sequence[Sequence[int]], tail: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = await self._ask(kernel, "log_probs", windows, tail)
        return found

    async def score(
        self, kernel: str, windows: Sequence[Sequence[int]], top: int, tail: int | None = None
    ) -> list[list[TokenScore]]:
        found: list[list[TokenScore]] = await self._ask(kernel, "score", windows, top, tail)
        return found

    async def route(self, texts: Sequence[bytes]) -> list[RouteChoice]:
        """The router actor's decision on each text."""
        found: list[RouteChoice] = await self._ask("router", "route", list(texts))
        return found

    async def steps(self) -> dict[str, int]:
        """The step that each kernel of a constellation which is up has loaded."""
        status = await self._ask(SUPERVISOR, "status")
        return {kernel.role: kernel.step for kernel in status.kernels if kernel.role in self.names}

    async def stats(self) -> dict[str, dict[str, Any]]:
        """What each kernel says within STATS_S; {"state": "unreachable"} for one that says nothing."""
        return dict(zip(self.names, await asyncio.gather(*map(self._stats, self.names)), strict=True))

    async def _stats(self, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = await asyncio.wait_for((await self._actor(name)).stats.remote(), STATS_S)
            return found
        except (RayError, ValueError, TimeoutError):
            self._actors.pop(name, None)
            return {"state": "unreachable"}

    async def _listening(self, name: str) -> Listening:
        loop, found = asyncio.get_running_loop(), self._heard.get(name)
        if found is None or found.ended or found.known.get_loop() is not loop:
            found = self._heard[name] = Listening(lambda: self._actor(name))
        await asyncio.wait([found.known], timeout=KNOWN_S)  # an actor that hangs is lost with its turn, not before
        return found

    async def _actor(self, name: str) -> Any:
        if name not in self._actors:
            self._actors[name] = await asyncio.to_thread(self._find, name)
        return self._actors[name]

    async def _ask(self, name: str, method: str, *arguments: Any) -> Any:
        began = time.monotonic()
        while True:
            actor = None
            try:
                actor = await self._actor(name)
                return await self._answer_of(getattr(actor, method).remote(*arguments))
            except RayTaskError as error:  # it ran, and raised: it would again
                cause = error.cause
                raise cause if isinstance(cause, ConstellationError) else RunError(f"{name}: {cause!r}") from None
            except ConstellationError:
                raise
            except (RayError, ValueError, TimeoutError) as error:
                if self._actors.get(name) is actor:
                    self._actors.pop(name, None)  # its replacement has another handle
                self._still_up()
                now = time.monotonic()
                if now - began > RECOVER_S:
                    why = f"does not answer since {RECOVER_S:g} s ({type(error).__name__})"
                    raise RunError(f"{name} {why}; constellation status") from None
                if now - max(began, self._said) > SAY_EVERY_S:
                    self._said = now
                    self._say(f"waiting for {name} to come back ({now - began:.0f} s)")
                await asyncio.sleep(RETRY_EVERY_S)

    def _still_up(self) -> None:
        """What `check` raises; all callers together look every LOOK_S."""
        if self._check and time.monotonic() - self._checked > LOOK_S:
            self._checked = time.monotonic()
            self._check()

    async def _answer_of(self, ref: Any) -> Any:
        """The answer that `ref` stands for; whoever does not wait for it any more takes it out of the actor."""
        answer, until = asyncio.ensure_future(ref), time.monotonic() + TURN_S
        try:
            while not answer.done():
                if time.monotonic() > until:
                    raise TimeoutError
                await asyncio.wait([answer], timeout=LOOK_S if self._check else TURN_S)
                self._still_up()
            return answer.result()
        finally:
            if not answer.done():
                answer.cancel()
                with contextlib.suppress(RayError):
                    ray.cancel(ref)
