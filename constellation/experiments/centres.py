"""Which centres divide text best in the chart u, points of S^7? E8's roots, fitted, random, or a frame.

    python -m constellation.experiments.centres CORPUS [OUT]

    e8        roots as they stand: the 8 simple ones, or all 240
    k-means   balanced spherical k-means of training prefixes (what the router starts from)
    random    unit vectors drawn at random
    frame     an orthonormal frame, e_i; S^7 holds no more than 8 of them

Codes that are not fitted are turned at random, a rotation per seed: the axes of the chart have no say. A prefix goes to
its nearest centre. Columns:

    angle      mean angle to the nearest centre, radians
    overload   bytes of the fullest centre / an equal share
    dead       centres that get nothing
    gain       nats per trigram that a centre's training text, mixed half and half with the corpus mean, saves against
               the mean alone on the 2 KB *after* a held-out prefix. It needs enough text for each centre: with 240 on
               a few megabytes, codes that crowd their text into few centres come out ahead.
    nmi        normalised mutual information with the domain, where documents have one
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation.config import Data
from constellation.config import Router as Settings
from constellation.data.corpus import read_corpus
from constellation.experiments.harness import described, finish
from constellation.experiments.route_quality import mutual_information
from constellation.geometry import e8
from router.decide import counts
from router.decide.clustering import pool, spherical
from router.decide.fisher_rao import CHART, FisherRaoRouter, log_ratio
from router.decide.fit import fit

AFTER = 2048  # bytes after the prefix that the gain is measured on
PREFIX = 256  # bytes of a held-out prefix


def run(
    corpus: Path | None, *, sizes: Sequence[int] = (8, 240), seeds: Sequence[int] = (0, 1, 2), out: Path | None = None
) -> dict[str, Any]:
    """All codes at all sizes on `corpus` (None: the embedded one); prints the table, writes the raw result to `out`."""
    train, dev = read_corpus(corpus, Data()).split(Data().dev_fraction)
    texts, held = ([d.text.encode() for d in side] for side in (train, dev))
    label = np.unique([str(d.domain) for d in dev], return_inverse=True)[1]
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        router = fit(texts, Settings(), seed=seed, validation=texts[::10])
        rows += [{"seed": seed, **row} for row in _one_seed(router, texts, held, label, sizes, seed)]
    result = {**described(__doc__), "seeds": list(seeds), "rows": rows}
    return finish(result, report(result), out)


def codes(k: int, chart_P8: NDArray[np.float64], weight_P: NDArray[np.float64], seed: int) -> dict[str, NDArray]:
    """Centres by name, (K, 8) unit vectors; a code that has no K members is left out."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((CHART, CHART)))[0]
    label = spherical(chart_P8, weight_P, k, rng)
    sums = np.stack([(weight_P[label == j, None] * chart_P8[label == j]).sum(axis=0) for j in range(k)])
    found = {"k-means": sums, "random": rng.standard_normal((k, CHART))}
    if k in (CHART, 240):
        found["e8"] = (e8.simple_roots() if k == CHART else e8.roots()) @ turn
    if k <= CHART:
        found["frame"] = turn[:k]
    return {name: c / np.maximum(np.linalg.norm(c, axis=1, keepdims=True), 1e-300) for name, c in found.items()}


def _one_seed(
    router: FisherRaoRouter, texts: list[bytes], held: list[bytes], label: NDArray[Any], sizes: Sequence[int], seed: int
) -> list[dict[str, Any]]:
    rng, settings = np.random.default_rng(seed), router.config
    low, high = np.log(settings.min_prefix), np.log(settings.max_prefix)
    prefixes = [t[:n] for t in texts for n in np.exp(rng.uniform(low, high, 3)).astype(int).tolist()]
    weight = np.array([len(p) for p in prefixes], dtype=np.float64)
    chart, held_chart = _chart(router, prefixes), _chart(router, [t[:PREFIX] for t in held])
    matrix = counts.count(prefixes, settings.bins)
    after = counts.count([t[PREFIX : PREFIX + AFTER] for t in held], settings.bins)
    rows = []
    for k in sizes:
        for name, centres in codes(k, chart, weight, seed).items():
            cos = chart @ centres.T
            nearest, held_nearest = cos.argmax(axis=1), (held_chart @ centres.T).argmax(axis=1)
            load = np.bincount(nearest, weight, minlength=k)
            ratio = np.exp(log_ratio(pool(matrix, nearest, k), router.pseudo))
            own = after @ np.log((ratio.T + 1) / 2)
            table = np.zeros((k, int(label.max()) + 1))
            np.add.at(table, (held_nearest, label), 1.0)
            rows.append({
                "centres": k,
                "code": name,
                "angle_rad": float(np.arccos(np.clip(cos.max(axis=1), -1, 1)).mean()),
                "overload": float(load.max() / load.mean()),
                "dead": float((load == 0).mean()),
                "gain_nats": float(own[np.arange(len(held)), held_nearest].sum() / after.sum()),
                "nmi": mutual_information(table),
            })  # fmt: skip
    return rows


def _chart(router: FisherRaoRouter, texts: list[bytes]) -> NDArray[np.float64]:
    return router.chart(router.judge(*router.sums(texts)).z)


def report(result: dict[str, Any]) -> list[str]:
    """The table, means over seeds."""
    lines = [f"{'centres':>7}  {'code':<8}{'angle':>8}{'overload':>10}{'dead':>8}{'gain nats':>11}{'nmi':>7}"]
    rows = result["rows"]
    for k, code in dict.fromkeys((row["centres"], row["code"]) for row in rows):
        mine = [row for row in rows if (row["centres"], row["code"]) == (k, code)]
        angle, overload, dead, gain, nmi = (
            float(np.mean([row[name] for row in mine]))
            for name in ("angle_rad", "overload", "dead", "gain_nats", "nmi")
        )
        lines.append(f"{k:>7}  {code:<8}{angle:>8.3f}{overload:>10.2f}{dead:>8.1%}{gain:>11.4f}{nmi:>7.3f}")
    return lines


if __name__ == "__main__":
    run(Path(sys.argv[1]) if len(sys.argv) > 1 else None, out=Path(sys.argv[2]) if len(sys.argv) > 2 else None)
