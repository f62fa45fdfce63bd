"""What training a constellation consists of, step by step; no Ray here.

    request    what is wanted: corpus and configuration, in RUN/constellation.json
    prepare    corpus -> split, tokenizer, token caches
    ocean_job  OCEAN reads everything
    fit_router the router is fitted on prefixes, every training byte is given to one kernel
    kernel_job a kernel branches from OCEAN and reads its own bytes

Every step finds what an earlier sitting finished and goes on from there, so the driver in launch.py,
a killed driver that is started again, and the experiments all call the same functions.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from constellation.atomic import read_json, write_bytes, write_json
from constellation.config import OCEAN, ROLES, Config, difference, from_json
from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.cache import TokenCache, build_cache, open_cache
from constellation.data.corpus import Document, read_corpus
from constellation.errors import ArtifactError, ConfigError, ConstellationError
from constellation.presets import small
from constellation.train import checkpoint
from constellation.train.loop import Job, resolve_precision, steps_for
from router.fit import fit
from router.partition import assign, segments
from router.policy import Policy
from router.route import Router

SCHEMA = 1


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


def request(run: Path, corpus: Path | None, config: Config | None, resume: bool) -> str:
    """Write down what is wanted before anything is done, so that a driver killed at once can be resumed.

    Without `resume`, `run` must be new. With it the run's own corpus and settings hold, and ones that are
    given again must be the same; a folder in which nothing was begun is begun if a corpus is named.
    Returns a line to say to the user, or "".
    """
    said = ""
    if resume:
        if (run / "constellation.json").exists():
            _check_same(run, corpus, config)
            return said
        if corpus is None:
            raise ConfigError(f"nothing to resume in {run}; leave out --resume to start a run there")
        said = f"nothing to resume in {run} yet: starting"
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ConfigError(f"{run} exists already; go on with --resume, or choose another --run")
    if corpus is not None and not corpus.exists():
        raise ConfigError(f"corpus {corpus} does not exist")
    where = None if corpus is None else str(corpus.resolve())
    settings = resolve_precision(config or small()).to_json()
    write_json(run / "constellation.json", {"schema": SCHEMA, "corpus": where, "config": settings})
    return said


def _check_same(run: Path, corpus: Path | None, config: Config | None) -> None:
    old_corpus, old, _ = open_request(run)
    if corpus is not None and corpus.resolve() != old_corpus:
        raise ConfigError(f"--corpus {corpus}: {run} reads {old_corpus or 'the embedded corpus'}; leave --corpus out")
    if config is not None:
        changed = difference(old, resolve_precision(config, recorded=old))
        if changed:
            name, (before, now) = next(iter(changed.items()))
            raise ConfigError(f"{name}={now}: {run} was started with {before}; leave it out, or choose another --run")


def open_request(run: Path) -> tuple[Path | None, Config, dict[str, Any]]:
    """(corpus, configuration, manifest) of a run folder; ConfigError when it is none."""
    manifest = run / "constellation.json"
    if not manifest.exists():
        way_out = f"start one: constellation train --run {run}"
        raise ConfigError(f"{run} is not a constellation run (no constellation.json); {way_out}")
    found = read_json(manifest)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ArtifactError(f"{manifest}: not a run of this version (schema {SCHEMA})")
    corpus = None if found["corpus"] is None else Path(found["corpus"])
    return corpus, from_json(found["config"]), found


def prepare(run: Path) -> Plan:
    """Read, split and tokenise the requested corpus into `run`; what an earlier sitting did is kept."""
    corpus, config, manifest = open_request(run)
    if "prepared" in manifest:
        return open_plan(run)
    try:
        documents = read_corpus(corpus, config.data)
    except ConstellationError:  # a corpus that cannot be used leaves no run behind
        (run / "constellation.json").unlink()
        if not any(run.iterdir()):
            run.rmdir()
        raise
    train, dev = documents.split(config.data.dev_fraction)
    Tokenizer.train(_up_to(train, config.data.tokenizer_bytes), config.kernel.vocab_size).save(run / "tokenizer.json")
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    caches = {name: build_cache(part, tokenizer, run / "data") for name, part in (("train", train), ("dev", dev))}
    prepared = {name: cache.path.name for name, cache in caches.items()}
    write_json(run / "corpus.json", {"hash": documents.hash, "report": documents.report.lines()})
    write_json(run / "constellation.json", {**manifest, "corpus_hash": documents.hash, "prepared": prepared})
    return open_plan(run)


def open_plan(run: Path) -> Plan:
    """The plan of a prepared run; ConfigError when it is not one, or not prepared yet."""
    _, config, manifest = open_request(run)
    if "prepared" not in manifest:
        raise ConfigError(f"{run} was interrupted before its corpus was read; constellation train --run {run} --resume")
    caches = {name: run / "data" / folder for name, folder in manifest["prepared"].items()}
    return Plan(run, config, caches["train"], caches["dev"])


def ocean_job(plan: Plan) -> Job:
    config = plan.config
    return Job(
        OCEAN, plan.folder(OCEAN), config, steps_for(config, OCEAN, len(ROLES)), plan.train, plan.dev, plan.tokenizer
    )


def fit_router(plan: Plan) -> Router:
    """The fitted router, from disk when an earlier sitting fitted it; also writes each role's token ranges."""
    if (plan.router / "segments.json").exists():
        return Router.load(plan.router)
    router: Router = fit_policy(fit, plan)
    router.save(plan.router)
    write_assignment(plan.router, router, plan)
    return router


def fit_policy(fit: Callable[..., Any], plan: Plan) -> Any:
    """`fit` (of the router or a baseline) on the training documents; every tenth calibrates, dev text is not seen."""
    texts = document_bytes(open_cache(plan.train), Tokenizer.load(plan.tokenizer))
    held = texts[::10] if len(texts) >= 10 * len(ROLES) else texts
    rest = [t for i, t in enumerate(texts) if i % 10] if held is not texts else texts
    return fit(rest, plan.config.router, seed=plan.config.train.seed, names=ROLES, validation=held)


def write_assignment(folder: Path, policy: Policy, plan: Plan) -> None:
    """Write the token ranges that each role reads under `policy`: <role>.npy, and last their sizes, segments.json."""
    tokenizer, train, settings = Tokenizer.load(plan.tokenizer), open_cache(plan.train), plan.config.router
    texts = document_bytes(train, tokenizer)
    document_N = np.repeat(np.arange(len(texts)), np.diff(train.offsets))
    kernel_N = assign(policy, texts, train.byte_offsets(tokenizer), document_N, settings.every, settings.hysteresis)
    ranges = {role: segments(kernel_N, k) for k, role in enumerate(ROLES)}
    for role, own in ranges.items():
        buffer = io.BytesIO()
        np.save(buffer, own, allow_pickle=False)
        write_bytes(folder / f"{role}.npy", buffer.getvalue())
    write_json(folder / "segments.json", {role: int((own[:, 1] - own[:, 0]).sum()) for role, own in ranges.items()})


def document_bytes(cache: TokenCache, tokenizer: Tokenizer) -> list[bytes]:
    """The text of every document of a cache, from its tokens (the tokenizer is lossless)."""
    return [
        tokenizer.decode(cache.tokens[a : b - 1].tolist())
        for a, b in zip(cache.offsets[:-1], cache.offsets[1:], strict=True)
    ]


def kernel_job(plan: Plan, role: str) -> Job:
    """`role` branches from OCEAN's last checkpoint and reads its own token ranges."""
    config = plan.config.for_role(role)
    branch = checkpoint.folder_of(plan.folder(OCEAN), ocean_job(plan).steps)
    return Job(
        role, plan.folder(role), config, steps_for(config, role, len(ROLES)), plan.train, plan.dev, plan.tokenizer,
        plan.router / f"{role}.npy", branch,
    )  # fmt: skip


def _up_to(documents: Sequence[Document], max_bytes: int) -> Iterator[str]:
    """Texts of `documents` until they reach `max_bytes`."""
    size = 0
    for document in documents:
        if size >= max_bytes:
            return
        size += len(document.text.encode())
        yield document.text
