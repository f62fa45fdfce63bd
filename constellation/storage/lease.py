"""One driver for each run in a store, where no lock of a machine reaches: an object that its holder renews.

    URL/lease.json    {"owner", "host", "pid", "born", "nonce", "since", "time"}

A lease that was not renewed for STALE_S is taken over, and so is that of a process which ended on this very machine.
Stores have no test-and-set in common, so a contender writes, waits SETTLE_S and looks whether its own nonce stayed
(Fischer's algorithm; Lamport, A fast mutual exclusion algorithm, 1987); one whose write took longer begins anew. Clocks
of the machines must agree to within STALE_S. What should fail all the same is caught at every push (mirror.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from constellation.errors import ConfigError, ConstellationError, RunError
from constellation.storage.objects import Objects

NAME = "lease.json"
RENEW_S, STALE_S, SETTLE_S = 10.0, 60.0, 1.0
TRIES = 5  # writes that took too long


class Lease:
    """Held from `take` to `release`; `check` tells whether it still is."""

    def __init__(self, objects: Objects):
        self.objects, self.nonce = objects, secrets.token_hex(8)
        self._since = self._renewed = time.time()
        self._lost: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> None:
        """ConfigError, with who holds it and since when, while somebody does."""
        for _ in range(TRIES):
            found, began = holder(self.objects), time.monotonic()
            if found is not None and found.get("nonce") != self.nonce:
                raise ConfigError(
                    f"{self.objects.url} is in use by {found['owner']} since {_clock(found['since'])}, seen last "
                    f"{_clock(found['time'])}; wait for it or stop it (after {STALE_S:g} s of silence it is taken over)"
                )
            self._write()
            if time.monotonic() - began > SETTLE_S:
                continue
            time.sleep(SETTLE_S)
            now = holder(self.objects)
            if now is not None and now.get("nonce") == self.nonce:
                self._thread.start()
                return
        raise RunError(f"{self.objects.url} answers too slowly to say who works there; try again")

    def check(self) -> None:
        """RunError when another took the run over meanwhile."""
        if self._lost:
            raise RunError(self._lost)

    def release(self) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(ConstellationError):  # a store that is away takes it back by its age
            if not self._lost:
                self.objects.delete(NAME)

    def _renew(self) -> None:
        while not self._end.wait(RENEW_S):
            with contextlib.suppress(ConstellationError):  # while the store is away nobody else gets at it either
                found = read(self.objects)
                if found is not None and found.get("nonce") != self.nonce:
                    self._lost = (
                        f"{self.objects.url} was taken over by {found.get('owner')}; this process had not been heard "
                        f"of for {STALE_S:g} s"
                    )
                    return
                self._write()

    def _write(self) -> None:
        page = {
            "owner": f"process {os.getpid()} on {socket.gethostname()}", "host": socket.gethostname(),
            "pid": os.getpid(), "born": _born(os.getpid()), "nonce": self.nonce, "since": self._since,
            "time": time.time(),
        }  # fmt: skip
        self.objects.put(NAME, json.dumps(page, indent=1).encode())


@contextlib.contextmanager
def leased(objects: Objects) -> Iterator[Lease]:
    """The run at `objects` is ours inside the block."""
    lease = Lease(objects)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()


def read(objects: Objects) -> dict[str, Any] | None:
    """What the lease says; None without one, or when it is none."""
    try:
        found = json.loads(objects.get(NAME) or b"null")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def holder(objects: Objects) -> dict[str, Any] | None:
    """Who trains the run now: the lease, unless it is stale, or of a process of this machine that has ended."""
    found = read(objects)
    if found is None:
        return None
    try:
        told, _, _, host, pid = found["time"], found["since"], found["owner"], found["host"], found["pid"]
        stale = abs(time.time() - told) > STALE_S
        ended = host == socket.gethostname() and _born(pid) != found["born"]
    except (KeyError, TypeError, ValueError):
        return None
    return None if stale or ended else found


def _born(pid: int) -> float | None:
    """When the process began; None when it has ended. A number that was given again names another birth."""
    import psutil

    try:
        return round(psutil.Process(pid).create_time(), 1)
    except psutil.NoSuchProcess:
        return None


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
