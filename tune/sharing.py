"""What evaluations of a sweep have in common is made once, under a lock, and linked into their folders. No Ray here.

    OUT/shared/DIGEST/    corpus, tokenizer and token caches, for every trial with the same settings of them;
                          or a run of the sweep's own settings: OCEAN and router, or kernels too where trials use them

Files are written whole and never changed, so a link is as good as a copy; where the file system has no links they are
copied. What a shared run cost lies in its spent.json; the first evaluation that was to use it is charged with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from constellation.config import Config, difference, override
from constellation.errors import ConfigError
from constellation.storage.atomic import read_object, write_json
from constellation.storage.exclusive import exclusive
from tune.work import StopFile, Stopped, Work

if TYPE_CHECKING:
    from constellation.pipeline.prepare import Plan

SPENT = "spent.json"
LOCK_WAIT_S = 600.0
OF_KERNELS = {
    "train.kernel_batch", "train.kernel_warmup", "train.kernel_lr_scale", "train.decay", "train.inherit_optimizer",
    "train.threads",
}  # fmt: skip
AFTER_BRANCH = ("constellation", "router", "decode", "cluster", "preset", "roles")  # nothing of them reaches OCEAN
Used = dict[str, float]
"""cpu_s and wall_s."""


def same_ocean(one: Config, other: Config) -> bool:
    """Whether both train the same OCEAN: they differ in nothing but what comes after the branch point."""
    return all(name in OF_KERNELS or name.partition(".")[0] in AFTER_BRANCH for name in difference(one, other))


def same_router(one: Config, other: Config) -> bool:
    """Whether both fit the same router, given the same OCEAN."""
    return not any(name.startswith(("router.", "constellation.")) for name in difference(one, other))


def prepared(corpus: Path | None, config: Config, shared: Path) -> Plan:
    """Corpus, tokenizer and caches for `config`, made once for everybody with the same settings of them."""
    from constellation.pipeline import prepare

    run = shared / _digest({"corpus": str(corpus), "data": asdict(config.data), "vocab_size": config.kernel.vocab_size})
    alike = {f"data.{name}": value for name, value in asdict(config.data).items()}
    reading = override(Config(), {**alike, "kernel.vocab_size": config.kernel.vocab_size, "train.precision": "fp32"})
    with exclusive(shared, LOCK_WAIT_S, name=f".{run.name}.lock"):
        prepare.request(run, corpus, reading, resume=True)
        return prepare.prepare(run)


def begun(run: Path, work: Work, config: Config, trained: Path | None = None, parts: Iterable[str] = ()) -> Plan:
    """The run folder `run` of `config`, with shared corpus and caches, and these folders of the run `trained`."""
    from constellation.pipeline import request

    request.request(run, work.corpus, config, resume=True)
    _, _, manifest = request.open_request(run)
    if "prepared" not in manifest:
        source = prepared(work.corpus, config, work.shared).run
        _, _, theirs = request.open_request(source)
        for name in ("tokenizer.json", "corpus.json", "data"):
            _link(source / name, run / name)
        request.write_request(run, {**manifest, **{key: theirs[key] for key in ("corpus_hash", "prepared")}})
    for part in parts:
        assert trained is not None
        _link(trained / part, run / part)
    return request.open_plan(run)


def own_run(work: Work) -> tuple[Path, Config]:
    """Folder and configuration of the run of the sweep's own settings that `work` shares with others."""
    config = override(work.default, {"train.tokens": round(work.tokens)})
    return work.shared / _digest({"corpus": str(work.corpus), "config": config.to_json()}), config


def once(run: Path, work: Work, elsewhere: Used, there: Callable[[], bool], make: Callable[[StopFile], None]) -> None:
    """`make` what is not `there` in the shared folder `run`, unless somebody else does: then wait for it.

    The time of it all is added to `elsewhere`, that of making to the folder's spent.json. Stopped when asked to stop.
    """
    stop = StopFile(work.stop)
    with _measured(lambda used: _add(elsewhere, used)):
        try:
            with exclusive(work.shared, math.inf, stop.asked, name=f".{run.name}.lock"):
                if not there():
                    with _measured(lambda used: write_json(run / SPENT, _add(spent(run), used), sealed=True)):
                        make(stop)
        except ConfigError:
            if stop.seen:
                raise Stopped from None
            raise


def spent(folder: Path) -> Used:
    """What has been used in `folder` by earlier sittings."""
    return read_object(folder / SPENT) if (folder / SPENT).exists() else {"cpu_s": 0.0, "wall_s": 0.0}


@contextlib.contextmanager
def _measured(told: Callable[[Used], Any]) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        told({"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall})


def _add(used: Used, more: Used) -> Used:
    for kind in used:
        used[kind] += more[kind]
    return used


def _link(source: Path, target: Path) -> None:
    """`target` is `source`, a file or a folder, whole or absent; one that is there stays."""
    if target.exists():
        return
    beside = target.with_name(f".{target.name}.linked")
    shutil.rmtree(beside, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, beside, copy_function=_one, ignore=shutil.ignore_patterns(".*"))
    else:
        beside.unlink(missing_ok=True)
        _one(str(source), str(beside))
    beside.rename(target)


def _one(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
