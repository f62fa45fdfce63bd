"""A service to put load on: one that runs, or one started for the occasion, and the memory it holds."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from constellation.errors import ConfigError, RunError

READY_S = 600.0  # a service that is not ready then never will be
END_S = 30.0  # and one that has not drained then does not


@contextmanager
def served(run: Path) -> Iterator[tuple[str, int]]:
    """A service of `run` in a process of its own, ready: URL and process id. It ends by SIGTERM, as in production."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "constellation", "serve", "--run", str(run), "--local", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            _wait_ready(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}", process.pid
            process.send_signal(signal.SIGTERM)
            if process.wait(END_S):
                raise RunError(f"the service ended with status {process.returncode}: {_last_line(log)}")
        except subprocess.TimeoutExpired:
            raise RunError(f"the service did not end within {END_S:g} s of SIGTERM") from None
        finally:
            process.kill()
            process.wait()


@contextmanager
def running(url: str) -> Iterator[tuple[str, None]]:
    """The service at `url`, found ready; its process is not known."""
    try:
        httpx.get(f"{url.rstrip('/')}/ready", timeout=10.0).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"--url {url}: no service that is ready ({error})") from None
    yield url.rstrip("/"), None


def resident_mb(pid: int) -> float:
    """Resident memory of a process and all its descendants, MB."""
    from actors.processes import resident_bytes

    return resident_bytes(pid) / 1e6


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Any) -> None:
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RunError(f"the service ended with status {process.returncode}: {_last_line(log)}")
        try:
            if httpx.get(f"{url}/ready", timeout=5.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise RunError(f"the service was not ready within {READY_S:g} s: {_last_line(log)}")


def _last_line(log: Any) -> str:
    log.seek(0)
    return (log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
