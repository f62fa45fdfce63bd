"""A batch (batch.py) that writes by itself: submit and cancel from anywhere.

The engines of a process share a crew of threads, one fewer than it has cores and at least one; an engine with work
takes a step and queues up behind the others. A thread for each would be no faster, all of them run Python between
two steps, and would keep the event loop of a service from running its own. An engine needs no closing; at the end of
the process the work under way fails. One thread at a time touches a batch.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from constellation.decoding.batch import Batch, Work
from constellation.errors import RunError

T = TypeVar("T")


class Together(Future[T]):
    """What `make` makes once all works are done, or the first error, when the others are done too.

    Cancelling it cancels all of them. It forgets them with the last, so what they held is freed at once.
    """

    def __init__(self, works: Sequence[Work], make: Callable[[], T]):
        super().__init__()
        self._dones, self._left, self._lock = [work.done for work in works], len(works), threading.Lock()
        self._make: Callable[[], T] | None = make
        for done in list(self._dones):
            done.add_done_callback(self._ended)
        if not works:
            self._whole()

    def cancel(self) -> bool:
        cancelled = super().cancel()
        for done in list(self._dones) if cancelled else ():
            done.cancel()
        return cancelled

    def _ended(self, done: Future[None]) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._whole()

    def _whole(self) -> None:
        make, self._make = self._make, None
        errors = [error for done in self._dones if not done.cancelled() and (error := done.exception())]
        self._dones.clear()
        if make is None or not self.set_running_or_notify_cancel():
            return
        if errors:
            self.set_exception(errors[0])
            return
        try:
            made = make()
        except Exception as error:  # such as a packet that has outgrown its bounds
            self.set_exception(error)
        else:
            self.set_result(made)


class Engine:
    """Requests of one model, decoded together."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self._news: deque[Callable[[], None]] = deque()  # for the thread, in order
        self._lock = threading.Lock()
        self._awake = False  # queued up, or at a step

    def submit(self, works: Sequence[Work], make: Callable[[], T]) -> Together[T]:
        """What `make` makes once all of `works` are done. Cancelling it frees their slots at the next step."""
        whole = Together(works, make)
        self._tell([lambda work=work: self.batch.add(work) for work in works])  # type: ignore[misc]
        return whole

    def stats(self) -> dict[str, Any]:
        return self.batch.stats()

    def _tell(self, news: Sequence[Callable[[], None]]) -> None:
        with self._lock:
            self._news.extend(news)
            awake, self._awake = self._awake, True
        if not awake:
            _CREW.take(self)

    def step(self) -> bool:
        """Hear the news and do one step; whether there is more to do. For the crew."""
        try:
            while self._news:
                self._news.popleft()()
            self.batch.step()
        except Exception as error:  # of the device, or ours: those under way are told, the engine goes on
            self.batch.fail(error)
        with self._lock:
            self._awake = bool(self._news) or not self.batch.idle
            return self._awake

    def end(self) -> None:
        """Fail all that is under way. For the crew."""
        while self._news:
            self._news.popleft()()
        self.batch.fail(RunError("the process ends: ask again elsewhere"))


class _Crew:
    """Threads that engines with work take turns in. They start with the first one."""

    def __init__(self) -> None:
        self._ready: queue.SimpleQueue[Engine | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._ended = False

    def take(self, engine: Engine) -> None:
        """Step `engine` as long as it has work."""
        with self._lock:
            if not self._threads:
                count = max(1, (os.cpu_count() or 1) - 1)
                self._threads = [threading.Thread(target=self._work, name="engine", daemon=True) for _ in range(count)]
                for thread in self._threads:
                    thread.start()
                atexit.register(self._end)  # the interpreter must not tear a thread out of the device's code
        if self._ended:
            engine.end()
        else:
            self._ready.put(engine)

    def _work(self) -> None:
        with torch.inference_mode():
            while (engine := self._ready.get()) is not None:
                if engine.step():
                    self._ready.put(engine)
                del engine  # an idle one is nobody's but its owner's

    def _end(self) -> None:
        self._ended = True
        for _ in self._threads:
            self._ready.put(None)
        for thread in self._threads:
            thread.join()
        while not self._ready.empty():
            if engine := self._ready.get():
                engine.end()


_CREW = _Crew()
