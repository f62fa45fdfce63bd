"""Does the constellation beat one dense kernel? Equal tokens, equal FLOPs, several seeds.

Arms (all kernels have N parameters and see the same number of training tokens in all):

    dense          one kernel reads everything
    dense_token    the same with the true domain's token first in every window (it knows the domain)
    fisher_rao     OCEAN for a share of the tokens, then eight kernels on the router's own assignment
    tfidf          the same with c-BTM's router: tf-idf, SVD, balanced k-means
    random         the same with documents dealt at random
    true_domains   the same with the true domain, known at byte 0

The four routed arms of a seed branch from one OCEAN; its tokens are charged to each. A seed changes
initialisation, data order and clustering. Arms are paired by seed; see statistics.py for the
intervals. Intervals, verdicts and kill rules: dense_report.py.
Everything a task did lies in the work folder, so a second call goes on where the first was stopped.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation.config import Config, override
from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.batches import Batches
from constellation.data.cache import TokenCache, open_cache
from constellation.errors import ConfigError
from constellation.experiments.dense_report import analyse
from constellation.experiments.harness import described, prepared
from constellation.pipeline.prepare import (
    Plan,
    document_bytes,
    fit_policy,
    ocean_job,
    write_assignment,
)
from constellation.roster import OCEAN, ROLES
from constellation.train.checkpoint import folder_of, load_model, newest
from constellation.train.job import Job, steps_for
from constellation.train.loop import fit
from constellation.train.score import score
from router.decide.baselines import RandomRouter, TfidfRouter
from router.decide.evaluate import Scores, answers
from router.decide.fit import fit as fit_router
from router.decide.policy import Policy, Trajectory

ROUTED = ("fisher_rao", "tfidf", "random", "true_domains")
MIXTURE = 3  # kernels of the top-k mixture


class LabelledBatches:
    """Rows of one domain each, in turn, with the domain's reserved token first: x = token, t_1 .. t_{T-1}."""

    def __init__(self, cache: TokenCache, labels: Sequence[int], context: int, batch: int, seed: int):
        self.batch, self.groups = batch, sorted(set(labels))
        edges = np.stack([cache.offsets[:-1], cache.offsets[1:]], axis=1)
        own = [edges[np.array([x == g for x in labels])] for g in self.groups]
        self._streams = [Batches(cache, ranges, context - 1, 1, seed) for ranges in own]

    def at(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        xs, ys = [], []
        for sample in range(step * self.batch, (step + 1) * self.batch):
            g = sample % len(self.groups)
            x, y = self._streams[g].at(sample // len(self.groups))
            label = np.array([[self.groups[g]]])
            xs.append(np.concatenate([label, x], axis=1))
            ys.append(np.concatenate([x[:, :1], y], axis=1))
        return np.concatenate(xs), np.concatenate(ys)


class TrueDomains:
    """The policy that is told the domain: one look, at byte 0."""

    def __init__(self, names: Sequence[str], domain_of: Mapping[bytes, str | None]):
        self.names = tuple(names)
        self._domain_of = domain_of
        self._domains = sorted({d for d in domain_of.values() if d is not None})

    def trajectories(self, texts: Sequence[bytes], every: int) -> list[Trajectory]:
        out = []
        for text in texts:
            posterior = np.zeros((1, len(self.names)), np.float32)
            posterior[0, self._domains.index(str(self._domain_of[text])) % len(self.names)] = 1
            at, nearest, far = np.zeros(1, np.int64), np.full(1, np.nan, np.float32), np.zeros(1, bool)
            out.append(Trajectory(at, posterior, nearest, far))
        return out

    def route(self, texts: Sequence[bytes]) -> list[Any]:
        raise ConfigError("the true-domain control answers trajectories only")


@dataclass(frozen=True)
class Seed:
    """One seed's folder, plan and the configuration of each kind of model in it."""

    plan: Plan
    dense: Config

    def folder(self, arm: str, role: str = "") -> Path:
        return self.plan.run / arm / role


def run(
    corpus: Path,
    work: Path,
    config: Config,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    dense: Mapping[str, Any] | None = None,
    arms: Sequence[str] = ("dense", "dense_token", *ROUTED),
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """All arms over all seeds; returns the result that `constellation bench dense` prints and commits.

    `dense` overrides settings of the dense arms alone (they were tuned on their own grid).
    """
    began = time.time()
    workers = workers or os.cpu_count() or 1
    runs = [_prepare(work / f"seed{s}", corpus, override(config, {"train.seed": s}), dense or {}) for s in seeds]
    routed = [a for a in arms if a in ROUTED]
    whole = [a for a in arms if a not in ROUTED]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        first: list[tuple[Any, ...]] = [(_train, ocean_job(s.plan)) for s in runs if routed]
        first += [(_train_dense, s, arm) for s in runs for arm in whole]
        _all(pool, first, "models without a router", say)
        _all(pool, [(_assign, s, arm) for s in runs for arm in routed], "routers", say)
        kernels = [(_train, _kernel_job(s, arm, role)) for s in runs for arm in routed for role in config.kernels]
        _all(pool, kernels, "kernels", say)
        scoring: list[tuple[Any, ...]] = [(_score, s, arm) for s in runs for arm in whole]
        scoring += [(_score, s, arm, role) for s in runs for arm in routed for role in config.kernels]
        scoring += [(_score, s, OCEAN) for s in runs if routed]
        _all(pool, scoring, "scores", say)
    bits = _bits(runs, arms)
    dev = open_cache(runs[0].plan.dev)
    return {
        **described(__doc__),
        "seeds": list(seeds),
        "tokens": config.train.tokens,
        "config": config.to_json(),
        "dense_overrides": dict(dense or {}),
        "seconds": round(time.time() - began),
        "documents": [
            {"id": i, "domain": d, "bytes": int(b)} for i, d, b in zip(dev.ids, dev.domains, dev.byte_length)
        ],
        "bits": {name: np.round(values, 2).tolist() for name, values in bits.items()},
        **analyse(bits, dev.byte_length, dev.domains),
    }


def _prepare(folder: Path, corpus: Path, config: Config, dense: Mapping[str, Any]) -> Seed:
    plan = prepared(folder, corpus, config)
    return Seed(plan, override(plan.config, {"train.ocean_share": 0.999999, "train.ocean_decay": 0.5, **dense}))


def _all(pool: Executor, tasks: Sequence[tuple[Any, ...]], what: str, say: Callable[[str], None]) -> None:
    futures = [pool.submit(*task) for task in tasks]
    for done, future in enumerate(as_completed(futures), 1):
        future.result()
        say(f"{what}: {done}/{len(tasks)}")


def _train(job: Job) -> None:
    for _ in fit(job):
        pass


def _labels(cache: TokenCache) -> NDArray[np.int64]:
    """The reserved token 1..15 of each document's domain."""
    names = sorted({str(d) for d in cache.domains})
    if len(names) > 15:
        raise ConfigError(f"{len(names)} domains: the dense_token arm has 15 reserved tokens; leave it out with --arms")
    return np.array([1 + names.index(str(d)) for d in cache.domains])


def _train_dense(seed: Seed, arm: str) -> None:
    config, cache = seed.dense, open_cache(seed.plan.train)
    job = Job(OCEAN, seed.folder(arm), config, steps_for(config, OCEAN), seed.plan.train, seed.plan.dev)
    source = None
    if arm == "dense_token":
        labels = _labels(cache).tolist()
        source = LabelledBatches(cache, labels, config.kernel.context, config.train.batch, config.train.seed)
    for _ in fit(job, source):
        pass


def _policy(seed: Seed, arm: str) -> Policy:
    if arm == "true_domains":
        tokenizer, caches = (
            Tokenizer.load(seed.plan.tokenizer),
            (open_cache(seed.plan.train), open_cache(seed.plan.dev)),
        )
        known = (
            (t, d) for cache in caches for t, d in zip(document_bytes(cache, tokenizer), cache.domains, strict=True)
        )
        return TrueDomains(ROLES, dict(known))
    if arm == "random":
        return RandomRouter(seed.plan.config.kernels, seed=seed.plan.config.train.seed)
    kinds: dict[str, Callable[..., Any]] = {"fisher_rao": fit_router, "tfidf": TfidfRouter.fit}
    policy: Policy = fit_policy(kinds[arm], seed.plan)
    return policy


def _assign(seed: Seed, arm: str) -> None:
    """Fit `arm`'s router; write the token ranges of its kernels and its looks at the dev documents."""
    folder = seed.folder(arm)
    if (folder / "segments.json").exists():
        return
    policy, settings = _policy(seed, arm), seed.plan.config.router
    tokenizer, dev = Tokenizer.load(seed.plan.tokenizer), open_cache(seed.plan.dev)
    looks = policy.trajectories(document_bytes(dev, tokenizer), settings.every)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "looks.npz", allow_pickle=False, count=np.array([len(t) for t in looks]),
        **{f: np.concatenate([getattr(t, f) for t in looks]) for f in Trajectory.__dataclass_fields__},
    )  # fmt: skip
    write_assignment(folder, policy, seed.plan)


def _looks(seed: Seed, arm: str) -> list[Trajectory]:
    with np.load(seed.folder(arm) / "looks.npz", allow_pickle=False) as saved:
        edges = np.cumsum(saved["count"])[:-1]
        parts = [np.split(saved[f], edges) for f in Trajectory.__dataclass_fields__]
    return [Trajectory(*fields) for fields in zip(*parts, strict=True)]


def _kernel_job(seed: Seed, arm: str, role: str) -> Job:
    plan = seed.plan
    steps = steps_for(plan.config, role)
    branch = folder_of(plan.folder(OCEAN), ocean_job(plan).steps)
    folder = seed.folder(arm)
    return Job(role, folder / role, plan.config, steps, plan.train, plan.dev, None, folder / f"{role}.npy", branch)


def _score(seed: Seed, arm: str, role: str = "") -> None:
    """Nats of every dev token under one model, beside its checkpoints."""
    folder = seed.folder(arm, role)
    out = folder / "dev_nats.npy"
    last = newest(folder)
    if out.exists() and last is not None and out.stat().st_mtime > (last.path / "state.json").stat().st_mtime:
        return
    import torch

    torch.set_num_threads(1)
    dev = open_cache(seed.plan.dev)
    prefix = _labels(dev) if arm == "dense_token" else None
    nats = score(load_model(folder), dev, prefix=prefix, precision=seed.plan.config.train.precision)
    np.save(out, np.concatenate(nats), allow_pickle=False)


def _bits(runs: Sequence[Seed], arms: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """(S, D) bits of every answer of every arm."""
    rows: dict[str, list[NDArray[np.float64]]] = {}
    for seed in runs:
        dev, tokenizer = open_cache(seed.plan.dev), Tokenizer.load(seed.plan.tokenizer)
        counts = np.diff(dev.offsets)

        def nats(arm: str, role: str = "", seed: Seed = seed) -> NDArray[np.float32]:
            array: NDArray[np.float32] = np.load(seed.folder(arm, role) / "dev_nats.npy")
            return array

        def scores(ocean: NDArray[np.float32], kernels: NDArray[np.float32], dev: TokenCache = dev) -> Scores:
            where = np.repeat(np.arange(len(counts)), counts)  # noqa: B023
            at = dev.byte_offsets(tokenizer)  # noqa: B023
            return Scores(runs[0].plan.config.kernels, ocean, kernels, where, at, dev.byte_length, tuple(dev.domains))

        for arm in arms:
            if arm not in ROUTED:
                table = scores(nats(arm), nats(arm)[None])
                rows.setdefault(arm, []).append(table.bits_D(table.ocean_N))
                continue
            table = scores(nats(OCEAN), np.stack([nats(arm, role) for role in seed.plan.config.kernels]))
            settings = seed.plan.config.router
            found = answers(table, _looks(seed, arm), settings.hysteresis, (MIXTURE,))
            for name, values in found.items():
                if not name.startswith("alone:"):
                    key = arm if name == "routed" else name if name == "ocean" else f"{arm}/{name}"
                    if key != "ocean" or arm == next(a for a in arms if a in ROUTED):
                        rows.setdefault(key, []).append(table.bits_D(values))
    return {name: np.stack(values) for name, values in rows.items()}
