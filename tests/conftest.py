"""Fixtures that several test files share: one Ray for the whole session, one small run trained without Ray."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from constellation.config import Config

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch: threads of several processes fight for cores
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="constellation-tests-")  # what is up here is not the user's
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], True)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, whose children could not be stopped
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("same", deadline=None, derandomize=True)  # no test asserts a time
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that need a Ray come first: they take longest."""
    items.sort(key=lambda item: not needs_ray(item.path))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`make test`: a file stays in one process, and one process takes all that need a Ray, so that one Ray is up."""
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):  # type: ignore[misc,unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "ray" if needs_ray(config.rootpath / file) else file

    return OneRay(config, log)


@cache
def needs_ray(file: Path) -> bool:
    return "mark.ray" in file.read_text()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """An embedded Ray with 4 logical CPUs, started once (5 s) and shared; call what you start in it `unique`."""
    from actors.connect import connected

    with connected(num_cpus=4):
        yield


@pytest.fixture
def unique() -> str:
    """A name nobody else has: of a constellation, hence of its actors' namespace."""
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def micro() -> Config:
    """18 thousand parameters a kernel; OCEAN takes 34 steps of 50 ms, three kernels 90 of 20 ms, the others 8."""
    from constellation.config import override
    from constellation.presets import tiny
    from constellation.roster import ROLES

    return override(tiny(), {
        "kernel.vocab_size": 288, "train.tokens": 807_000, "train.ocean_share": 0.0867, "train.batch": 32,
        "train.kernel_batch": 16, "train.checkpoint_every": 11, "train.eval_bytes": 2048, "train.sample_bytes": 0,
        "train.precision": "fp32", "optim.ns_precision": "fp32", "train.ocean_threads": 1,
        "router.dims": 16, "router.max_prefix": 512,
        **{f"{role}.train.tokens": 73_000 for role in ROLES[3:]},
    })  # fmt: skip


@pytest.fixture(scope="session")
def micro_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pages of Python's language reference, 100 KB."""
    import pydoc_data.topics

    folder = tmp_path_factory.mktemp("corpus")
    for name, text in list(pydoc_data.topics.topics.items())[:60]:
        (folder / f"{name}.txt").write_text(text[:2000])
    return folder


@pytest.fixture(scope="session")
def micro_run(tmp_path_factory: pytest.TempPathFactory, micro_corpus: Path, micro: Config) -> Path:
    """A whole run of `micro`, trained by the plain loop in this process: no Ray, left alone. Read it, copy it."""
    import constellation

    run = tmp_path_factory.mktemp("runs") / "alone"
    for _ in constellation.train(micro_corpus, run, micro, local=True):
        pass
    return run
