"""A batch (batch.py) with a thread of its own: submit and cancel from anywhere.

The thread lives while there is work and a second longer, so an engine needs no closing; at the end of the process the
work under way fails. The thread alone touches the batch.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from constellation.errors import RunError
from constellation.kernel.batch import Batch, Work

LINGER_S = 1.0


class Engine:
    """Requests of one model, decoded together."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self._news: deque[Callable[[], None]] = deque()  # for the thread, in order
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False

    def submit(self, work: Work) -> Future[Any]:
        """`work.done`: the work once it is done, or its error. Cancelling the future frees the slot."""
        self._tell([lambda: self.batch.add(work)])
        return work.done

    def finish(self, works: Sequence[Work]) -> None:
        """Returns when all are done; the first error is raised, when the others are done too."""
        self._tell([lambda work=work: self.batch.add(work) for work in works])  # type: ignore[misc]
        errors = [work.done.exception() for work in works]
        for error in filter(None, errors):
            raise error

    def cancel(self, key: str) -> None:
        """End the requests called `key` with a RunError."""
        self._tell([lambda: self.batch.cancel(key)])

    def stats(self) -> dict[str, Any]:
        return self.batch.stats()

    def _tell(self, news: Sequence[Callable[[], None]]) -> None:
        with self._condition:
            self._news.extend(news)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
                self._thread.start()
                atexit.register(self._end)  # the interpreter must not tear the thread out of the device's code
            self._condition.notify()

    def _end(self) -> None:
        with self._condition:
            thread, self._ending = self._thread, True
            self._condition.notify()
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while not self._ending:
            with self._condition:
                if not self._news and self.batch.idle and not self._condition.wait(LINGER_S) and not self._news:
                    self._thread = None
                    atexit.unregister(self._end)
                    return
            try:
                while self._news:
                    self._news.popleft()()
                self.batch.step()
            except Exception as error:  # of the device, or ours: those under way are told, the engine goes on
                self.batch.fail(error)
        self.batch.fail(RunError("the process ends: ask again elsewhere"))
