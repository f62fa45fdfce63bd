"""What can be said of a tokenizer without training a model on it; what a model makes of it says bench_coordizer.py.

bytes per token   of each domain and of all, on text that the tokenizer was not learnt from
Gini              of the domains' tokens per byte, 0: all alike .. 1 - 1 / G      (Foroutan et al. 2025)
residues          part of the merged tokens that are nearly always merged further: of the times one is formed, less
                  than RESIDUE are left in the text                               (LiteToken, 2602.04706)
Renyi efficiency  ln(1 / sum_i p_i^a) / (a - 1) / ln V, a = 2.5; a diagnostic alone: it can rise while models get
                  worse                                                           (Zouhar et al. 2023; 2402.14614)
round trips       random bytes, and text with bytes thrown in, that do not come back: there must be none
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from constellation.coordizer.tokenizer import FIRST_MERGE, Tokenizer
from constellation.data.document import Document

RESIDUE, ORDER, FUZZ = 0.1, 2.5, 500


@dataclass(frozen=True)
class Quality:
    """Of a tokenizer on held-out documents."""

    tokens: int
    bytes_per_token: float
    domains: dict[str, float]  # bytes per token
    gini: float
    residues: float
    renyi_efficiency: float
    round_trips: int
    round_trips_failed: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def quality(tokenizer: Tokenizer, documents: Sequence[Document]) -> Quality:
    """All of the above; `documents` are at least one that is not empty."""
    ids = tokenizer.encode_batch([d.text for d in documents])
    size_D, count_D = np.array([d.num_bytes for d in documents]), np.array([len(one) for one in ids])
    names = [str(d.domain) for d in documents]
    domains = {
        name: float(size_D[own].sum() / max(1, count_D[own].sum()))
        for name in sorted(set(names))
        for own in [np.array([n == name for n in names])]
    }
    used_V = np.bincount(np.concatenate([np.array(one, np.int64) for one in ids]), minlength=tokenizer.vocab_size)
    tried, failed = fuzz(tokenizer, [d.text.encode() for d in documents])
    return Quality(
        tokenizer.vocab_size, float(size_D.sum() / max(1, count_D.sum())), domains,
        gini(np.array([1 / max(one, 1e-9) for one in domains.values()])), residues(tokenizer, used_V),
        renyi_efficiency(used_V), tried, failed,
    )  # fmt: skip


def gini(x: NDArray[np.floating]) -> float:
    """sum_ij |x_i - x_j| / (2 n^2 mean x) of x > 0.

    >>> gini(np.ones(5)), round(gini(np.array([1e-12, 1e-12, 1e-12, 1.0])), 6)
    (0.0, 0.75)
    """
    return float(np.abs(x[:, None] - x).sum() / (2 * len(x) ** 2 * x.mean()))


def residues(tokenizer: Tokenizer, used_V: NDArray[np.integer]) -> float:
    """Part of the merged tokens that are formed but seldom stay; [0, 1], 0 without merges."""
    formed_V = used_V.astype(np.int64).copy()
    for token, parts in reversed(tokenizer.parts().items()):
        for part in parts:
            formed_V[part] += formed_V[token]
    merged = np.arange(len(used_V)) >= FIRST_MERGE
    there = merged & (formed_V > 0)
    return float((used_V[there] < RESIDUE * formed_V[there]).sum() / max(1, merged.sum()))


def renyi_efficiency(used_V: NDArray[np.integer], order: float = ORDER) -> float:
    """In [0, 1]: 1 for tokens that are used equally often, 0 for one alone or none.

    >>> renyi_efficiency(np.full(8, 3)), renyi_efficiency(np.array([5, 0]))
    (1.0, 0.0)
    """
    p = used_V / max(1, used_V.sum())
    return float(np.log((p**order).sum() or 1.0) / (1 - order) / np.log(max(2, len(used_V)))) + 0.0


def fuzz(tokenizer: Tokenizer, texts: Sequence[bytes], tries: int = FUZZ) -> tuple[int, int]:
    """(byte strings tried, those that did not come back): half random, half text in which every tenth byte is."""
    generator, failed = np.random.default_rng(0), 0
    for number in range(tries):
        data = generator.integers(0, 256, generator.integers(0, 200), np.uint8)
        if number % 2 and texts:
            text = np.frombuffer(texts[number // 2 % len(texts)][:400], np.uint8)
            data = np.where(generator.random(len(text)) < 0.1, generator.integers(0, 256, len(text), np.uint8), text)
        failed += tokenizer.decode(tokenizer.encode(data.tobytes())) != data.tobytes()
    return tries, failed


def encoding_speed(tokenizer: Tokenizer, folder: Path, texts: Sequence[str], repeats: int = 3) -> dict[str, float]:
    """CPU seconds for `texts` one by one, ours and the library's own object from the same file, and their ratio."""
    tokenizer.save(folder / "speed.json")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "speed.json"))
    spent: dict[str, list[float]] = {"ours": [], "tokenizers": []}
    for _ in range(repeats):
        for name, encode in (("ours", tokenizer.encode), ("tokenizers", theirs.encode)):
            begin = time.process_time()
            for text in texts:
                encode(text)
            spent[name].append(time.process_time() - begin)
    seconds = {name: float(np.median(times)) for name, times in spent.items()}
    return {**seconds, "ratio": seconds["tokenizers"] / max(seconds["ours"], 1e-9)}
