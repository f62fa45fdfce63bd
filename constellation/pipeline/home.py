"""Where a run is kept: its folder alone, or a store that the folder is a mirror of. No Ray and no torch here.

    with owned(run) as home:        nobody else trains it inside the block
        home.save("data", "")       what is complete goes up
        home.saved(fit(job), role)  steps, once their checkpoints are up

A run whose folder is all there is has the plain `Home`, which does nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from constellation.errors import ConstellationError
from constellation.storage import mirror
from constellation.telemetry.step import Step

if TYPE_CHECKING:
    from constellation.storage.lease import Lease
    from constellation.train.job import Job

TELL_EVERY_S = 15.0


class Home:
    """A run folder on a disk that everybody who works on it sees."""

    def check(self) -> None:
        """RunError when another took the run over."""

    def save(self, *parts: str) -> None:
        """What the folder's `parts` hold now is kept from now on, one after another."""

    def fetch(self, *parts: str) -> None:
        """The folder's `parts` as whoever trained them left them."""

    def tell(self) -> None:
        """The newest view of the run, now and then; one that does not get there is no harm."""

    def of(self, job: Job) -> Job:
        """`job` as another node is to be told of it."""
        return job

    def saved(self, steps: Iterator[Step], role: str) -> Iterator[Step]:
        """`steps` of `role`, each when what it says is saved is saved."""
        return steps


class RemoteHome(Home):
    """A run in a store; this process holds its lease."""

    def __init__(self, store: mirror.Mirror, lease: Lease):
        self.store, self.lease, self._told = store, lease, time.monotonic()

    def check(self) -> None:
        self.lease.check()

    def save(self, *parts: str) -> None:
        for part in parts:
            self.lease.check()
            self.store.push(part)

    def fetch(self, *parts: str) -> None:
        for part in parts:
            self.store.pull(part)

    def tell(self) -> None:
        if time.monotonic() - self._told > TELL_EVERY_S:
            self._told = time.monotonic()
            view = mirror.Mirror(self.store.url, 0.0)
            with contextlib.suppress(ConstellationError):
                view.push("")

    def of(self, job: Job) -> Job:
        return replace(job, home=self.store.url)

    def saved(self, steps: Iterator[Step], role: str) -> Iterator[Step]:
        from constellation.storage.uploads import uploaded

        self.lease.check()
        self.store.sweep(role)
        return uploaded(steps, self.store, role)


@contextlib.contextmanager
def owned(run: Path, patience_s: float, say: Callable[[str], None]) -> Iterator[Home]:
    """The home of `run`; of a run in a store nobody else may train it inside the block (lease.py)."""
    store = mirror.of(run, patience_s, say)
    if store is None:
        yield Home()
        return
    from constellation.storage.lease import leased

    with leased(store.objects) as lease:
        store.pull_all()  # somebody may have worked on it until a moment ago
        home = RemoteHome(store, lease)
        yield home
        with contextlib.suppress(ConstellationError):
            store.push("")
