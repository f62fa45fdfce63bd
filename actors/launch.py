"""The driver: trains a constellation, from a corpus to its kernels.

    for step in train(run, corpus, config): ...

It reads top to bottom. Everything it did lies in the run folder, so a driver that was killed, stopped
or lost its cluster is started again with `resume=True` and ends with the same weights, bit for bit.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from actors.connect import connected, inside, machine, refuse_open, where
from actors.memory import check_memory, free_bytes
from actors.placement import check, check_cluster, reserve, resident, share
from actors.supervisor import Supervisor
from constellation.config import Config
from constellation.pipeline.cost import Meter
from constellation.pipeline.home import Home, owned
from constellation.pipeline.prepare import fit_router, kernel_job, ocean_job, prepare, take_ocean
from constellation.pipeline.request import open_request, request, withdrawn
from constellation.pipeline.status import VIEW, done, finished, roots, summary, write_view
from constellation.roster import OCEAN
from constellation.storage.atomic import read_json
from constellation.storage.exclusive import exclusive
from constellation.telemetry.step import Step

__all__ = ["summary", "train"]

VIEW_EVERY_S = 1.0


def train(
    run: Path,
    corpus: Path | None = None,
    config: Config | None = None,
    *,
    address: str | None = None,
    auth: str | None = None,
    resume: bool = False,
    num_cpus: int | None = None,
    roles: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[Step]:
    """Train the constellation in `run`; yields the steps of all its models as they come.

    `config` None is the run's own when resuming, else the preset small; `address` None is a Ray of our own, as open as
    `auth` says (connect.py); `roles` are the kernels to train in this sitting, all if None; () OCEAN and router alone.
    Closing the iterator, or Ctrl-C, stops every actor after its step; `resume` goes on.
    """
    fresh = not run.exists()
    if note := request(run, corpus, config, resume):
        say(note)
    if finished(run):
        say(f"{run} is trained to its end already; ask it: constellation generate --run {run}")
        return
    address = where(address)
    with exclusive(run), contextlib.ExitStack() as stack:
        config = open_request(run)[1]
        home = stack.enter_context(owned(run, config.cluster.storage_timeout_s, say))
        roles = config.kernels if roles is None else roles
        (run / VIEW).unlink(missing_ok=True)  # of an earlier sitting
        with withdrawn(run, fresh):  # too small a cluster is told before any work is done
            if address is None and not inside():
                if auth is None:
                    refuse_open()
                size = machine(num_cpus, config.constellation.kernels)
                num_cpus, bundles = int(size["CPU"]), [share(config)] * resident(config, len(roles), size["GPU"])
                check(bundles, [size], "this machine")
                check_memory(config, len(bundles), free_bytes())
            else:
                bundles = [share(config)] * resident(config, len(roles))
                stack.enter_context(connected(address))
                check_cluster(bundles)
            plan = prepare(run)
        home.save("data", "")
        for line in read_json(run / "corpus.json")["report"]:
            say(line)
        stack.enter_context(connected(address, num_cpus=num_cpus, auth=auth))
        placement = reserve(bundles, config.cluster.placement_timeout_s, say, purpose=f"train {run.name}")
        stack.callback(placement.release)
        interrupted = stack.enter_context(_ctrl_c())
        supervisor = Supervisor(config, placement, say, after_beat=_view_of(run, interrupted, home))
        stack.callback(supervisor.dismiss)  # runs first: actors die before their room goes

        if take_ocean(plan):
            home.save(OCEAN)
        meter = Meter(run, config, say)
        jobs = [home.of(job) for job in [ocean_job(plan)] if not done(job.folder)]
        yield from meter.until_spent(supervisor.train(jobs))
        if meter.spent:
            return
        home.fetch(OCEAN)
        say("fitting the router")
        fit_router(plan)
        home.save("router")
        supervisor.roots = roots(run)
        jobs = [home.of(job) for role in roles if not done((job := kernel_job(plan, role)).folder)]
        yield from meter.until_spent(supervisor.train(jobs))
        home.fetch(*roles)


def _view_of(run: Path, interrupted: threading.Event, home: Home) -> Callable[[Supervisor], None]:
    """Leaves the supervisor's view in the run folder now and then, for `constellation status`; hears of Ctrl-C."""
    written = 0.0

    def write(supervisor: Supervisor) -> None:
        nonlocal written
        if interrupted.is_set():
            raise KeyboardInterrupt
        home.check()
        if time.monotonic() - written > VIEW_EVERY_S:
            write_view(run, supervisor.status())
            written = time.monotonic()
            home.tell()

    return write


@contextlib.contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Set once Ctrl-C was pressed: Python drops the exception when it comes inside a destructor or Ray's callbacks."""
    pressed, before = threading.Event(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield pressed
        return

    def note(number: int, frame: FrameType | None) -> None:
        pressed.set()
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
