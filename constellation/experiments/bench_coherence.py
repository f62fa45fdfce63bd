"""Does the coherence score rank real text above its shuffled sentences and above repetition, in every domain?

Of every held-out document one excerpt of EXCERPT bytes (its beginning) with at least UNITS units. Against it stand

    shuffled      the same excerpt, its units in another order
    repetition    its first units, again and again, as long as the excerpt

AUROC over all excerpts and within each domain, interval by bootstrap over documents; the bar is .9 for both. The judge
is a model of a run that was not trained on the text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from constellation.config import Data
from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.corpus import read_corpus
from constellation.errors import DataError
from constellation.experiments.harness import described
from constellation.experiments.statistics import auroc
from constellation.train.checkpoint import load_model
from constellation.train.coherence import CoherenceTracker, units

EXCERPT, UNITS, BAR, RESAMPLES = 700, 4, 0.9, 2000
KINDS = ("real", "shuffled", "repetition")


def run(
    model: Path, corpus: Path | None, data: Data, *, most: int = 0, orders: int = 8, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """AUROCs of the model in the folder `model`, of at most `most` documents (0: all)."""
    documents = read_corpus(corpus, data)
    _, dev = documents.split(data.dev_fraction)
    tracker = CoherenceTracker(load_model(model), Tokenizer.load(model.parent / "tokenizer.json"), orders)
    rows: list[dict[str, Any]] = []
    for number, document in enumerate(dev):
        text = document.text[:EXCERPT]
        parts = units(text)
        if len(set(parts)) < UNITS or (most and len(rows) >= most):
            continue
        order = np.random.default_rng(number).permutation(len(parts))
        loop = "".join(parts[: max(1, len(parts) // 4)])
        texts = (text, "".join(parts[i] for i in order), (loop * (1 + len(text) // max(1, len(loop))))[: len(text)])
        found = {kind: tracker.judge(one, seed=1).to_json() for kind, one in zip(KINDS, texts, strict=True)}
        rows.append({"domain": str(document.domain), **found})
        if len(rows) % 25 == 0:
            say(f"{len(rows)} documents")
    if not rows:
        raise DataError(f"no held-out document has {UNITS} different sentences in its first {EXCERPT} bytes")
    gains = {kind: np.array([row[kind]["gain"] for row in rows]) for kind in KINDS}
    domains = np.array([row["domain"] for row in rows])
    result: dict[str, Any] = {**described(__doc__), "documents": len(rows), "orders": orders, "auroc": {}}
    for kind in KINDS[1:]:
        generator = np.random.default_rng(0)
        draws = [generator.integers(len(rows), size=len(rows)) for _ in range(RESAMPLES)]
        low, high = np.quantile([auroc(gains["real"][at], gains[kind][at]) for at in draws], [0.025, 0.975])
        mean = auroc(gains["real"], gains[kind])
        result["auroc"][kind] = {
            "all": mean, "low": float(low), "high": float(high), "verdict": "passed" if mean >= BAR else "missed",
            "domains": {
                d: auroc(*(gains[k][domains == d] for k in ("real", kind))) for d in sorted(set(domains))
            },
            "surprisal_alone": auroc(*(
                [-row[k]["surprisal"] for row in rows] for k in ("real", kind)
            )),
        }  # fmt: skip
    result["raw"] = rows
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The table of a result."""
    out = [f"{result['documents']} excerpts; AUROC of the order's gain, bar {BAR}"]
    for kind, row in result["auroc"].items():
        out.append(
            f"real against {kind}: {row['all']:.3f} [{row['low']:.3f}, {row['high']:.3f}] {row['verdict']}; "
            f"by surprisal alone {row['surprisal_alone']:.3f}; "
            + ", ".join(f"{d} {a:.2f}" for d, a in row["domains"].items())
        )
    return out
