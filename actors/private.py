"""Folders of our own: short, for their owner alone, and marked; nothing without the mark is ever removed.

Ray makes its session folders writable for everybody, so that anybody on the machine could put a link where it writes
next. They lie below one of these. A folder is in use as long as its mark is locked; what a killed process left is
removed by the next one that makes a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from constellation.errors import ConfigError

MARK = ".constellation"
LONGEST = 107 - 72  # bytes of a socket's path, less what Ray appends: /ray/session_<date>_<time>_<pid>/sockets/<name>


def make() -> tuple[Path, int]:
    """A new folder, and a descriptor of its mark: whoever holds it open keeps the folder in use."""
    parent = Path(os.environ.get("RAY_TMPDIR") or ("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()))
    try:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise ConfigError(f"{parent}: anybody may rename what is in it (no sticky bit); set RAY_TMPDIR elsewhere")
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(prefix=_prefix(), dir=parent))
        mark = os.open(folder / "new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(mark, fcntl.LOCK_EX)
        os.rename(folder / "new", folder / MARK)  # locked already when a sweep sees it
    except OSError as error:
        raise ConfigError(f"{parent}: no folder for Ray can be made there ({error.strerror}); set RAY_TMPDIR") from None
    if len(os.fsencode(folder)) > LONGEST:
        remove(folder)
        os.close(mark)
        raise ConfigError(f"{parent}: its path is too long for Ray's sockets; set RAY_TMPDIR to a shorter one")
    return folder, mark


def remove(folder: Path) -> None:
    """Remove `folder` if it is one of ours; what a dying process still writes into it leaves it to the next sweep."""
    if not is_ours(folder):
        return
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != MARK:
            entry.unlink(missing_ok=True)
    if os.listdir(folder) == [MARK]:
        (folder / MARK).unlink()
        folder.rmdir()


def is_ours(folder: Path) -> bool:
    """Whether `make` made it, for this user."""
    with contextlib.suppress(OSError):
        mark = folder / MARK
        return folder.name.startswith(_prefix()) and alone(folder, stat.S_ISDIR) and alone(mark, stat.S_ISREG)
    return False


def alone(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether `path` itself, no link, is of that kind and only this user may read or write it."""
    found = path.lstat()
    return kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _prefix() -> str:
    return f"c-{os.geteuid()}-"


def _sweep(parent: Path) -> None:
    """Remove our folders that nobody uses any more."""
    for folder in parent.glob(_prefix() + "*"):
        if not is_ours(folder):
            continue
        with contextlib.suppress(OSError), open(folder / MARK, "rb") as mark:  # one that is locked is in use
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(folder)
