"""KernelActor: one model in a process of its own, which trains it or answers with it.

    ActorEngine  the behaviour: one thread owns model, optimizer and device; anybody may ask about it
    KernelActor  its mailbox: the control group answers at once while the thread works

Every call may be repeated: `train` and `serve` of what is going on already do nothing, `report` only
looks, a turn is a pure function of its packet.
"""

from __future__ import annotations

import asyncio
import collections
import os
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.gauges import KernelGauges
from actors.messages import BUSY, ActorReport
from actors.turn_stream import News, TurnNews
from constellation.config import Decode
from constellation.errors import ConfigError, ConstellationError
from constellation.roster import OCEAN
from constellation.storage import mirror, uploads
from constellation.storage.exclusive import exclusive

if TYPE_CHECKING:  # torch is imported in the actor's process only
    import numpy as np
    from numpy.typing import NDArray

    from constellation.decoding.sample import TokenScore
    from constellation.telemetry.step import Step
    from constellation.train.job import Job
    from router.answer.turn import Answerer

LOOK_EVERY_S = 0.05
LOCK_WAIT_S = 120.0  # how long a replacement waits for the lost actor to stop writing (a lease of NFS is 90 s)


class ActorEngine:
    """One thread that trains a Job, or answers turns; `report` and `stop` may be called from any other."""

    def __init__(self, role: str):
        self.role = role
        self.state = "idle"
        self.error: str | None = None
        self.checkpoint: str | None = None
        self._doing: Any = None  # the Job, or the run folder that is served
        self._steps: collections.deque[Step] = collections.deque()
        self._notes: list[str] = []
        self._step = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=role)
        self._loaded: Future[None] = Future()
        self._answerer: Any = None
        self._gauges = KernelGauges()

    def train(self, job: Job) -> None:
        """Begin `job`, the first one or one after it is done; the same job again is a no-op."""
        if self.state == "done" and self._doing != job:
            with self._lock:
                self._steps.clear()
            self._notes.clear()
            self.role, self._doing, self._step, self.checkpoint = job.role, None, 0, None
        if self._begin(job, "training"):
            self._thread.submit(self._train, job)

    def serve(self, run: Path | str, threads: int, decode: Decode) -> Future[None]:
        """Load this role's model from its newest checkpoint in `run`, a folder or URL, to answer with it."""
        if self._begin(run, "idle"):
            self._loaded = self._thread.submit(self._load, run, threads, decode)
        return self._loaded

    @property
    def answerer(self) -> Answerer:
        """What answers, for any thread; the error that told why it cannot, or ConfigError."""
        if self.state == "failed":
            self._loaded.result()  # raises why
        if self.state != "serving":
            raise ConfigError(f"{self.role} is {self.state}, it answers when it serves: constellation up")
        return self._answerer

    def stats(self) -> dict[str, Any]:
        """Its state, and what its batch says (decoding/batch.py)."""
        return {"state": self.state, **(self._answerer.stats() if self.state == "serving" else {})}

    def report(self, since: int) -> ActorReport:
        """What it is doing, with the steps after step `since`; those up to it are known and forgotten here."""
        state = self.state  # before the steps: whoever is told "done" has all of them
        with self._lock:
            while self._steps and self._steps[0].step <= since:
                self._steps.popleft()
            steps = tuple(self._steps)
        self._export(state, steps)
        return ActorReport(
            role=self.role, state=state, pid=os.getpid(), node=ray.util.get_node_ip_address(),
            node_id=ray.get_runtime_context().get_node_id(), step=self._step, checkpoint=self.checkpoint,
            error=self.error, steps=steps, notes=tuple(self._notes),
        )  # fmt: skip

    def stop(self) -> None:
        """Ask the thread to end after the step it is in."""
        self._stop.set()

    def _export(self, state: str, steps: Sequence[Step]) -> None:
        for step in steps:
            self._gauges.train(self._doing.folder.parent.name, step)
        if state == "serving":
            self._gauges.engine(self._doing.name, self.role, self._answerer.stats())

    def _begin(self, what: Any, state: str) -> bool:
        if self._doing is None:
            self._doing, self.state = what, state
            return True
        if self._doing != what:
            raise ConfigError(f"{self.role} is at work already; an actor does one thing at a time")
        return False

    def _train(self, job: Job) -> None:
        from constellation.train import checkpoint
        from constellation.train.loop import fit

        try:
            store, job = self._at_home(job)
            if not job.train.exists():
                where = ray.util.get_node_ip_address()
                raise ConfigError(f"{job.train} is not visible on node {where}; --run must be a folder all nodes share")
            with exclusive(job.folder, LOCK_WAIT_S, self._stop.is_set):
                if store is not None:
                    store.pull(job.role)
                checkpoint.sweep(job.folder)
                self._step = max(checkpoint.steps_on_disk(job.folder), default=0)
                self.checkpoint = checkpoint.folder_of(job.folder, self._step).name if self._step else None
                steps: Any = fit(job, say=self._notes.append)
                if store is not None:
                    store.sweep(job.role)
                    steps = uploads.uploaded(steps, store, job.role)
                for step in steps:
                    with self._lock:
                        self._steps.append(step)
                    self._step, self.checkpoint = step.step, step.checkpoint or self.checkpoint
                    if self._stop.is_set() and step.step < step.steps:
                        steps.close()
                        self.state = "stopped"
                        return
            self.state = "done" if self._step >= job.steps else "stopped"  # a recovery may have asked for a pause
        except BaseException as error:
            self._fail(error)

    def _at_home(self, job: Job) -> tuple[mirror.Mirror | None, Job]:
        """The mirror of a job whose run is kept at a URL, and the job on this machine, with all that it reads."""
        if job.home is None:
            return None, job
        store = mirror.Mirror(job.home, job.config.cluster.storage_timeout_s, self._notes.append)
        store.begin()
        for part in ("data", "router", OCEAN, "") if job.is_kernel else ("data", ""):
            store.pull(part)
        return store, job.here(store.folder)

    def _load(self, run: Path | str, threads: int, decode: Decode) -> None:
        """The very class that answers without Ray, with one model, so that both give the same tokens."""
        try:
            import torch

            from constellation.coordizer.tokenizer import Tokenizer
            from constellation.decoding.basins import read as read_basins
            from constellation.train import checkpoint
            from router.answer.turn import Answerer

            run = mirror.resolve(run, self._notes.append, (self.role,))
            torch.set_num_threads(threads)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = checkpoint.load_model(run / self.role, device, self._notes.append)
            tokenizer = Tokenizer.load(run / "tokenizer.json")
            basins = read_basins(run, tokenizer.hash, model.config.context)
            slots, precision = decode.slots, decode.precision
            self._answerer = Answerer(model, tokenizer, slots=slots, precision=precision, basins=basins)
            self._step = checkpoint.steps_on_disk(run / self.role)[-1]
            self.checkpoint = checkpoint.folder_of(run / self.role, self._step).name
            self.state = "serving"
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """Failure as data: reported, and not tried again, for it would fail in the same way."""
        self.error = str(error) if isinstance(error, ConstellationError) else f"{type(error).__name__}: {error}"
        self.state = "stopped" if self._stop.is_set() else "failed"
        traceback.print_exc(file=sys.stderr)  # into the actor's log


class KernelMailbox:
    """What others may ask of one ActorEngine."""

    def __init__(self, role: str, gpus: float = 0.0):
        import torch  # an actor that has started is ready to work

        if 0 < gpus < 1 and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(gpus)  # a fraction of a GPU is bookkeeping to Ray
        self._engine = ActorEngine(role)
        self._told = TurnNews()

    def __repr__(self) -> str:  # how Ray's dashboard and logs call the actor
        return f"{self._engine.role}"

    @ray.method(concurrency_group="control")
    async def train(self, job: Job) -> None:
        self._engine.train(job)

    @ray.method(concurrency_group="control")
    async def serve(self, run: Path | str, threads: int, decode: Decode) -> None:
        """Returns when it can answer."""
        await asyncio.wrap_future(self._engine.serve(run, threads, decode))

    @ray.method(concurrency_group="control")
    async def report(self, since: int, patience_s: float = 0.0) -> ActorReport:
        """What is new after step `since`: at the end of the work, otherwise after `patience_s`."""
        for _ in range(round(patience_s / LOOK_EVERY_S)):
            if self._engine.state not in (*BUSY, "serving"):
                break
            await asyncio.sleep(LOOK_EVERY_S)
        return self._engine.report(since)

    @ray.method(concurrency_group="control")
    async def stop(self) -> None:
        """Returns when the step in progress is done."""
        self._engine.stop()
        while self._engine.state == "training":
            await asyncio.sleep(LOOK_EVERY_S)

    async def turn(self, packet: bytes, budget_bytes: int, listener: str = "", request: str = "") -> bytes:
        """A turn on one packet, which joins whatever is going on; a listener is told of it as `request`."""
        ear = self._told.ear(listener, request)
        return await asyncio.wrap_future((await self._loaded()).submit(packet, budget_bytes, ear))

    @ray.method(concurrency_group="control")
    async def listen(self, listener: str) -> AsyncIterator[list[News]]:
        """What the turns of `listener` write while they are under way (turn_stream.py)."""
        async for message in self._told.messages(listener):
            yield message

    async def bits(self, packet: bytes, count: int) -> float:
        return await asyncio.wrap_future((await self._loaded()).submit_bits(packet, count))

    async def log_probs(self, windows: Sequence[Sequence[int]], tail: int) -> NDArray[np.float32]:
        return await asyncio.wrap_future((await self._loaded()).submit_log_probs(windows, tail))

    async def score(self, windows: Sequence[Sequence[int]], top: int, tail: int | None) -> list[list[TokenScore]]:
        return await asyncio.wrap_future((await self._loaded()).submit_score(windows, top, tail))

    @ray.method(concurrency_group="control")
    async def stats(self) -> dict[str, Any]:
        return self._engine.stats()

    async def _loaded(self) -> Answerer:
        """A replacement is found by its name before it has its model: its callers wait."""
        while self._engine.state == "idle":
            await asyncio.sleep(LOOK_EVERY_S)
        return self._engine.answerer


# restarts are the supervisor's, retries the caller's: Ray does neither by itself
KernelActor: Any = ray.remote(concurrency_groups={"control": 16}, max_restarts=0, max_task_retries=0)(KernelMailbox)
