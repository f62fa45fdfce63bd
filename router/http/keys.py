"""API keys: a file of names, hashes and limits, and the one question asked of it: whose key is this?

    {"schema": 1, "keys": [{"name": "ada", "sha256": "...", "created": 1760000000, "requests_per_minute": 60, ...}]}

**SHA-256 without salt or stretching.** Keys are minted here from 256 random bits, never chosen by people. Salt defends
against tables of likely passwords and scrypt against trying them one by one; no table holds 2^256 keys and no one tries
them. What a slow hash would add is a way to stall the service with wrong keys.

The hash of what a client sent is compared with every entry in constant time, the found ones too, so how long an answer
takes says nothing about the keys. The file is read again when it changes: a removed key is refused from then on.

What all keys together have used is told to keys with `metrics` alone: with it, and its own use, a key would know how
much the others use.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from constellation.errors import ArtifactError, ConfigError
from constellation.settings import Count, check, says
from constellation.storage import atomic

SCHEMA = 1
PREFIX = "ck-"  # lets a person, and a scanner for leaked secrets, see what a string is
_LOG = logging.getLogger("constellation.http")
_LATEST = 253_402_300_799  # seconds since 1970, the end of the year 9999
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")


@dataclass(frozen=True)
class Limits:
    """What one key may ask for; None: no limit."""

    requests_per_minute: Annotated[Count, says("answers begun, prompts x n of a request; nothing: no limit")] | None = (
        None
    )
    tokens_per_minute: Annotated[Count, says("of prompts and answers; nothing: no limit")] | None = None
    concurrent: Annotated[Count, says("answers under way at once; nothing: no limit")] | None = None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Key:
    """An entry of the key file; the key itself is known to its owner alone."""

    name: str
    sha256: str = dataclasses.field(repr=False)  # of the key, 64 hex digits
    created: int = 0  # seconds since 1970
    limits: Limits = Limits()
    metrics: bool = False  # whether it opens /metrics

    def to_json(self) -> dict[str, Any]:
        limits = {name: value for name, value in dataclasses.asdict(self.limits).items() if value is not None}
        metrics = {"metrics": True} if self.metrics else {}
        return {"name": self.name, "sha256": self.sha256, "created": self.created, **limits, **metrics}


ANYONE = Key("anyone", "", metrics=True)  # who asks a service that was given no key file
NOBODY = Key("nobody", "")  # who needs no key on a path of a service that was given one


class Keys:
    """The keys of a service; without a file, everyone is `ANYONE`, an empty or any other `Bearer` included.

    `anyone` sets the limits of a service without a file.
    """

    def __init__(self, path: Path | None, anyone: Limits | None = None):
        self.path, self.anyone = path, dataclasses.replace(ANYONE, limits=anyone or Limits())
        self._keys: list[Key] = []
        self._seen: tuple[int, ...] | None = None  # state of the file when it was read
        self._said = ""  # why it could not be, as the log has it
        if path is not None:
            self._refresh(path)

    def find(self, authorization: str | None) -> Key | None:
        """Whose key an `Authorization: Bearer KEY` header holds; None when it is nobody's, or there is no header.

        ArtifactError when the file became unreadable: nobody is let in then.
        """
        if self.path is None:
            return self.anyone
        try:
            self._refresh(self.path)
        except (ArtifactError, ConfigError) as error:  # its path is no business of whoever asks
            if str(error) != self._said:
                self._said = str(error)
                _LOG.error("nobody is let in: %s", error)
            raise ArtifactError("the service cannot read its key file any more; see the server's log") from None
        scheme, _, key = (authorization or "").partition(" ")
        sent = _sha256(key.strip() if scheme.lower() == "bearer" else "")
        found = None
        for entry in self._keys:
            if hmac.compare_digest(entry.sha256, sent):
                found = entry
        return found

    def _refresh(self, path: Path) -> None:
        state = _state(path)
        if state != self._seen:
            self._keys, self._seen, self._said = read(path), state, ""


def read(path: Path) -> list[Key]:
    """The entries of a key file; ArtifactError when it is damaged, ConfigError when others could read or change it."""
    if not path.is_file():
        raise ConfigError(f"{path} is not a key file; make one: constellation keys add --file {path} --name NAME")
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"{path} is open to other users (mode {mode:04o}); chmod 600 {path}")
    try:
        data = json.loads(path.read_bytes())
        if data["schema"] != SCHEMA:
            raise ArtifactError(f"{path}: schema {data['schema']!r}, this version reads {SCHEMA}")
        keys = [_entry(row) for row in data["keys"]]
        if len({key.name for key in keys}) < len(keys):
            raise ValueError("a name appears twice")
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ArtifactError(f"{path} is damaged (nested too deeply); restore it or make a new one") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); restore it or make a new one") from None
    return keys


def add(path: Path, name: str, limits: Limits | None = None, now: float | None = None, metrics: bool = False) -> str:
    """Mints a key for `name`, writes its hash to the file (made with mode 0600) and returns it: it is kept nowhere."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r}: 1 to 64 letters, digits and . _ @ -")
    key = PREFIX + secrets.token_urlsafe(32)
    with _alone(path):
        keys = read(path) if path.exists() else []
        if any(entry.name == name for entry in keys):
            raise ConfigError(f"--name {name}: {path} has a key of that name; remove it first")
        created = int(time.time() if now is None else now)
        _write(path, [*keys, Key(name, _sha256(key), created, limits or Limits(), metrics)])
    return key


def remove(path: Path, name: str) -> None:
    """Takes the key of `name` out of the file; a service that runs refuses it from then on."""
    with _alone(path):
        keys = read(path)
        if all(entry.name != name for entry in keys):
            known = ", ".join(entry.name for entry in keys) or "no key at all"
            raise ConfigError(f"--name {name}: {path} holds {known}")
        _write(path, [entry for entry in keys if entry.name != name])


def _entry(row: dict[str, Any]) -> Key:
    row = dict(row)
    name, digest, created, metrics = row.pop("name"), row.pop("sha256"), row.pop("created"), row.pop("metrics", False)
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f"name {name!r}")
    if not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise ValueError(f"the hash of {name}")
    if not (type(created) is int and 0 <= created <= _LATEST):
        raise ValueError(f"created of {name}: {str(created)[:40]} is no time in seconds")
    if type(metrics) is not bool:
        raise ValueError(f"metrics of {name}: true or false")
    return Key(name, digest, created, Limits(**row), metrics)


def _write(path: Path, keys: list[Key]) -> None:
    # written beside with mode 0600 and renamed: the hashes are never open to others, the file is never half a file
    atomic.write_json(path, {"schema": SCHEMA, "keys": [key.to_json() for key in keys]}, private=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One writer at a time, or a key that was printed could be missing; a lock on the folder leaves no file behind."""
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
