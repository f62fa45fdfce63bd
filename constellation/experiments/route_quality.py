"""Does the router find a corpus's domains, early, steadily and in equal shares? Beside tf-idf and chance.

    python -m constellation.experiments.route_quality CORPUS [OUT]

CORPUS has documents with a `domain`, which no router sees: kernels are matched to domains afterwards (one to one,
Kuhn 1955). Columns:

    division   share of training bytes that went to the kernel matched to their domain, and normalised mutual
               information of kernel and domain
    load       least and most loaded kernel, 1 = an equal share
    after n    share of dev documents whose domain is matched after n bytes from the beginning
    inside n   the same for n bytes from anywhere inside
    stable     share of looks, every W bytes, that agree with the look at the document's end
    ocean      share of looks that abstain
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from constellation.config import Data
from constellation.config import Router as Settings
from constellation.data.corpus import read_corpus
from constellation.data.document import Document
from constellation.experiments.harness import described, finish
from constellation.roster import ROLES
from router.decide.baselines import RandomRouter, TfidfRouter
from router.decide.fit import fit
from router.decide.partition import loads, partition
from router.decide.policy import Policy

SIZES = (64, 128, 256, 1024)
INSIDE = 10  # places inside each dev document

Fit = Callable[[Sequence[bytes], Sequence[bytes], int], Policy]
ROUTERS: dict[str, Fit] = {
    "fisher_rao": lambda texts, held, seed: fit(texts, Settings(), seed=seed, validation=held),
    "tfidf": lambda texts, held, seed: TfidfRouter.fit(texts, Settings(), seed=seed),
    "random": lambda texts, held, seed: RandomRouter(ROLES, seed=seed),
}


def run(corpus: Path, *, seeds: Sequence[int] = (0, 1, 2), out: Path | None = None) -> dict[str, Any]:
    """Fit every router with every seed; a tenth of the training text calibrates, dev text is for measuring only."""
    train, dev = read_corpus(corpus, Data()).split(Data().dev_fraction)
    domains = sorted({str(d.domain) for d in train})
    results: dict[str, list[dict[str, Any]]] = {}
    for name, build in ROUTERS.items():
        for seed in seeds:
            held = [d for i, d in enumerate(train) if i % 10 == 0]
            rest = [d for i, d in enumerate(train) if i % 10]
            policy = build(_bytes(rest), _bytes(held), seed)
            results.setdefault(name, []).append(measure(policy, train, dev, domains, Settings()))
    result = {
        **described(__doc__),
        "corpus_bytes": sum(d.num_bytes for d in train),
        "dev_documents": len(dev),
        "domains": domains,
        "seeds": list(seeds),
        "routers": results,
    }
    return finish(result, report(result), out)


def measure(
    policy: Policy, train: Sequence[Document], dev: Sequence[Document], domains: Sequence[str], settings: Settings
) -> dict[str, Any]:
    """One row of the table."""
    texts, every = _bytes(train), settings.every
    ranges = partition(policy, texts, every, settings.hysteresis)
    rows = np.concatenate(ranges)
    label = np.repeat([domains.index(str(d.domain)) for d in train], [len(r) for r in ranges])
    table_KD = np.zeros((len(policy.names), len(domains)))
    np.add.at(table_KD, (rows[:, 2], label), rows[:, 1] - rows[:, 0])
    kernels, matched = linear_sum_assignment(-table_KD)
    domain_of = np.full(len(policy.names), -1)
    domain_of[kernels] = matched
    load = loads(ranges, len(policy.names))
    tests, wanted = _bytes(dev), np.array([domains.index(str(d.domain)) for d in dev])
    rng = np.random.default_rng(0)

    def right(some: Sequence[bytes], of: NDArray[np.int64], size: int) -> float:
        found = [t.posterior[0].argmax() for t in policy.trajectories(some, size)]
        return float((domain_of[found] == of).mean())

    after, inside = {}, {}
    for size in SIZES:
        long = np.array([i for i, text in enumerate(tests) if len(text) >= size])
        after[size] = right([tests[i][:size] for i in long], wanted[long], size)
        begins = [(i, int(rng.integers(0, len(tests[i]) - size + 1))) for i in long.tolist() for _ in range(INSIDE)]
        inside[size] = right([tests[i][b : b + size] for i, b in begins], np.repeat(wanted[long], INSIDE), size)
    looks = policy.trajectories(tests, every)
    stable = np.concatenate([t.posterior.argmax(1) == t.posterior[-1].argmax() for t in looks])
    return {
        "division": float(table_KD[kernels, matched].sum() / table_KD.sum()),
        "nmi": mutual_information(table_KD),
        "load": [float(load.min() / load.mean()), float(load.max() / load.mean())],
        "after": after,
        "inside": inside,
        "stable": float(stable.mean()),
        "ocean": float(np.concatenate([t.abstain for t in looks]).mean()),
    }


def mutual_information(table: NDArray[np.floating]) -> float:
    """Normalised mutual information of rows and columns, I / ((H_r + H_c) / 2), [0, 1]; 0 when one of them is constant.

    >>> mutual_information(np.eye(4)), mutual_information(np.ones((4, 4))), mutual_information(np.ones((1, 4)))
    (1.0, 0.0, 0.0)
    """
    p = table / table.sum()

    def entropy(q: NDArray[np.floating]) -> float:
        return float(-(q[q > 0] * np.log(q[q > 0])).sum())

    rows, columns = entropy(p.sum(1)), entropy(p.sum(0))
    shared = rows + columns - entropy(p)
    return max(0.0, 2 * shared / (rows + columns)) if min(rows, columns) > 0 else 0.0


def report(result: dict[str, Any]) -> list[str]:
    """The table, means over seeds and the range of the first column."""
    sizes = "".join(f"{f'after {n}':>12}" for n in SIZES) + "".join(f"{f'inside {n}':>12}" for n in SIZES)
    lines = [f"{'':<12}{'division':>9}{'range':>14}{'nmi':>7}{'load':>13}{sizes}{'stable':>8}{'ocean':>7}"]
    for name, rows in result["routers"].items():
        flat = [
            [r["division"], r["nmi"], *r["load"], *map(r["after"].get, SIZES), *map(r["inside"].get, SIZES),
             r["stable"], r["ocean"]]
            for r in rows
        ]  # fmt: skip
        mean = np.mean(flat, axis=0).tolist()
        least, most = min(r["division"] for r in rows), max(r["division"] for r in rows)
        accuracies = "".join(f"{value:>12.3f}" for value in mean[4:-2])
        lines.append(
            f"{name:<12}{mean[0]:>9.3f}{f'{least:.3f}-{most:.3f}':>14}{mean[1]:>7.3f}{mean[2]:>7.2f}{mean[3]:>6.2f}"
            f"{accuracies}{mean[-2]:>8.3f}{mean[-1]:>7.3f}"
        )
    return lines


def _bytes(documents: Sequence[Document]) -> list[bytes]:
    return [document.text.encode() for document in documents]


if __name__ == "__main__":
    run(Path(sys.argv[1]), out=Path(sys.argv[2]) if len(sys.argv) > 2 else None)
