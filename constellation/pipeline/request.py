"""What is wanted of a run folder, and where its parts are: RUN/constellation.json. Neither torch nor Ray here.

So a wrong path or setting is told before either is imported.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from constellation.config import Config, difference, from_json, override
from constellation.errors import ArtifactError, ConfigError, DataError, PlacementError
from constellation.pipeline import beginning
from constellation.presets import small
from constellation.storage.atomic import read_object, write_json

SCHEMA = 1
REQUEST = "constellation.json"
MAY_CHANGE = ("train.budget_usd", "cluster.usd_per_hour")  # of a run that goes on: they decide no weight


@dataclass(frozen=True)
class Plan:
    """A prepared run: paths and the resolved configuration."""

    run: Path
    config: Config
    train: Path  # token cache of the training documents
    dev: Path  # token cache of the held-out documents

    @property
    def tokenizer(self) -> Path:
        return self.run / "tokenizer.json"

    @property
    def router(self) -> Path:
        return self.run / "router"

    def folder(self, role: str) -> Path:
        return self.run / role


def check_request(run: Path, corpus: Path | None, config: Config | None, resume: bool) -> str:
    """ConfigError unless `request` would be met; returns a line to say to the user, or ""."""
    said = ""
    if resume:
        if (run / REQUEST).exists():
            _check_same(run, corpus, config)
            return said
        if corpus is None:
            raise ConfigError(f"nothing to resume in {run}; leave out --resume to start a run there")
        said = f"nothing to resume in {run} yet: starting"
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ConfigError(f"{run} exists already; go on with --resume, or choose another --run")
    if corpus is not None and not corpus.exists():
        raise ConfigError(f"corpus {corpus} does not exist")
    if config is not None and config.pretrained.given:
        beginning.check(config)
    return said


def request(run: Path, corpus: Path | None, config: Config | None, resume: bool) -> str:
    """Write down what is wanted before anything is done, so that a driver killed at once can be resumed.

    Without `resume`, `run` must be new. With it the run's own corpus and settings hold, and ones that are
    given again must be the same; a folder in which nothing was begun is begun if a corpus is named.
    Returns a line to say to the user, or "".
    """
    said = check_request(run, corpus, config, resume)
    if not (run / REQUEST).exists():
        from constellation.train.job import resolve_precision

        where = None if corpus is None else str(corpus.resolve())
        settings = resolve_precision(config or small()).to_json()
        write_request(run, {"schema": SCHEMA, "corpus": where, "config": settings})
    elif config is not None:
        _, old, manifest = open_request(run)
        changes = {name: now for name, (_, now) in difference(old, config).items() if name in MAY_CHANGE}
        if changes:
            write_request(run, {**manifest, "config": override(old, changes).to_json()})
    return said


@contextlib.contextmanager
def withdrawn(run: Path, fresh: bool) -> Iterator[None]:
    """Takes the request for a new run back when it turns out to be impossible before anything was done."""
    try:
        yield
    except (PlacementError, ConfigError, DataError):
        if fresh and {file.name for file in run.iterdir()} <= {REQUEST, ".lock"}:
            shutil.rmtree(run)
        raise


def write_request(run: Path, manifest: dict[str, Any]) -> None:
    write_json(run / REQUEST, manifest, sealed=True)


def _check_same(run: Path, corpus: Path | None, config: Config | None) -> None:
    old_corpus, old, _ = open_request(run)
    if corpus is not None and corpus.resolve() != old_corpus:
        raise ConfigError(f"--corpus {corpus}: {run} reads {old_corpus or 'the embedded corpus'}; leave --corpus out")
    for name, (before, now) in difference(old, config or old).items():
        if now != "auto" and name not in MAY_CHANGE:  # left to the machine, which had chosen when the run was started
            raise ConfigError(f"{name}={now}: {run} was started with {before}; leave it out, or choose another --run")


def open_request(run: Path) -> tuple[Path | None, Config, dict[str, Any]]:
    """(corpus, configuration, manifest) of a run folder; ConfigError when it is none."""
    manifest = run / REQUEST
    if not manifest.exists():
        way_out = f"start one: constellation train --run {run}"
        raise ConfigError(f"{run} is not a constellation run (no {REQUEST}); {way_out}")
    found = read_object(manifest)
    if found.get("schema") != SCHEMA:
        raise ArtifactError(f"{manifest}: not a run of this version (schema {SCHEMA})")
    try:
        corpus = None if found["corpus"] is None else Path(found["corpus"])
        return corpus, from_json(found["config"]), found
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{manifest} is damaged ({type(error).__name__}: {error})") from None


def open_plan(run: Path) -> Plan:
    """The plan of a prepared run; ConfigError when it is not one, or not prepared yet."""
    _, config, manifest = open_request(run)
    if "prepared" not in manifest:
        raise ConfigError(f"{run} was interrupted before its corpus was read; constellation train --run {run} --resume")
    try:
        train, dev = (run / "data" / manifest["prepared"][name] for name in ("train", "dev"))
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{run / REQUEST} is damaged ({type(error).__name__}: {error})") from None
    return Plan(run, config, train, dev)
