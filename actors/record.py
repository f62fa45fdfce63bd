"""What is up, and where: one record for each run, in this user's own state folder.

    ~/.local/state/constellation/<hash of the run folder's path>.json     ($XDG_STATE_HOME instead of ~/.local/state)

A run folder may be anybody's and is not believed: a record says which process to end, and whose answers are unpickled.
Whoever has neither this home folder nor this account finds a constellation by --name and --address alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actors.connect import answer, connected
from actors.private import alone
from actors.ray_head import Head
from constellation.errors import ArtifactError, ConfigError, RunError
from constellation.storage.atomic import write_json
from constellation.storage.exclusive import exclusive

SCHEMA = 2
LEAVE_S = 20.0  # for those who ask it to hear that it is taken down, and to leave


@dataclass(frozen=True)
class Record:
    """Where the constellation of one run is up."""

    name: str
    address: str
    head: Head | None  # the Ray that `up` started
    ending: bool = False  # `down` is at work

    def unreachable(self) -> str:
        """Why nobody answers there, found out within seconds; "" if somebody does."""
        if self.ending:
            return "it is being taken down"
        if self.head is not None and not self.head.here():
            return f"it is up on {self.head.host}, which that machine alone can reach"
        if self.head is not None and not self.head.alive():
            return "its Ray has ended"
        try:
            answer(self.address, self.head.token if self.head else None)
        except ConfigError as error:
            return str(error)
        return ""

    def connected(self) -> contextlib.AbstractContextManager[None]:
        return connected(self.address, token=self.head.token if self.head else None)


def state_folder(make: bool = True) -> Path:
    """This user's; ConfigError when it cannot be made, or anybody else may write there."""
    given = Path(os.environ.get("XDG_STATE_HOME") or "")
    base = given if given.is_absolute() else Path(os.path.expanduser("~/.local/state"))
    folder, way_out = base / "constellation", "set XDG_STATE_HOME to a folder of yours"
    try:
        if make:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours = not folder.is_symlink() and (not folder.exists() or alone(folder, stat.S_ISDIR))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be used ({error.strerror}); {way_out}") from None
    if not ours:
        raise ConfigError(f"{folder} is not this user's alone; chmod 700 it, or {way_out}")
    return folder


def read(run: Path) -> Record | None:
    """The record of `run`; None when it is not up."""
    path = _path(run, make=False)
    try:
        if not alone(path, stat.S_ISREG):
            raise ConfigError(f"{path} is not this user's alone; remove it")
        found = json.loads(path.read_bytes())
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']}, this version reads {SCHEMA}")
        head = Head(**found["head"]) if found["head"] is not None else None
        return Record(str(found["name"]), str(found["address"]), head, bool(found["ending"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({type(error).__name__}: {error}); end its Ray, remove it") from None


def write(run: Path, record: Record) -> None:
    data = {"schema": SCHEMA, "run": str(run.resolve()), **dataclasses.asdict(record)}
    write_json(_path(run), data, private=True)


def remove(run: Path) -> None:
    _path(run).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(run: Path, wait_s: float = 0.0) -> Iterator[None]:
    """One `up` or `down` of a run at a time."""
    with exclusive(state_folder(), wait_s, name=_path(run).with_suffix(".lock").name):
        yield


@contextlib.contextmanager
def in_use(run: Path, record: Record) -> Iterator[None]:
    """We are connected to `record` inside the block: `down` waits a moment for us to leave. RunError when it is ended.

    A process whose Ray dies beneath it is ended by Ray, without a word that a user understands.
    """
    with exclusive(state_folder(), LEAVE_S, name=_path(run).with_suffix(".use").name, shared=True):
        check_up(run, record)
        yield


@contextlib.contextmanager
def ended(run: Path, record: Record) -> Iterator[None]:
    """Whoever uses `record` is told to leave, and has left inside the block, or was waited for long enough."""
    write(run, dataclasses.replace(record, ending=True))
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ConfigError):
            stack.enter_context(exclusive(state_folder(), LEAVE_S, name=_path(run).with_suffix(".use").name))
        yield
    remove(run)


def check_up(run: Path, record: Record) -> None:
    """RunError unless the constellation of `record` is still up."""
    if read(run) != record:
        raise RunError(f"{run} was taken down meanwhile; ask again: this process will answer")


def _path(run: Path, make: bool = True) -> Path:
    return state_folder(make) / f"{hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:32]}.json"
