"""Signatures of a run's models on its held-out text, and how well they tell models apart; no Ray here.

The probe set is the run's held-out windows in classes, its text's domains or eight equal parts where there are none;
the same seed of windows for every model. AUROC is of "one model, disjoint halves of the probe set" against "two
models, such halves"; other seeds come in as further runs on the same text.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.cache import open_cache
from constellation.errors import ConfigError
from constellation.experiments.statistics import auroc
from constellation.kernel.model import KernelLM
from constellation.pipeline.prepare import Plan, open_plan
from constellation.regime.detector import detect_regime
from constellation.storage.atomic import write_bytes
from constellation.telemetry.integration import integration
from constellation.telemetry.signature import BINS, MOST_CLASSES, Signature, separation, signature
from constellation.train.checkpoint import load_model

WINDOWS = 8  # of a class
RESAMPLES = 2000
FILE = "signature.bin"


@dataclass(frozen=True)
class ProbeSet:
    """Windows (C, W, T) of token ids in C classes, and what they are called."""

    tokens_CWT: NDArray[np.int64]
    classes: tuple[str, ...]

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.tokens_CWT.tobytes()).hexdigest()[:16]


def probe_set(plan: Plan, windows: int = WINDOWS) -> ProbeSet:
    """The run's; ConfigError where the held-out text is too short for it."""
    cache, length = open_cache(plan.dev), plan.config.kernel.context
    domains = [domain or "text" for domain in cache.domains]
    names = sorted(set(domains))[:MOST_CLASSES]
    if len(names) < 2:
        edges = np.linspace(0, len(cache.tokens), 9).astype(int)
        parts = {f"part {i}": cache.tokens[a:b] for i, (a, b) in enumerate(itertools.pairwise(edges))}
    else:
        parts = {name: np.concatenate([cache.tokens[a:b] for a, b, d in
                                       zip(cache.offsets[:-1], cache.offsets[1:], domains, strict=True) if d == name])
                 for name in names}  # fmt: skip
    short = min(parts, key=lambda name: len(parts[name]))
    while len(parts[short]) < windows * length and windows > 2:
        windows //= 2
    if len(parts[short]) < windows * length:
        raise ConfigError(
            f"{plan.run}: {short!r} has {len(parts[short])} held-out tokens, {windows * length} are needed for a "
            "signature; hold out more text, data.dev_fraction"
        )
    rows = [np.stack([part[at : at + length] for at in np.linspace(0, len(part) - length, windows).astype(int)])
            for part in parts.values()]  # fmt: skip
    return ProbeSet(np.stack(rows).astype(np.int64), tuple(parts))


@torch.no_grad()
def signature_of(model: KernelLM, probes: ProbeSet, bin_V: torch.Tensor, seed: int) -> Signature:
    """Of every prediction on the windows."""
    basins, regimes = [], []
    for windows in torch.from_numpy(probes.tokens_CWT):
        hidden = model.hidden(windows).flatten(0, 1)
        p_NV = model.logits(hidden).float().softmax(-1)
        basins.append(torch.zeros(len(p_NV), BINS).index_add_(1, bin_V, p_NV))
        if len(hidden) >= hidden.shape[1] + 2:
            regimes.append(detect_regime(integration(hidden).phi)[0])
    return signature(basins, probes.classes, probes.hash, regimes, seed)


def sign(run: Path, others: Sequence[Path] = (), splits: int = 8) -> dict[str, Any]:
    """Write RUN/<role>/signature.bin of every model with a checkpoint; AUROC among them and those of `others`."""
    plan = open_plan(run)
    probes = probe_set(plan)
    tokenizer = Tokenizer.load(plan.tokenizer)
    first_V = torch.tensor([(b[0] // (256 // BINS)) if b else 0 for b in tokenizer.token_bytes])
    models = {}
    for place in (run, *others):
        theirs = open_plan(place)
        if Tokenizer.load(theirs.tokenizer).hash != tokenizer.hash:
            raise ConfigError(f"{place} has another tokenizer than {run}; train both on the same text")
        for role in theirs.config.models:
            if (theirs.folder(role) / "checkpoints").exists():
                models[place, role] = load_model(theirs.folder(role)), theirs.config.train.seed
    if not models:
        raise ConfigError(f"{run} has no model yet; train it first: constellation train --run {run}")
    rows = []
    for (place, role), (model, seed) in models.items():
        if place == run:
            found = signature_of(model, probes, first_V, seed)
            data = found.to_bytes()
            write_bytes(plan.folder(role) / FILE, data)
            rows.append({"role": role, "bytes": len(data), "file": str(plan.folder(role) / FILE),
                         "regimes": found.regimes})  # fmt: skip
    return {"run": str(run), "probe": probes.hash, "classes": probes.classes, "signatures": rows,
            **_identified(list(models.values()), probes, first_V, splits)}  # fmt: skip


def _identified(models: Sequence[Any], probes: ProbeSet, bin_V: torch.Tensor, splits: int) -> dict[str, Any]:
    """AUROC over `splits` random halves, with a 95 % interval by resampling models; None for a single model."""
    if len(models) < 2:
        return {"auroc": None, "models": len(models)}
    generator = np.random.default_rng(0)
    windows = probes.tokens_CWT.shape[1]
    distances = np.zeros((splits, len(models), len(models)))
    for split in range(splits):
        order = generator.permutation(windows)
        halves = [ProbeSet(probes.tokens_CWT[:, part], probes.classes)
                  for part in (order[: windows // 2], order[windows // 2 :])]  # fmt: skip
        a, b = ([signature_of(model, half, bin_V, seed) for model, seed in models] for half in halves)
        distances[split] = [[separation(x, y, halves=True) for y in b] for x in a]

    def found(chosen: NDArray[np.int64]) -> float:
        d = distances[:, chosen][:, :, chosen]
        different = chosen[:, None] != chosen[None]
        return auroc(d[:, different].ravel(), d[:, ~different & np.eye(len(chosen), dtype=bool)].ravel())

    drawn = [generator.integers(len(models), size=len(models)) for _ in range(RESAMPLES)]
    values = [found(chosen) for chosen in drawn if len(set(chosen.tolist())) > 1]
    low, high = np.quantile(values, [0.025, 0.975])
    return {"auroc": found(np.arange(len(models))), "interval": [float(low), float(high)], "models": len(models),
            "identifies": bool(low > 0.95)}  # fmt: skip
