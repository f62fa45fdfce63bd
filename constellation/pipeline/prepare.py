"""What training a constellation consists of, step by step; no Ray here.

    request    what is wanted: corpus and configuration, in RUN/constellation.json (request.py)
    prepare    corpus -> split, tokenizer, token caches
    ocean_job  OCEAN reads everything, from random or pretrained weights (beginning.py); or is taken as it is
    fit_router the router is fitted on prefixes, every training byte is given to one kernel
    kernel_job a kernel branches from OCEAN and reads its own bytes

Every step finds what an earlier sitting finished and goes on from there, so the driver in launch.py,
a killed driver that is started again, and the experiments all call the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation.artifacts import segments
from constellation.config import Config
from constellation.coordizer import trainer
from constellation.coordizer.coordinates import on_simplex
from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.cache import TokenCache, build_cache, open_cache
from constellation.data.corpus import Document, read_corpus
from constellation.decoding import basins
from constellation.errors import ConfigError, ConstellationError
from constellation.pipeline import beginning
from constellation.pipeline.request import REQUEST, Plan, open_plan, open_request, request, write_request
from constellation.roster import OCEAN
from constellation.storage.atomic import write_json
from constellation.train import checkpoint, loop
from constellation.train.job import Job, steps_for
from router.decide import partition
from router.decide.fisher_rao import FisherRaoRouter
from router.decide.fit import fit
from router.decide.policy import Policy

__all__ = [
    "Plan",
    "fit_router",
    "kernel_job",
    "ocean_job",
    "open_plan",
    "open_request",
    "prepare",
    "request",
    "take_ocean",
]


def prepare(run: Path) -> Plan:
    """Read, split and tokenise the requested corpus into `run`; what an earlier sitting did is kept."""
    corpus, config, manifest = open_request(run)
    if "prepared" in manifest:
        return open_plan(run)
    try:
        documents = read_corpus(corpus, config.data)
    except ConstellationError:  # a corpus that cannot be used leaves no run behind
        (run / REQUEST).unlink()
        if not any(run.iterdir()):
            run.rmdir()
        raise
    train, dev = documents.split(config.data.dev_fraction)
    z = None
    if config.pretrained.given:
        beginning.write(run, config)
    else:
        made, z = _tokenizer(train, config)
        made.save(run / "tokenizer.json")
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    caches = {name: build_cache(part, tokenizer, run / "data") for name, part in (("train", train), ("dev", dev))}
    if z is not None:
        _write_basins(run, z, tokenizer, caches["train"])
    prepared = {name: cache.path.name for name, cache in caches.items()}
    write_json(run / "corpus.json", {"hash": documents.hash, "report": documents.report.lines()})
    write_request(run, {**manifest, "corpus_hash": documents.hash, "prepared": prepared})
    return open_plan(run)


def _tokenizer(train: Sequence[Document], config: Config) -> tuple[Tokenizer, NDArray[np.float32] | None]:
    """The tokenizer of a run, of the named folder or learnt from its training text, and coordinates if it has some."""
    asked, size = config.coordizer, config.kernel.vocab_size
    if asked.folder:
        found = trainer.load(Path(asked.folder))
        has = found.tokenizer.vocab_size
        if has > size:
            raise ConfigError(f"kernel.vocab_size={size}: {asked.folder} has {has} tokens; set it to that")
        return found.tokenizer, found.coordinates_VN
    texts = _up_to(train, config.data.tokenizer_bytes)
    if asked.score == "frequency":  # the library's own trainer, whose merges are the same
        return Tokenizer.train(texts, size), None
    own = trainer.learnt(train[: len(list(texts))], size, asked)
    return own.tokenizer, own.coordinates_VN


def _write_basins(run: Path, z: NDArray[np.float32], tokenizer: Tokenizer, train: TokenCache) -> None:
    """What the sampler's basin terms need, counted in the training text."""
    p_VN = on_simplex(z)
    table = basins.transitions(p_VN.argmax(-1), train.tokens, p_VN.shape[1])
    basins.write(run, p_VN, table, tokenizer.hash)


def ocean_job(plan: Plan) -> Job:
    steps = steps_for(plan.config, OCEAN)
    branch = beginning.folder_of(plan.run) if plan.config.pretrained.given else None
    return Job(OCEAN, plan.folder(OCEAN), plan.config, steps, plan.train, plan.dev, plan.tokenizer, branch=branch)


def take_ocean(plan: Plan) -> bool:
    """Whether OCEAN is the pretrained model as it is; then it is in place, evaluated once."""
    job = ocean_job(plan)
    if job.steps:
        return False
    for _ in loop.fit(job):
        raise AssertionError("no step is planned")
    return True


def fit_router(plan: Plan) -> FisherRaoRouter:
    """The fitted router, from disk when an earlier sitting fitted it; also writes each role's token ranges."""
    if (plan.router / segments.LISTING).exists():
        return FisherRaoRouter.load(plan.router)
    router: FisherRaoRouter = fit_policy(fit, plan)
    router.save(plan.router)
    write_assignment(plan.router, router, plan)
    return router


def fit_policy(fit: Callable[..., Any], plan: Plan) -> Any:
    """`fit` (of the router or a baseline) on the training documents; every tenth calibrates, dev text is not seen."""
    texts = document_bytes(open_cache(plan.train), Tokenizer.load(plan.tokenizer))
    held = texts[::10] if len(texts) >= 10 * plan.config.constellation.kernels else texts
    rest = [t for i, t in enumerate(texts) if i % 10] if held is not texts else texts
    return fit(rest, plan.config.router, seed=plan.config.train.seed, names=plan.config.kernels, validation=held)


def write_assignment(folder: Path, policy: Policy, plan: Plan) -> None:
    """Write the token ranges that each role reads under `policy` (artifacts/segments.py)."""
    tokenizer, train, settings = Tokenizer.load(plan.tokenizer), open_cache(plan.train), plan.config.router
    texts = document_bytes(train, tokenizer)
    document_N = np.repeat(np.arange(len(texts)), np.diff(train.offsets))
    offset_N = train.byte_offsets(tokenizer)
    kernel_N = partition.assign(policy, texts, offset_N, document_N, settings.every, settings.hysteresis)
    segments.write(folder, {role: partition.segments(kernel_N, k) for k, role in enumerate(plan.config.kernels)})


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
    steps = steps_for(config, role)
    return Job(
        role, plan.folder(role), config, steps, plan.train, plan.dev, plan.tokenizer,
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
