"""A run that is kept in a store: work goes on in a local folder, what is complete goes up, whole and in order.

    URL/<part>/<file>@<16 digits of its SHA-256>     content, never changed
    URL/<part>/manifest.json                         sealed: which of them are the part's files now
    URL/lease.json                                   who trains it (lease.py)

A part is a folder directly below the run ("ocean", "heart", "router", "data"), or "": the files of the run itself.
Files go up first, the manifest last, so whoever reads finds the last complete state whatever was killed when. What a
manifest no longer names is deleted at the next push, not at this one: a reader of the old manifest still finds it.

    ~/.local/state/constellation/runs/<hash of URL>/<name>/     the local folder   ($XDG_STATE_HOME)
                                              .../base/         the manifests it agrees with

A local part whose base is the store's manifest is as new or newer, and stays; else the store's is right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from constellation.errors import ArtifactError, ConfigError, RunError
from constellation.storage.atomic import SEAL, read_json, seal, sha256, write_bytes, write_json
from constellation.storage.exclusive import exclusive
from constellation.storage.objects import Objects, Say, check_path, check_url, is_url

SCHEMA = 1
MANIFEST = "manifest.json"
ORIGIN = "url.json"
LOCK_S = 600.0  # for another process of this machine that pulls or pushes the same part
PULLS = 3  # of a part that changes while it is read


@dataclass(frozen=True)
class Manifest:
    """The files of a part: path -> (SHA-256 in hex, bytes); `retired` are objects to delete at the next push."""

    files: dict[str, tuple[str, int]]
    retired: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        return (json.dumps(seal({"schema": SCHEMA, **dataclasses.asdict(self)}), indent=1) + "\n").encode()


class Mirror:
    """The run at `url`, and its local folder. Safe to use from several threads and processes of a machine."""

    def __init__(self, url: str, patience_s: float = 30.0, say: Say = lambda text: None):
        self.url = url.rstrip("/")
        check_url(self.url)
        self.place = _place_of(self.url)
        self.folder = _folder_of(self.url)
        self.objects = Objects(self.url, patience_s, say)
        self._hashes: dict[tuple[int, int, int], str] = {}  # (inode, bytes, ns of change) -> SHA-256

    def __repr__(self) -> str:
        return f"Mirror({self.url!r}, {self.folder})"

    def begin(self) -> None:
        """Make the place of the local folder, so that `of` finds the URL again."""
        for folder in (root(), self.place):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self.place / ORIGIN, {"url": self.url}, private=True)

    # -- store -> folder

    def pull_all(self, parts: Collection[str] = ()) -> None:
        """The local folder as the store has the run: every part that is there, or `parts` of them."""
        self.begin()
        self.objects.check_bucket()
        there = [name.partition("/")[0] for name in self.objects.names(deep=False)]
        for part in sorted({p for p in there if "." not in p and "@" not in p and (not parts or p in parts)}):
            self.pull(part)
        self.pull("")  # last: it says what the others are for

    def pull(self, part: str) -> bool:
        """The local `part` as it is in the store, unless it is newer here; False when it is not in the store."""
        with self._locked(part):
            for _ in range(PULLS):
                there, here = self._there(part), self._base(part)
                if there is None:
                    if here is not None:
                        raise ArtifactError(
                            f"{self.url} has lost {part or MANIFEST}, which was there; what was known of it lies in "
                            f"{self.folder}: remove {self.place} to begin anew"
                        )
                    return False
                if here is not None and there.files == here.files and self._has(part, there):
                    return True
                if self._take(part, there):
                    return True
            raise RunError(f"{self.url}: {part} changes faster than it can be read; try again")

    def _take(self, part: str, manifest: Manifest) -> bool:
        """Make the local part what `manifest` says; False when an object is gone, so the manifest is an old one."""
        folder = self.folder / part
        self._base_file(part).unlink(missing_ok=True)  # until all is here
        for path, (digest, _) in sorted(manifest.files.items()):
            file = folder / path
            if file.is_file() and self._sha256(file) == digest:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh = file.with_name(f".{file.name}.{secrets.token_hex(6)}")
            try:
                if not self.objects.fetch(_key(part, path, digest), fresh):
                    return False
                if sha256(fresh) != digest:
                    raise ArtifactError(f"{self.url}/{_key(part, path, digest)} is damaged (checksum differs)")
                os.replace(fresh, file)
            finally:
                fresh.unlink(missing_ok=True)
        for path in set(_files(folder, part)) - set(manifest.files):
            (folder / path).unlink(missing_ok=True)
        _drop_empty(folder)
        write_bytes(self._base_file(part), manifest.to_bytes(), private=True)
        return True

    def _has(self, part: str, manifest: Manifest) -> bool:
        """Whether the local part is whole, or goes on where `manifest` ends: it has files, and any that it keeps."""
        return not manifest.files or any((self.folder / part / path).is_file() for path in manifest.files)

    # -- folder -> store

    def snapshot(self, part: str) -> Path:
        """The files of `part` as they are now, linked (those that grow are copied) into a folder that `push` takes."""
        taken = self.place / f"push-{part or 'run'}-{secrets.token_hex(6)}"
        taken.mkdir(mode=0o700)
        for path in _files(self.folder / part, part):
            source, copy = self.folder / part / path, taken / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(source, copy) if path.endswith(".jsonl") else os.link(source, copy)
        return taken

    def push(self, part: str, taken: Path | None = None) -> None:
        """The state in `taken`, or of now, goes up: files, then the manifest. RunError if somebody else wrote the part.

        After it returns the state is in the store; whatever stops it before leaves the one before in force.
        """
        taken = taken or self.snapshot(part)
        try:
            with self._locked(part):
                self._push(part, taken)
        finally:
            shutil.rmtree(taken, ignore_errors=True)

    def _push(self, part: str, taken: Path) -> None:
        there, here = self._there(part), self._base(part)
        if (there and there.files) != (here and here.files):
            raise RunError(
                f"{self.url}: {part or 'the run'} was written by another meanwhile; nothing of it was overwritten: "
                "see who trains it (constellation status), then --resume"
            )
        before = there or Manifest({})
        files = {
            path: (self._sha256(taken / path), (taken / path).stat().st_size) for path in sorted(_files(taken, part))
        }
        if there is not None and files == there.files:
            return
        known, now = ({_key(part, p, digest) for p, (digest, _) in of.items()} for of in (before.files, files))
        for path, (digest, _) in files.items():
            if (key := _key(part, path, digest)) not in known:
                self.objects.send(key, taken / path)
        manifest = Manifest(files, tuple(sorted(known - now)))
        self.objects.put(f"{part}/{MANIFEST}".lstrip("/"), manifest.to_bytes())
        write_bytes(self._base_file(part), manifest.to_bytes(), private=True)
        for key in before.retired:
            if key not in now | known:
                self.objects.delete(key)

    def sweep(self, part: str) -> None:
        """Delete objects of `part` that killed writers left, and that its manifest never named."""
        with self._locked(part):
            there = self._there(part)
            if part and there is not None:
                named = {_key(part, path, digest) for path, (digest, _) in there.files.items()} | set(there.retired)
                for name in self.objects.names(part):
                    if name not in named and not name.endswith(MANIFEST):
                        self.objects.delete(name)

    # -- what both need

    def _there(self, part: str) -> Manifest | None:
        name = f"{part}/{MANIFEST}".lstrip("/")
        data = self.objects.get(name)
        return None if data is None else _manifest(data, f"{self.url}/{name}")

    def _base(self, part: str) -> Manifest | None:
        file = self._base_file(part)
        return _manifest(file.read_bytes(), str(file)) if file.exists() else None

    def _base_file(self, part: str) -> Path:
        return self.place / "base" / f"{part or 'run'}.{MANIFEST}"

    def _locked(self, part: str) -> contextlib.AbstractContextManager[None]:
        return exclusive(self.place, LOCK_S, name=f".{part or 'run'}.lock")

    def _sha256(self, file: Path) -> str:
        """Of a file that is replaced, never changed, when it is written; known again by its inode."""
        found = file.stat()
        key = (found.st_ino, found.st_size, found.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = sha256(file)
        return self._hashes[key]


def root() -> Path:
    """Where the local folders of this user's remote runs lie; ConfigError when it is not this user's."""
    folder = _root()
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be used ({error.strerror}); set XDG_STATE_HOME to a folder of yours"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"{folder} is not this user's alone; chmod 700 it, or set XDG_STATE_HOME to a folder of yours"
        )
    return folder


def of(run: Path, patience_s: float = 30.0, say: Say = lambda text: None) -> Mirror | None:
    """The mirror whose local folder `run` is; None for any other folder, whatever lies in it."""
    url = url_of(run)
    return None if url is None else Mirror(url, patience_s, say)


def url_of(run: Path) -> str | None:
    """The URL whose local folder `run` is; None for any other."""
    place = run.absolute().parent
    if place.parent != _root() or not (place / ORIGIN).exists():
        return None
    return str(read_json(place / ORIGIN)["url"])


def resolve(run: str | os.PathLike[str], say: Say = lambda text: None, parts: Collection[str] = ()) -> Path:
    """The local folder of `run`: of a URL one that is in step with the store; any other path is itself.

    With `parts`, those and the files of the run itself alone are brought here.
    """
    if not is_url(run):
        return Path(run)
    mirror = Mirror(str(run), say=say)
    mirror.pull_all(parts)
    return mirror.folder


@contextlib.contextmanager
def excerpt(place: str, names: Collection[str], say: Say = lambda text: None) -> Iterator[Path]:
    """A folder with the runs in `place`: itself, or of a URL a copy of the files that are called one of `names`."""
    if not is_url(place):
        yield Path(place)
        return
    objects = Objects(place.rstrip("/"), say=say)
    objects.check_bucket()
    with tempfile.TemporaryDirectory(prefix="constellation-") as scratch:
        for page in objects.names():
            part, _, last = page.rpartition("/")
            data = objects.get(page) if last == MANIFEST else None
            for path, (digest, _) in _manifest(data, f"{place}/{page}").files.items() if data else ():
                if path.rpartition("/")[2] in names:
                    file = Path(scratch, part, path)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    objects.fetch(_key(part, path, digest), file)
        yield Path(scratch)


def spoken(text: str) -> str:
    """`text` for the user: URLs in the place of the local folders that they are worked on in."""
    if str(_root()) not in text:
        return text
    for page in _root().glob(f"*/{ORIGIN}"):
        if str(page.parent) in text:
            url = str(read_json(page)["url"])
            text = text.replace(str(_folder_of(url)), url)
    return text


def address_of(run: Path) -> str | Path:
    """What another node is to be told of `run`: the URL it is kept at, or the folder, which all nodes share."""
    return url_of(run) or run.resolve()


def _root() -> Path:
    given = Path(os.environ.get("XDG_STATE_HOME") or "")
    base = given if given.is_absolute() else Path(os.path.expanduser("~/.local/state"))
    return base / "constellation" / "runs"


def _place_of(url: str) -> Path:
    return root() / hashlib.sha256(url.encode()).hexdigest()[:24]


def _folder_of(url: str) -> Path:
    return _place_of(url) / (url.partition("?")[0].rpartition("/")[2] or "run")


def _key(part: str, path: str, digest: str) -> str:
    return f"{part}/{path}@{digest[:16]}".lstrip("/")


def _files(folder: Path, part: str) -> Iterator[str]:
    """Paths of the files of a part, relative to it; what is hidden is locks, and files that are being written."""
    for file in folder.rglob("*") if part else folder.glob("*"):
        path = file.relative_to(folder)
        if not any(name.startswith(".") for name in path.parts) and file.is_file():
            yield path.as_posix()


def _drop_empty(folder: Path) -> None:
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()


def _manifest(data: bytes, where: str) -> Manifest:
    """The manifest in `data`; ArtifactError when it is not what was sealed, or names files outside its folder."""
    try:
        found: dict[str, Any] = json.loads(data)
        said = found.pop(SEAL)
        if seal(found)[SEAL] != said or found["schema"] != SCHEMA:
            raise ValueError
        files = {str(path): (str(digest), int(size)) for path, (digest, size) in found["files"].items()}
        retired = tuple(map(str, found["retired"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ArtifactError(f"{where} is damaged, or of another version (its checksum differs)") from None
    for path in files:
        check_path(path)
    return Manifest(files, retired)
