"""What training a constellation consists of, step by step; no Ray here.

    prepare    corpus -> split, tokenizer, token caches, config.json
    ocean_job  OCEAN reads everything
    fit_router the router is fitted on prefixes, every training byte is given to one kernel
    kernel_job a kernel branches from OCEAN and reads its own bytes

Every step finds what an earlier sitting finished and goes on from there, so the driver in launch.py,
a killed driver that is started again, and the experiments all call the same four functions.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from constellation.atomic import read_json, write_bytes, write_json
from constellation.config import OCEAN, ROLES, Config, dumps, from_json
from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.cache import TokenCache, build_cache, open_cache
from constellation.data.corpus import Corpus, Document, read_corpus
from constellation.errors import ConfigError
from constellation.train import checkpoint
from constellation.train.loop import Job, resolve_precision, steps_for
from router.assign import assign, segments
from router.fit import fit
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


def prepare(run: Path, corpus: Path | None, config: Config) -> tuple[Plan, Corpus]:
    """Read, split and tokenise `corpus` (None: the embedded one) into `run`; refuses another run's folder."""
    config = resolve_precision(config)
    documents = read_corpus(corpus, config.data)
    train, dev = documents.split(config.data.dev_fraction)
    manifest = run / "constellation.json"
    if manifest.exists():
        old = read_json(manifest)
        if old["corpus_hash"] != documents.hash or old["config"] != config.to_json():
            raise ConfigError(f"{run} holds another run (corpus or configuration differ); choose another --run")
        return open_plan(run), documents
    tokenizer_file = run / "tokenizer.json"
    if not tokenizer_file.exists():
        Tokenizer.train(_up_to(train, config.data.tokenizer_bytes), config.kernel.vocab_size).save(tokenizer_file)
    tokenizer = Tokenizer.load(tokenizer_file)
    caches = {name: build_cache(part, tokenizer, run / "data") for name, part in (("train", train), ("dev", dev))}
    write_bytes(run / "config.json", dumps(config).encode())
    write_json(manifest, {
        "schema": SCHEMA, "corpus": str(corpus) if corpus else "embedded", "corpus_hash": documents.hash,
        "config": config.to_json(), "roles": list(ROLES), "train": caches["train"].path.name,
        "dev": caches["dev"].path.name,
    })  # fmt: skip
    return open_plan(run), documents


def open_plan(run: Path) -> Plan:
    """The plan of an existing run; ConfigError when `run` is not one."""
    if not (run / "constellation.json").exists():
        raise ConfigError(
            f"{run} is not a constellation run (no constellation.json); start one: constellation train --run {run}"
        )
    manifest = read_json(run / "constellation.json")
    data = run / "data"
    return Plan(run, from_json(manifest["config"]), data / manifest["train"], data / manifest["dev"])


def ocean_job(plan: Plan) -> Job:
    config = plan.config
    return Job(
        OCEAN, plan.folder(OCEAN), config, steps_for(config, OCEAN, len(ROLES)), plan.train, plan.dev, plan.tokenizer
    )


def fit_router(plan: Plan) -> Router:
    """The fitted router, from disk when an earlier sitting fitted it; also writes each role's token ranges."""
    done = plan.router / "segments.json"
    if done.exists():
        return Router.load(plan.router)
    tokenizer, train, dev = Tokenizer.load(plan.tokenizer), open_cache(plan.train), open_cache(plan.dev)
    texts = document_bytes(train, tokenizer)
    settings = plan.config.router
    router = fit(texts, settings, seed=plan.config.train.seed, names=ROLES, validation=document_bytes(dev, tokenizer))
    router.save(plan.router)
    document_N = np.repeat(np.arange(len(texts)), np.diff(train.offsets))
    kernel_N = assign(router, texts, train.byte_offsets(tokenizer), document_N, settings.every, settings.hysteresis)
    ranges = {role: segments(kernel_N, k) for k, role in enumerate(ROLES)}
    for role, own in ranges.items():
        buffer = io.BytesIO()
        np.save(buffer, own, allow_pickle=False)
        write_bytes(plan.router / f"{role}.npy", buffer.getvalue())
    write_json(done, {role: int((own[:, 1] - own[:, 0]).sum()) for role, own in ranges.items()})
    return router


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
