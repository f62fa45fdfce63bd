"""One writer per folder: a lock that the operating system takes back when its holder dies.

The driver holds RUN/.lock, an actor that trains holds RUN/<role>/.lock, `up` and `down` hold
RUN/.up.lock. So two drivers never train one run, and the actor that replaces a lost one waits until
the lost one really stopped writing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from constellation.errors import ConfigError


@contextmanager
def exclusive(
    folder: Path, wait_s: float = 0.0, stop: Callable[[], bool] = lambda: False, name: str = ".lock"
) -> Iterator[None]:
    """Hold `folder` for this process; ConfigError when another one still does after `wait_s` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a+b") as file:
        until = time.monotonic() + wait_s
        while not _lock(file.fileno(), folder):
            if time.monotonic() >= until or stop():
                file.seek(0)
                holder = file.read().decode(errors="replace") or "another process"
                raise ConfigError(f"{folder} is in use by {holder}; wait for it or stop it, then try again")
            time.sleep(0.05)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        yield


def is_held(folder: Path) -> bool:
    """Whether somebody works in `folder` now."""
    try:
        with (folder / ".lock").open("rb") as file:
            return not _lock(file.fileno(), folder)
    except FileNotFoundError:
        return False


def _lock(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        warnings.warn(f"{folder}: no file locks on this file system ({error.strerror}); do not train it twice at once",
                      stacklevel=3)  # fmt: skip
    return True
