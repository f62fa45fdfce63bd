"""How long does the router take, beside a tf-idf router with as many centres, in one run on one core?

    query        one text of 1 KB                                        goal < 1 ms at 240 centres
    batch        256 texts of 1 KB in one call                           goal < 30 ms
    byte         a stream's update by one byte                           goal < 10 us
    chunk        a stream's update by 64 bytes, for each byte
    look         a stream's choice, at any length; a tf-idf router reads the text anew (1 KB here)
    corpus       training text assigned, a look every 64 bytes
    fit          the whole fit, on the same text

Medians of repeats, contestants taking turns, the process pinned to one core where the system can.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from constellation.config import Data
from constellation.config import Router as Settings
from constellation.data.corpus import read_corpus
from constellation.experiments.harness import described, finish, machine_line
from router.decide.baselines import TfidfRouter
from router.decide.fit import fit
from router.decide.policy import Policy
from router.decide.stream import RouterStream

BATCH, QUERY_BYTES, EVERY = 256, 1024, 64
GOALS = {"query_ms": 1.0, "batch_ms": 30.0, "byte_us": 10.0}
_ROWS = (
    ("query_ms", "query of 1 KB", "ms"),
    ("batch_ms", "batch of 256 x 1 KB", "ms"),
    ("byte_us", "stream, a byte at a time", "us a byte"),
    ("chunk_us", "stream, 64 bytes at a time", "us a byte"),
    ("look_ms", "a look at 1 KB so far", "ms"),
    ("corpus_mb_s", "looks every 64 bytes of a corpus", "MB/s"),
    ("fit_s", "fit", "s"),
)


def run(
    *, centres: int = 240, out: Path | None = None, fit_bytes: int = 2_000_000, repeats: int = 31, seed: int = 0
) -> dict[str, Any]:
    """Measure on the embedded corpus, print the table, write the raw result to `out`."""
    texts, held = _texts(fit_bytes, seed)
    names = [f"k{k:03d}" for k in range(centres)]
    with _one_core() as pinned:
        tick = time.perf_counter()
        router = fit(texts, Settings(), seed=seed, names=names, validation=held)
        ours: dict[str, Any] = {"fit_s": time.perf_counter() - tick}
        tick = time.perf_counter()
        peer = TfidfRouter.fit(texts, Settings(), seed=seed, names=names)
        theirs: dict[str, Any] = {"fit_s": time.perf_counter() - tick}
        queries = _queries(texts, seed)
        text = b"".join(queries)[: 8 * QUERY_BYTES]
        stream, steady = RouterStream(router), RouterStream(router)
        steady.update(queries[0])
        place = iter(range(1 << 62))
        some = texts[: max(1, len(texts) // 4)]

        def byte() -> None:
            i = next(place) % len(text)
            stream.update(text[i : i + 1])

        def chunk() -> None:
            i = next(place) * EVERY % len(text)
            stream.update(text[i : i + EVERY])

        def one(policy: Policy) -> Callable[[], Any]:
            return lambda: policy.route([queries[next(place) % BATCH]])

        def batch(policy: Policy) -> Callable[[], Any]:
            return lambda: policy.route(queries)

        def corpus(policy: Policy) -> Callable[[], Any]:
            return lambda: policy.trajectories(some, EVERY)

        both: tuple[tuple[dict[str, Any], Policy], ...] = ((ours, router), (theirs, peer))
        for _ in range(repeats):
            for times, policy in both:
                _note(times, "query_ms", one(policy), 1e3, inner=9)
                _note(times, "batch_ms", batch(policy), 1e3)
            _note(ours, "byte_us", byte, 1e6, inner=999)
            _note(ours, "chunk_us", chunk, 1e6 / EVERY, inner=99)
            _note(ours, "look_ms", steady.choice, 1e3, inner=9)
            _note(theirs, "look_ms", one(peer), 1e3, inner=9)
        for _ in range(3):
            for times, policy in both:
                _note(times, "corpus_s", corpus(policy), 1.0)
    size = sum(map(len, some)) / 1e6
    for times in (ours, theirs):
        for name in ("query_ms", "batch_ms", "byte_us", "chunk_us", "look_ms"):
            if name in times:
                times[name] = statistics.median(times[name])
        times["corpus_mb_s"] = size / statistics.median(times.pop("corpus_s"))
    result = {
        **described(__doc__),
        "pinned_to_one_core": pinned,
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "sklearn": __import__("sklearn").__version__,
        "centres": centres,
        "repeats": repeats,
        "seed": seed,
        "fit_bytes": sum(map(len, texts)),
        "router_hash": router.hash,
        "fisher_rao": ours,
        "tfidf": theirs,
        "goals_met": {name: ours[name] < goal for name, goal in GOALS.items()},
    }
    return finish(result, report(result), out)


def report(result: dict[str, Any]) -> list[str]:
    """The table, a line each."""
    lines = [
        f"{machine_line(result)}; {'one core' if result['pinned_to_one_core'] else 'not pinned'}, "
        f"Python {result['python']}, numpy {result['numpy']}, scipy {result['scipy']}; {result['centres']} centres, "
        f"medians of {result['repeats']}",
        f"{'':<34}{'Fisher-Rao':>12}{'tf-idf':>12}",
    ]
    for name, what, unit in _ROWS:
        ours, theirs = result["fisher_rao"][name], result["tfidf"].get(name)
        goal = f"  goal < {GOALS[name]:g}" if name in GOALS else ""
        lines.append(f"{what:<34}{ours:>12.3f}{'-' if theirs is None else f'{theirs:.3f}':>12}  {unit}{goal}")
    return lines


def _note(times: dict[str, Any], name: str, call: Callable[[], Any], scale: float, inner: int = 1) -> None:
    """Adds the mean time of `inner` calls."""
    tick = time.perf_counter()
    for _ in range(inner):
        call()
    times.setdefault(name, []).append((time.perf_counter() - tick) * scale / inner)


def _texts(fit_bytes: int, seed: int) -> tuple[list[bytes], list[bytes]]:
    """Training and validation texts of the embedded corpus, about `fit_bytes` and a tenth of that."""
    train, dev = read_corpus(None, Data()).split(0.1)
    rng = np.random.default_rng(seed)
    chosen = []
    for documents, limit in ((train, fit_bytes), (dev, fit_bytes // 10)):
        some, held = [], 0
        for i in rng.permutation(len(documents)).tolist():
            if held < limit:
                some.append(documents[i].text.encode()[: limit - held])
                held += len(some[-1])
        chosen.append(some)
    return chosen[0], chosen[1]


def _queries(texts: list[bytes], seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed + 1)
    long = [text for text in texts if len(text) >= QUERY_BYTES]
    picks = [long[i] for i in rng.integers(0, len(long), BATCH).tolist()]
    return [text[(b := int(rng.integers(0, len(text) - QUERY_BYTES + 1))) : b + QUERY_BYTES] for text in picks]


@contextmanager
def _one_core() -> Iterator[bool]:
    """Pins the process to one core; whether it could."""
    if not hasattr(os, "sched_setaffinity"):
        yield False
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield True
    finally:
        os.sched_setaffinity(0, before)
