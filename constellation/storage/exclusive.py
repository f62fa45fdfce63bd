"""One writer per folder: a lock that the operating system takes back when its holder dies.

The driver holds RUN/.lock, an actor that trains holds RUN/<role>/.lock, `up` and `down` hold one in the
user's state folder. So two drivers never train one run, and the actor that replaces a lost one waits until
the lost one really stopped writing. A lock is a plain file: one that is a link, to whatever, is refused.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from constellation.errors import ConfigError
from constellation.storage.atomic import no_link


@contextmanager
def exclusive(
    folder: Path,
    wait_s: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
    name: str = ".lock",
    shared: bool = False,
) -> Iterator[None]:
    """Hold `folder` for this process; ConfigError when another one still does after `wait_s` seconds.

    Those that are `shared` hold it together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _open(folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
        until = time.monotonic() + wait_s
        while not _lock(file.fileno(), folder, shared):
            if time.monotonic() >= until or stop():
                file.seek(0)
                holder = file.read().decode(errors="replace") or "another process"
                raise ConfigError(f"{folder} is in use by {holder}; wait for it or stop it, then try again")
            time.sleep(0.05)
        if not shared:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
        yield


def is_held(folder: Path) -> bool:
    """Whether somebody works in `folder` now."""
    try:
        with _open(folder / ".lock", os.O_RDONLY) as file:
            return not _lock(file.fileno(), folder)
    except FileNotFoundError:
        return False


def _open(path: Path, flags: int) -> IO[bytes]:
    try:
        file = os.fdopen(no_link(str(path), flags), "rb" if flags == os.O_RDONLY else "a+b")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be locked ({error.strerror}); it must be a plain file: remove it") from None
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        file.close()
        raise ConfigError(f"{path} cannot be locked: it must be a plain file that has no other name; remove it")
    return file


def _lock(descriptor: int, folder: Path, shared: bool = False) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        warnings.warn(f"{folder}: no file locks on this file system ({error.strerror}); do not train it twice at once",
                      stacklevel=3)  # fmt: skip
    return True
