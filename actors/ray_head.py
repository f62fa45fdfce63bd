"""A Ray head on this machine that outlives the command that started it, for `constellation up` without a cluster.

Its temporary folder is its own and private (private.py), so that nobody's `ray.init()` joins it by accident, and
ending it ends its processes alone (`ray stop` would end every Ray of this user). It asks for a token, always.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from actors import private
from actors.connect import OBJECT_STORE_BYTES, START_S, STARTS_WITHIN, machine, refuse_open
from actors.processes import of_session
from constellation.errors import RunError

STOP_S = 10.0


@dataclass(frozen=True)
class Head:
    """A Ray head on this machine, as `start_head` left it; plain values for its record."""

    address: str
    host: str
    pid: int  # of `ray start --block`, the parent and session leader of all its processes
    started: float  # when that process began: a pid alone may belong to somebody else by now
    folder: str  # its private folder: sessions, logs and token

    @property
    def token(self) -> Path:
        return Path(self.folder) / "token"

    def here(self) -> bool:
        return socket.gethostname() == self.host

    def alive(self) -> bool:
        return self.here() and _started(self.pid) == self.started


def start_head(num_cpus: int | None = None) -> Head:
    """Start Ray on this machine; RunError with its own words when it does not come up."""
    refuse_open()
    size = machine(num_cpus)
    folder, mark = private.make()
    token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(token)
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0",
        STARTS_WITHIN: os.environ.get(STARTS_WITHIN, str(round(START_S))),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0",
        "--include-dashboard=false", f"--num-cpus={int(size['CPU'])}", f"--num-gpus={int(size['GPU'])}",
        f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder / 'ray'}", "--disable-usage-stats",
        f"--ray-client-server-port={_free_port()}",
    ]  # fmt: skip
    log = folder / "start.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[mark])  # fmt: skip
    os.close(mark)  # from here on the head keeps its folder in use
    where = folder / "ray" / "ray_current_cluster"
    until = time.monotonic() + START_S
    try:
        while not (where.exists() and where.read_text().strip()):
            if process.poll() is not None or time.monotonic() > until:
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                raise RunError(f"Ray did not start on this machine: {last[0]}")
            time.sleep(0.1)
    except BaseException:
        process.kill()
        _kill_session(process.pid)
        private.remove(folder)
        raise
    started = _started(process.pid)
    assert started is not None
    return Head(where.read_text().strip(), socket.gethostname(), process.pid, started, str(folder))


def stop_head(head: Head) -> None:
    """End all processes of `head` and remove its folder; nothing happens when it is gone already."""
    if head.alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(head.pid, signal.SIGTERM)
        until = time.monotonic() + STOP_S
        while head.alive() and time.monotonic() < until:
            _reap(head.pid)
            time.sleep(0.05)
        _kill_session(head.pid)
    private.remove(Path(head.folder))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _started(pid: int) -> float | None:
    """When process `pid` began, seconds since 1970; None when there is none."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time(), 1)
    except psutil.NoSuchProcess:
        return None


def _kill_session(leader: int) -> None:
    """SIGKILL for whatever is left of the session that `leader` led: Ray's workers have process groups of their own."""
    for pid in of_session(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _reap(leader)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
