"""Evaluate a run on held-out text: every model of it in this process; no Ray here."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.cache import TokenCache, build_cache, open_cache
from constellation.data.corpus import read_corpus
from constellation.errors import DataError
from constellation.pipeline.prepare import Plan, document_bytes, open_plan
from constellation.processor import cores
from constellation.train.checkpoint import load_model
from constellation.train.score import score
from router.decide.evaluate import Scores, evaluate
from router.decide.fisher_rao import FisherRaoRouter


def evaluate_run(run: Path, corpus: Path | None, top_k: int = 3, scores: Scores | None = None) -> dict[str, Any]:
    """Bits per byte of every way to answer `corpus` (None: the run's held-out documents), as plain data.

    `scores` are those of the held-out documents where they are known (read_scores).
    """
    plan = open_plan(run)
    router = FisherRaoRouter.load(plan.router)
    tokenizer = Tokenizer.load(plan.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        cache, excluded, problems = open_cache(plan.dev), 0, []
        if corpus is not None:
            documents = read_corpus(corpus, plan.config.data)
            trained = set(open_cache(plan.train).ids)
            held_out = [d for d in documents.documents if d.id not in trained]
            excluded, problems = len(documents.documents) - len(held_out), documents.report.lines()
            if not held_out:
                raise DataError(f"{corpus}: all {excluded} documents are part of the run's training text")
            cache = build_cache(held_out, tokenizer, Path(scratch))
        if scores is None or corpus is not None:
            scores = _read(plan, cache, tokenizer)
        settings = plan.config.router
        texts = document_bytes(cache, tokenizer)
        answers = evaluate(
            scores, router, texts, settings.every, settings.hysteresis, (min(top_k, len(plan.config.kernels)),)
        )
    return {
        "run": str(run),
        "corpus": str(corpus) if corpus else "held out by the run",
        "documents": len(cache.byte_length),
        "bytes": int(cache.byte_length.sum()),
        "excluded_documents": excluded,
        "problems": problems,
        "every_bytes": settings.every,
        "router_hash": router.hash,
        "answers": answers,
    }


def read_scores(run: Path) -> Scores:
    """The held-out documents of `run` under every model of it; no router has a part in it."""
    plan = open_plan(run)
    return _read(plan, open_cache(plan.dev), Tokenizer.load(plan.tokenizer))


def _read(plan: Plan, cache: TokenCache, tokenizer: Tokenizer) -> Scores:
    """The table of Scores, models side by side on the cores."""
    models = {role: load_model(plan.folder(role)) for role in plan.config.models}
    precision = plan.config.train.precision
    torch.set_num_threads(1)
    with ThreadPoolExecutor(cores()) as pool:
        parts = pool.map(lambda model: np.concatenate(score(model, cache, precision=precision)), models.values())
        ocean, *kernels = parts
    counts = np.diff(cache.offsets)
    document_N = np.repeat(np.arange(len(counts)), counts)
    byte_N = cache.byte_offsets(tokenizer)
    _, *names = models
    return Scores(tuple(names), ocean, np.stack(kernels), document_N, byte_N, cache.byte_length, tuple(cache.domains))
