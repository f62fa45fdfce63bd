"""Files that are either whole or absent: write beside, flush to disk, rename. The umask says who may read them.

A sealed JSON file holds the checksum of its content, so that a changed bit, or digit, is noticed when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from constellation.errors import ArtifactError, RunError

SEAL = "seal"


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; free the disk or choose another --run"
        ) from error


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def no_link(path: str, flags: int) -> int:
    """An `opener` that writes to no file that a symbolic link names: whoever made a folder may have put one there."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def write_bytes(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace `path` by `data`, or leave it as it was. `private`: only the owner may read it."""
    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        name = _beside(path)
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_json(path: Path, data: Any, *, private: bool = False, sealed: bool = False) -> None:
    data = seal(data) if sealed else data
    write_bytes(path, (json.dumps(data, indent=1, allow_nan=False, default=str) + "\n").encode(), private=private)


def read_json(path: Path) -> Any:
    """The content of `path`, without its seal; ArtifactError when it is missing, no JSON, or not what was sealed."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise ArtifactError(f"{path} {what}") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    if not isinstance(data, dict) or SEAL not in data:  # written before there were seals
        return data
    said = data.pop(SEAL)
    if said != _digest(data):
        raise ArtifactError(f"{path} is damaged (its checksum differs)")
    return data


def read_object(path: Path) -> dict[str, Any]:
    """`read_json` of a file that holds a JSON object."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} is damaged: a JSON object is wanted")
    return data


def seal(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` as JSON has it, with the SHA-256 of its canonical form under "seal"."""
    plain = json.loads(json.dumps(data, default=str))
    return {**plain, SEAL: _digest(plain)}


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `path` out of what `fill(temporary folder)` writes: all of it or nothing."""
    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        temporary.mkdir()
        try:
            fill(temporary)
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(path.parent)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
