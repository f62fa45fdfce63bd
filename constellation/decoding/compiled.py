"""The library made of the C sources of decoding and coordizer for the processor that runs it.

The C compiler of the machine (CC, or cc, gcc, clang) makes it once for these sources, compiler and processor, in a few
seconds; it is kept in XDG_CACHE_HOME, ~/.cache without. A folder shared by several kinds of machine holds one library
for each: what a processor has is part of the name. What lies there is loaded only if it and its folder are ours, nobody
else can write to them, and its content is what its name says; a damaged one is made again. Where that folder cannot be
written to, or nothing in it may be executed, one of the same kind below TMPDIR serves.

An image needs no compiler: CONSTELLATION_NATIVE_BUILT names a folder of libraries that were made before (built.py).
CONSTELLATION_NATIVE_MARCH names another architecture than this processor's own (gcc's -march), for tests.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from constellation.decoding import built
from constellation.decoding.built import FLAGS
from constellation.errors import ConfigError


class Unavailable(ConfigError):
    """There is no library on this machine; the reason."""


@functools.cache
def library() -> ctypes.CDLL:
    """The library, compiled when this machine has none yet; Unavailable with the reason."""
    if image := os.environ.get(built.FOLDER):
        try:
            return _typed(ctypes.CDLL(str(built.best(Path(image), _flags()))))
        except OSError as error:
            raise Unavailable(f"{built.FOLDER}={image}: {error}; unset it to compile one here") from None
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")
    compiler = shlex.split(os.environ.get("CC", found))
    if not compiler or not shutil.which(compiler[0]):
        raise Unavailable("no C compiler (cc, gcc, clang) is on the PATH; small kernels decode several times slower")
    words = [*compiler, _architecture(), *FLAGS, *built.sources(), "-lm"]
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    parts = [version, _processor(), *map(str.encode, (*compiler, _architecture(), *FLAGS))]
    parts += [path.read_bytes() for path in built.files()]
    name = "native-" + hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    reasons = []
    for folder in _folders():
        try:
            made = ctypes.CDLL(str(_made(words, folder, name)))
        except OSError as error:  # of the folder, or of the loader
            reasons.append(f"{folder}: {error}")
            continue
        return _typed(made)
    raise Unavailable(f"{'; '.join(reasons)}; set XDG_CACHE_HOME to a folder of yours that can be written to")


def _typed(made: ctypes.CDLL) -> ctypes.CDLL:
    lengths = ("forward_scratch", "product_scratch", "draw_scratch")
    for name in (*lengths, "pieces_count", "pieces_letters", "count_pairs", "merge_round"):
        getattr(made, name).restype = ctypes.c_int64
    made.pieces_new.restype = ctypes.c_void_p
    return made


def available() -> bool:
    try:
        library()
    except Unavailable:
        return False
    return True


def _folders() -> list[Path]:
    """Where the library may lie: in the cache of this user, or else of this user in a folder for temporary files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return [cache / "constellation", Path(tempfile.gettempdir()) / f"constellation-{os.getuid()}"]


def _made(words: Sequence[str], folder: Path, name: str) -> Path:
    """The library called `name`, compiled by `words` if there is none that is whole."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_ours(folder)
    lock = os.open(folder / ".making", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # nine kernels start at once: one of them compiles
        for path in folder.glob(f"{name}-*.so"):
            _check_ours(path)
            if path == _named(folder, name, path.read_bytes()):
                return path
            path.unlink()
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "native.so"
            done = subprocess.run([*words, "-o", str(made)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unavailable(f"{words[0]} cannot compile csrc: {done.stderr.strip()[-300:]}")
            made.chmod(0o700)
            with made.open("rb+") as file:
                path = _named(folder, name, file.read())
                os.fsync(file.fileno())
            os.replace(made, path)
            return path
    finally:
        os.close(lock)


def _named(folder: Path, name: str, content: bytes) -> Path:
    return folder / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _check_ours(path: Path) -> None:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:  # writable by others
        raise PermissionError(f"{path} is not ours alone")


def _architecture() -> str:
    if named := os.environ.get("CONSTELLATION_NATIVE_MARCH"):
        return f"-march={named}"
    return "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def _processor() -> bytes:
    """What distinguishes processors that a compiler tunes for."""
    lines = _cpuinfo() or [platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU part")
    return (
        "\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode() or platform.machine().encode()
    )


def _flags() -> frozenset[str]:
    """Extensions of the instruction set that this processor has, as Linux calls them."""
    return frozenset(word for line in _cpuinfo() if line.startswith(("flags", "Features")) for word in line.split())


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
