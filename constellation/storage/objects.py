"""Objects in a store that a URL names: put whole, read, listed, deleted; tried again while the store stays away.

    s3://bucket/path   gs://   abfs://   file://     by pyarrow's own file systems, which come with Ray
    any other scheme                                 by fsspec, if the package that brings it is installed

Who asks is known from the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE ...), where the store is from it too
(AWS_ENDPOINT_URL) or from the URL (?endpoint_override=HOST:PORT&scheme=http). A URL with a password is refused.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from constellation.errors import ArtifactError, ConfigError, RunError

T = TypeVar("T")
Say = Callable[[str], None]
PIECE = 1 << 20  # bytes of a file in memory at once
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 15.0  # between two attempts
CONNECT_S, ANSWER_S = 5.0, 30.0
WHOLE = ("s3", "gcs", "abfs")  # stores in which an object appears when its last byte is there
REFUSALS = {  # what no further attempt would change, as the stores word it
    "ACCESS_DENIED": "refuses these credentials, or they may not do this",
    "INVALID_ACCESS_KEY_ID": "does not know this access key",
    "InvalidAccessKeyId": "does not know this access key",
    "INVALID_CLIENT_TOKEN_ID": "does not know this access key",
    "SIGNATURE_DOES_NOT_MATCH": "refuses this secret key",
    "INVALID_SIGNATURE": "refuses this secret key",
    "SignatureDoesNotMatch": "refuses this secret key",
    "NO_SUCH_BUCKET": "has no such bucket; make it first",
    "NoSuchBucket": "has no such bucket; make it first",
}


def is_url(text: object) -> bool:
    return isinstance(text, str) and "://" in text


def check_url(url: str) -> None:
    """ConfigError unless `url` has a scheme, a place and no password."""
    found = urllib.parse.urlsplit(url)
    if "@" in found.netloc:
        shown = found.netloc.rpartition("@")[2]
        raise ConfigError(
            f"{found.scheme}://{shown}{found.path}: credentials do not belong in a URL; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or what your store reads"
        )
    if not found.scheme or not (found.netloc or found.scheme == "file") or not found.path.strip("/"):
        raise ConfigError(f"{url}: a bucket and a path in it are wanted, such as s3://bucket/runs/mine")


class Objects:
    """The objects below `url`; names are relative to it, with "/" between their parts.

    An operation that fails is repeated, with longer and longer pauses, for `patience_s` seconds; `say` is told once.
    RunError when the store stays away for longer, ConfigError at once where it refuses (credentials, no bucket).
    """

    def __init__(self, url: str, patience_s: float = 30.0, say: Say = lambda text: None):
        check_url(url)
        self.url, self.patience_s, self.say = url, patience_s, say
        self.system, self.base = _open(url)
        self._whole = self.system.type_name in WHOLE

    def check_bucket(self) -> None:
        """ConfigError when the bucket is missing, which a reader would take for an empty one."""
        if self._whole:
            bucket = self.base.partition("/")[0]
            kind = self._try(f"look at bucket {bucket}", lambda: self.system.get_file_info(bucket).type.name)
            if kind == "NotFound":
                raise ConfigError(f"{self.url}: there is no bucket {bucket}; make it first")

    def get(self, name: str) -> bytes | None:
        """The bytes of `name`; None when there is none."""

        def read() -> bytes | None:
            try:
                with self.system.open_input_stream(self._at(name)) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        return self._try(f"read {name}", read)

    def fetch(self, name: str, to: Path) -> bool:
        """Copy `name` to the file `to`; False when there is none."""

        def copy() -> bool:
            try:
                stream = self.system.open_input_stream(self._at(name))
            except FileNotFoundError:
                return False
            with stream, to.open("wb") as file:
                while piece := stream.read(PIECE):
                    file.write(piece)
            return True

        return self._try(f"read {name}", copy)

    def put(self, name: str, data: bytes) -> None:
        """`name` is `data` from now on, or what it was."""
        self._try(f"write {name}", lambda: self._write(name, lambda stream: stream.write(data)))

    def send(self, name: str, file: Path) -> None:
        """`name` is the content of `file` from now on. A kill on the way may leave a part of it, never under WHOLE."""

        def copy(stream: Any) -> None:
            with file.open("rb") as source:
                while piece := source.read(PIECE):
                    stream.write(piece)

        self._try(f"write {name}", lambda: self._write(name, copy))

    def delete(self, name: str) -> None:
        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.system.delete_file(self._at(name))

        self._try(f"delete {name}", remove)

    def names(self, below: str = "", deep: bool = True) -> list[str]:
        """Names of the objects below `below`, sorted; not `deep`: of what is directly below it, folders too."""
        from pyarrow.fs import FileSelector, FileType

        where = self._at(below).rstrip("/")
        selector = FileSelector(where, recursive=deep, allow_not_found=True)
        found = self._try(f"list {below or self.url}", lambda: self.system.get_file_info(selector))
        return sorted(f.path.partition(f"{self.base}/")[2] for f in found if not deep or f.type == FileType.File)

    def _at(self, name: str) -> str:
        return f"{self.base}/{name}"

    def _write(self, name: str, fill: Callable[[Any], Any]) -> None:
        path = self._at(name)
        if self._whole:
            with self.system.open_output_stream(path) as stream:
                fill(stream)
            return
        self.system.create_dir(path.rpartition("/")[0], recursive=True)
        with self.system.open_output_stream(f"{path}.part") as stream:
            fill(stream)
        self.system.move(f"{path}.part", path)

    def _try(self, what: str, do: Callable[[], T]) -> T:
        until, pause, said = time.monotonic() + self.patience_s, FIRST_PAUSE_S, False
        while True:
            try:
                return do()
            except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
                why = _first_line(error)
                if refused := next((words for mark, words in REFUSALS.items() if mark in str(error)), None):
                    raise ConfigError(f"{self.url}: the store {refused} (to {what})") from None
                if getattr(error, "filename", None):  # of this machine's disk, not of the store
                    raise RunError(f"cannot {what}: {why}; free the disk") from None
                if time.monotonic() + pause > until:
                    raise RunError(
                        f"{self.url}: cannot {what}, tried for {self.patience_s:g} s ({why}); when the store is back, "
                        "the same command with --resume goes on"
                    ) from None
                if not said:
                    self.say(f"{self.url} cannot {what} ({why}); trying again for up to {self.patience_s:g} s")
                    said = True
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)


@contextlib.contextmanager
def delivered(place: str, last: str, say: Say = lambda text: None) -> Iterator[Path]:
    """A folder to write to, which is `place` in the end: itself, or for a URL one whose files go up after the block.

    The file `last` goes up last: whoever finds it finds all of them. An error in the block delivers nothing to a URL.
    """
    if not is_url(place):
        yield Path(place)
        return
    objects = Objects(place, say=say)
    objects.check_bucket()
    with tempfile.TemporaryDirectory(prefix="constellation-") as folder:
        made = Path(folder) / "out"
        yield made
        for file in sorted((f for f in made.rglob("*") if f.is_file()), key=lambda f: (f.name == last, f)):
            objects.send(file.relative_to(made).as_posix(), file)


def _first_line(error: BaseException) -> str:
    """The error in a line, without what a store may repeat of the request."""
    line = str(error).strip().partition("\n")[0]
    return line[max(line.find("AWS Error"), 0) :][:200] or type(error).__name__


def _open(url: str) -> tuple[Any, str]:
    """The file system of `url` and the path in it; ConfigError for a scheme that nothing here knows."""
    try:
        from pyarrow import ArrowException, fs
    except ImportError:
        raise ConfigError(f"{url}: pyarrow is needed to read a URL; pip install pyarrow") from None

    parts = urllib.parse.urlsplit(url)
    with _told(url):
        if parts.scheme == "s3":
            return _s3(parts), f"{parts.netloc}{parts.path}".rstrip("/")
        try:
            system, path = fs.FileSystem.from_uri(_with_limit(parts))
        except (ArrowException, ValueError) as error:
            if "nrecognized filesystem type" not in str(error):
                raise ConfigError(f"{url}: {_first_line(error)}") from None
            import fsspec

            options = dict(urllib.parse.parse_qsl(parts.query))
            system = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(parts.scheme, **options)))
            path = f"{parts.netloc}{parts.path}"
        return system, path.rstrip("/")


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """What fsspec says of a scheme that is unknown, or whose package is missing, for the user."""
    scheme = url.partition(":")[0]
    try:
        yield
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs a package: {_first_line(error) or error}") from None
    except ValueError as error:
        if "Protocol not known" in str(error):
            raise ConfigError(f"{scheme}:// is no scheme that is known here; s3://, gs://, abfs://, file://") from None
        raise ConfigError(f"{url}: {_first_line(error)}") from None
    except OSError as error:
        raise RunError(
            f"{url}: cannot be reached ({_first_line(error)}); try again when the network is there"
        ) from None


def _s3(parts: urllib.parse.SplitResult) -> Any:
    from pyarrow import fs

    asked = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    known = {"endpoint_override", "scheme", "region", "force_virtual_addressing", "anonymous"}
    if unknown := [name for name in asked if name not in known]:
        raise ConfigError(f"s3://{parts.netloc}{parts.path}: unknown ?{unknown[0]}; known: {', '.join(sorted(known))}")
    if "endpoint_override" not in asked:
        place = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        scheme, _, where = place.rpartition("://")
        asked |= {"endpoint_override": where.rstrip("/"), "scheme": scheme or "https"} if where else {}
    for name in ("force_virtual_addressing", "anonymous"):
        asked[name] = asked.get(name, "").lower() == "true"  # type: ignore[assignment]
    return fs.S3FileSystem(
        **asked,
        connect_timeout=CONNECT_S,
        request_timeout=ANSWER_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),  # ours is longer, and says so
    )


def _with_limit(parts: urllib.parse.SplitResult) -> str:
    """The URL; a Google store's own attempts end soon, as ours are longer."""
    if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in parts.query:
        parts = parts._replace(query="&".join(filter(None, [parts.query, f"retry_limit_seconds={ANSWER_S:g}"])))
    return urllib.parse.urlunsplit(parts)


def check_path(name: str) -> None:
    """ArtifactError unless `name` stays below the folder it is to be written to."""
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or not all(parts) or {".", ".."} & set(parts):
        raise ArtifactError(f"{name!r} is no name of a file of a run; the manifest is damaged or foreign")
