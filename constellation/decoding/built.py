"""Libraries of csrc/ folders that were compiled before, for machines without a compiler: an image has one a level.

    python -m constellation.decoding.built FOLDER     compiles them
    CONSTELLATION_NATIVE_BUILT=FOLDER                 takes them instead of a compiler

A level is what gcc's -march calls so; the highest that this processor has is taken. All of them compute the same bits.
A name says of which sources a library is made, so that one of another version is never loaded.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCES = tuple(Path(__file__).parents[1] / part / "csrc" for part in ("decoding", "coordizer"))
FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
FOLDER = "CONSTELLATION_NATIVE_BUILT"
AVX2 = ("avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe")  # as Linux calls what is above every x86-64
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {  # level -> flags of a processor that has it, highest first
    "x86_64": {
        "x86-64-v4": (*AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
        "x86-64-v3": AVX2,
        "x86-64": (),
    },
    "aarch64": {"armv8-a": ()},
}


def best(folder: Path, flags: frozenset[str], machine: str = platform.machine()) -> Path:
    """The library in `folder` for a processor with `flags`; OSError when there is none of these sources."""
    wanted = [named(folder, level) for level, needs in LEVELS.get(machine, {}).items() if flags.issuperset(needs)]
    for path in wanted:
        if path.exists():
            return path
    raise FileNotFoundError(f"{folder} holds no library of these sources for this {machine} processor")


def build(folder: Path, compiler: Sequence[str] = ("cc",), machine: str = platform.machine()) -> list[Path]:
    """Compile the library for every level of `machine` into `folder`; CalledProcessError with the compiler's words."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for level in LEVELS[machine]:
        path = named(folder, level)
        subprocess.run([*compiler, f"-march={level}", *FLAGS, *sources(), "-lm", "-o", str(path)], check=True)
        path.chmod(0o755)
        made.append(path)
    return made


def sources() -> list[str]:
    return [str(path) for path in files() if path.suffix == ".c"]


def files() -> list[Path]:
    """All that the library is made of, in a fixed order."""
    return [path for folder in SOURCES for path in sorted(folder.iterdir())]


def named(folder: Path, level: str) -> Path:
    return folder / f"{level}-{_version()}.so"


@functools.cache
def _version() -> str:
    """Of the sources."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files())).hexdigest()[:16]


if __name__ == "__main__":
    for path in build(Path(sys.argv[1])):
        print(path)
