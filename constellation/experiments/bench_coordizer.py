"""Which tokenizer lets a kernel write better: bits per byte at equal FLOPs and at equal bytes, vocabulary re-optimised.

One dense kernel is trained per tokenizer, budget and seed; width and blocks are the configuration's, the vocabulary is
the tokenizer's, so the head and the embedding are charged:

    equal bytes   tokens = B / bytes per token of the training text
    equal FLOPs   tokens = F / (6 m), m multiplications of a token in matrix products, head included (kernel/model.py)

B are the bytes that `train.tokens` tokens of the reference hold, F the FLOPs that they cost; the reference is the
first score at the first vocabulary. Every score chooses its vocabulary on one half of the held-out documents (every
second one) and is reported on the other, as the difference from the first score's choice: paired by seed and document,
with intervals (statistics.py). All that a task did lies in the work folder, so a second call goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation.config import Config, override
from constellation.coordizer import trainer
from constellation.coordizer.quality import encoding_speed, quality
from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.cache import build_cache
from constellation.data.corpus import Corpus, read_corpus
from constellation.data.document import Document
from constellation.errors import ConfigError
from constellation.experiments.harness import described, machine_line
from constellation.experiments.statistics import difference
from constellation.kernel.model import multiplications
from constellation.roster import OCEAN
from constellation.train.checkpoint import load_model
from constellation.train.job import Job, resolve_precision
from constellation.train.loop import fit
from constellation.train.score import document_bits
from constellation.train.score import score as nats_of

BUDGETS = ("flops", "bytes")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A tokenizer that is judged: what it is called, by whom it was chosen, and the folder it lies in."""

    score: str
    folder: Path
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        return f"{self.score}/{self.tokenizer.vocab_size}"


def run(
    corpus: Path | None, work: Path, config: Config, *, scores: Sequence[str], vocabularies: Sequence[int],
    seeds: Sequence[int], say: Say = print,
) -> dict[str, Any]:  # fmt: skip
    """Learn a coordizer for every score and vocabulary, then `judge` them."""
    documents = read_corpus(corpus, config.data)
    learnt, _ = documents.split(config.data.dev_fraction)
    candidates, learning_s = [], dict[str, float]()
    for name in scores:
        for size in vocabularies:
            folder = work / "coordizers" / f"{name}-{size}"
            began = time.process_time()
            if not (folder / trainer.MANIFEST).exists():
                settings = override(config, {"coordizer.score": name}).coordizer
                for _ in trainer.train(learnt, documents.hash, folder, size, settings):
                    pass
                (folder / "seconds.txt").write_text(f"{time.process_time() - began:.2f}")
            candidates.append(Candidate(name, folder, trainer.load(folder).tokenizer))
            learning_s[candidates[-1].name] = float((folder / "seconds.txt").read_text())
            say(f"learnt {candidates[-1].name}")
    return {"learning_cpu_s": learning_s, **judge(documents, work, config, candidates, seeds=seeds, say=say)}


def judge(
    documents: Corpus, work: Path, config: Config, candidates: Sequence[Candidate], *, seeds: Sequence[int],
    budgets: Sequence[str] = BUDGETS, say: Say = print,
) -> dict[str, Any]:  # fmt: skip
    """What the tokenizers are like, and what kernels make of them; without `seeds` the former alone."""
    train, dev = documents.split(config.data.dev_fraction)
    if len({c.name for c in candidates}) < len(candidates):
        raise ConfigError("two of the tokenizers have the same name and vocabulary; name each once")
    config = resolve_precision(override(config, {"train.ocean_share": 0.999999, "train.ocean_decay": 0.5}))
    found = {c.name: quality(c.tokenizer, dev).to_json() for c in candidates}
    for c in candidates:
        found[c.name]["encoding"] = encoding_speed(c.tokenizer, work, [d.text for d in dev])
    result: dict[str, Any] = {
        **described(__doc__), "corpus": documents.hash, "seeds": list(seeds), "config": config.to_json(),
        "candidates": found, "documents": len(dev), "bytes": sum(d.num_bytes for d in dev),
    }  # fmt: skip
    if not seeds:
        return result
    bytes_D = np.array([d.num_bytes for d in dev])
    tokens = _tokens(candidates, train, work, config)
    result |= {"budget": {}, "raw": {}}
    for budget in budgets:
        bits = {}
        for c in candidates:
            rows = []
            for seed in seeds:
                rows.append(_bits(c, train, dev, work, config, budget, seed, tokens[budget][c.name]))
                say(f"equal {budget}: {c.name}, seed {seed}: {rows[-1].sum() / bytes_D.sum():.4f} bits/byte")
            bits[c.name] = np.stack(rows)
        result["budget"][budget] = {
            "tokens": tokens[budget],
            **_compared(bits, [(c.score, c.name) for c in candidates], bytes_D),
        }
        result["raw"][budget] = {name: np.round(values, 2).tolist() for name, values in bits.items()}
    return result


def _tokens(
    candidates: Sequence[Candidate], train: Sequence[Document], work: Path, config: Config
) -> dict[str, dict[str, int]]:
    """Training tokens of every candidate under each budget."""
    density, price = {}, {}
    for c in candidates:
        cache = build_cache(train, c.tokenizer, work / "data")
        density[c.name] = float(cache.byte_length.sum()) / len(cache.tokens)
        price[c.name] = multiplications(_sized(config, c).kernel)
    first = candidates[0].name
    return {
        "bytes": {n: round(config.train.tokens * density[first] / density[n]) for n in density},
        "flops": {n: round(config.train.tokens * price[first] / price[n]) for n in density},
    }


def _sized(config: Config, candidate: Candidate) -> Config:
    return override(config, {"kernel.vocab_size": candidate.tokenizer.vocab_size})


def _bits(
    candidate: Candidate, train: Sequence[Document], dev: Sequence[Document], work: Path, config: Config,
    budget: str, seed: int, tokens: int,
) -> NDArray[np.float64]:  # fmt: skip
    """Bits of every held-out document, (D,), from disk when an earlier call found them."""
    folder = work / "models" / budget / candidate.name / f"seed{seed}"
    done = folder / "bits.json"
    asked = {"tokens": tokens, "tokenizer": candidate.tokenizer.hash, "config": config.to_json()}
    if done.exists() and (before := json.loads(done.read_text()))["asked"] == asked:
        return np.array(before["bits"])
    own = override(_sized(config, candidate), {"train.seed": seed})
    caches = [build_cache(part, candidate.tokenizer, work / "data") for part in (train, dev)]
    steps = max(1, round(tokens / (own.train.batch * own.kernel.context)))
    job = Job(OCEAN, folder, own, steps, caches[0].path)
    for _ in fit(job):
        pass
    nats = nats_of(load_model(folder), caches[1], precision=own.train.precision)
    bits_D = document_bits(nats)
    done.write_text(json.dumps({"asked": asked, "bits": bits_D.tolist()}))
    return bits_D


def _compared(
    bits: Mapping[str, NDArray[np.float64]], names: Sequence[tuple[str, str]], bytes_D: NDArray[np.integer]
) -> dict[str, Any]:
    """The choice of each score on one half of the documents, and what it is worth on the other."""
    choose, report = np.arange(len(bytes_D)) % 2 == 0, np.arange(len(bytes_D)) % 2 == 1
    table = {
        name: {
            "bits_per_byte": float(values.mean(0).sum() / bytes_D.sum()),
            "per_seed": (values.sum(1) / bytes_D.sum()).tolist(),
        }
        for name, values in bits.items()
    }
    best: dict[str, str] = {}
    for score, name in names:
        if score not in best or bits[name][:, choose].sum() < bits[best[score]][:, choose].sum():
            best[score] = name
    first = best[names[0][0]]
    rows = {}
    for score, name in best.items():
        gap = difference(bits[name][:, report], bits[first][:, report], bytes_D[report])
        rows[score] = {
            "chosen": name,
            "bits_per_byte": float(bits[name][:, report].mean(0).sum() / bytes_D[report].sum()),
            **({} if name == first else {"against": first, **gap.to_json()}),
        }
    return {"table": table, "scores": rows}


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result."""
    lines = [
        machine_line(result), "",
        "| tokenizer | bytes/token | Gini | residues | Renyi | failed round trips | encoding against `tokenizers` |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in result["candidates"].items():
        lines.append(
            f"| {name} | {row['bytes_per_token']:.3f} | {row['gini']:.3f} | {row['residues']:.3f} "
            f"| {row['renyi_efficiency']:.3f} | {row['round_trips_failed']} of {row['round_trips']} "
            f"| {row['encoding']['ratio']:.2f} x |"
        )
    for budget, found in result.get("budget", {}).items():
        lines += ["", f"Equal {budget}, {len(result['seeds'])} seeds:", ""]
        lines += ["| score | vocabulary chosen | bits per byte, other half | difference, 95 % interval | verdict |"]
        lines += ["|---|---|---|---|---|"]
        for score, row in found["scores"].items():
            gap = "" if "mean" not in row else f"{row['mean']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
            lines.append(
                f"| {score} | {row['chosen'].rpartition('/')[2]} | {row['bits_per_byte']:.4f} | {gap} "
                f"| {row.get('verdict', '')} |"
            )
    return "\n".join(lines)
