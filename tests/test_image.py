"""The image's own steps without Docker, and the libraries that it holds instead of a compiler."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from constellation.decoding.built import LEVELS, best, build, named

ROOT = Path(__file__).parent.parent
INSTALL = ROOT / "deploy" / "image" / "install.sh"
V3 = frozenset(LEVELS["x86_64"]["x86-64-v3"])
ASKED = """
from constellation.config import Kernel
from constellation.decoding.batch import Batch
from constellation.kernel.model import KernelLM
from constellation.decoding.compiled import Unavailable, library
print(Batch(KernelLM(Kernel(vocab_size=300, width=32, layers=1, heads=2, hidden=40, context=16))).stats()["native"])
try:
    print(library()._name)
except Unavailable as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("flags", "level"),
    [(frozenset(), "x86-64"), (V3, "x86-64-v3"), (V3 | {"avx512f"}, "x86-64-v3"),
     (V3 | frozenset(LEVELS["x86_64"]["x86-64-v4"]), "x86-64-v4")],
    ids=["old", "avx2", "half of avx512", "avx512"],
)  # fmt: skip
def test_a_processor_gets_the_highest_level_that_it_has(flags: frozenset[str], level: str, tmp_path: Path) -> None:
    for each in LEVELS["x86_64"]:
        named(tmp_path, each).touch()
    assert best(tmp_path, flags, "x86_64") == named(tmp_path, level)


def test_a_library_of_other_sources_or_processors_is_none(tmp_path: Path) -> None:
    (tmp_path / "x86-64-v3-0123456789abcdef.so").touch()
    for machine in ("x86_64", "aarch64", "riscv64"):
        with pytest.raises(FileNotFoundError, match="no library of these sources"):
            best(tmp_path, V3, machine)


def asked(**changes: str) -> list[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": "/dev/null", "TMPDIR": "/dev/null", "CC": "no-such-compiler"}
    return subprocess.run(
        [sys.executable, "-c", ASKED], env={**environment, **changes}, capture_output=True, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.skipif(platform.machine() not in LEVELS or not shutil.which("cc"), reason="no compiler for this processor")
def test_kernels_decode_by_a_built_library_where_there_is_no_compiler(tmp_path: Path) -> None:
    built = build(tmp_path)
    assert [path.name.rpartition("-")[0] for path in built] == list(LEVELS[platform.machine()])
    native, library = asked(CONSTELLATION_NATIVE_BUILT=str(tmp_path))
    assert native == "True" and Path(library) in built
    native, error = asked(CONSTELLATION_NATIVE_BUILT=str(tmp_path / "empty"))
    assert native == "False" and "holds no library" in error and "unset it" in error


def test_the_steps_refuse_a_device_that_they_do_not_know(tmp_path: Path) -> None:
    done = subprocess.run([INSTALL, ROOT, tmp_path / "prefix", "tpu"], capture_output=True, text=True)
    assert done.returncode == 2 and "'tpu'; cpu or cuda is wanted" in done.stderr and not list(tmp_path.iterdir())


def test_the_dockerfile_says_what_the_steps_make() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^RUN (/source/\S+) (\S+) (\S+)", text, re.M) == [
        ("/source/deploy/image/install.sh", "/source", "/opt/constellation")
    ]
    last = text.rpartition("\nFROM ")[2]
    assert "CONSTELLATION_NATIVE_BUILT=/opt/constellation/lib/constellation" in last
    assert "gcc" not in last and re.search(r"^USER (?!root)\w+", last, re.M)


@pytest.mark.slow
def test_the_steps_in_an_empty_folder_give_an_installation_that_works_without_checkout_and_compiler(
    tmp_path: Path,
) -> None:
    """Some minutes: it installs torch and Ray anew."""
    source, prefix = tmp_path / "source", tmp_path / "prefix"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    script = source / "deploy" / "image" / "install.sh"
    subprocess.run([script, source, prefix], env={"TORCH_INDEX": "", **kept}, check=True)
    shutil.rmtree(source)
    home = tmp_path / "home"
    home.mkdir()
    alone = {
        "PATH": f"{prefix}/bin", "HOME": str(home), "CONSTELLATION_NATIVE_BUILT": f"{prefix}/lib/constellation",
        "LANG": "C.UTF-8",
    }  # fmt: skip
    done = subprocess.run([prefix / "bin/constellation", "doctor"], env=alone, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^ok +decoding +native$", done.stdout, re.M)
