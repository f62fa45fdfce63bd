"""Which metric, recursion and temperature of a kernel is best at equal FLOPs, and what does recursion do?

metric       fidelity, geodesic, dot
recursion    plain (3 blocks), tied (prelude, one block three times, coda), untied (5 blocks)
temperature  off, fixed (beta .44), learned, scalable (s ln n)

Every arm is trained for as many multiplications as the peer, so a deeper one sees fewer tokens; bits per byte of all
held-out documents, over paired seeds, at the trained context and at four times of it (the same weights with longer
tables). Differences are against `PEER`: hierarchical bootstrap over seeds and documents, one-sided paired t over seeds,
Holm over the arms. Beside it: what each loop of the tied arms does (recursion_loops.py), and how a kernel branches from
the peer to one domain (branching.py): with all weights, with a role's kappa as a temperature, with an adapter alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from constellation.config import Config, override
from constellation.data.batches import Batches
from constellation.data.cache import TokenCache, open_cache
from constellation.errors import ConfigError
from constellation.experiments import branching
from constellation.experiments.beta_observables import stretched
from constellation.experiments.harness import described, finish, prepared
from constellation.experiments.recursion_loops import loops
from constellation.experiments.statistics import difference, holm
from constellation.kernel.model import KernelLM, multiplications
from constellation.pipeline.request import Plan
from constellation.roster import OCEAN
from constellation.train.checkpoint import load_model
from constellation.train.job import Job
from constellation.train.loop import fit
from constellation.train.score import document_bits, score

METRICS = ("fidelity", "geodesic", "dot")
RECURSIONS: dict[str, dict[str, int]] = {
    "plain": {"kernel.layers": 3},
    "tied": {"kernel.layers": 3, "kernel.prelude": 1, "kernel.loops": 3, "kernel.coda": 1},
    "untied": {"kernel.layers": 5},
}
TEMPERATURES = ("fixed", "off", "learned", "scalable")
PEER = "fidelity/plain/fixed"
ALL = tuple("/".join(arm) for arm in itertools.product(METRICS, RECURSIONS, TEMPERATURES))
ONE_CHANGED = tuple(arm for arm in ALL if sum(a != b for a, b in zip(arm.split("/"), PEER.split("/"), strict=True)) < 2)
LONGER = 4


def run(
    corpus: Path | None, work: Path, config: Config, *, seeds: Sequence[int] = range(3),
    arms: Sequence[str] = ONE_CHANGED, out: Path | None = None, say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Train and score every arm, print the tables, write the raw result; what `work` holds already is used again."""
    if unknown := set(arms) - set(ALL):
        raise ConfigError(f"--arms {sorted(unknown)[0]}: metric/recursion/temperature, such as {PEER}")
    arms = (PEER, *(arm for arm in arms if arm != PEER))
    torch.set_num_threads(config.train.threads)
    bits: dict[str, dict[str, list[Any]]] = {arm: {"trained": [], "longer": []} for arm in arms}
    steps, branches, by_loop, dev = dict[str, int](), list[dict[str, Any]](), list[dict[str, Any]](), None
    for seed in seeds:
        plan = prepared(work / f"seed{seed}", corpus, override(config, {"train.seed": seed}))
        dev = open_cache(plan.dev)
        for arm in arms:
            model, steps[arm] = trained(plan, arm)
            say(f"seed {seed} {arm}: {steps[arm]} steps")
            context = model.config.context
            bits[arm]["trained"].append(document_bits(score(model, dev)))
            bits[arm]["longer"].append(document_bits(score(stretched(model, LONGER * context), dev)))
            if "/tied/" in arm:
                x, y = (torch.from_numpy(a) for a in Batches(dev, None, context, 16, 0).at(0))
                by_loop.append({"arm": arm, "seed": seed, **loops(model, x, y)})
            if arm == PEER:
                branches += branched(model, plan, seed)
    assert dev is not None
    result = {
        **described(__doc__), "corpus": str(corpus) if corpus else "embedded", "preset": config.preset,
        "kernel": vars(config.kernel), "tokens_of_the_peer": steps[PEER] * config.train.batch * config.kernel.context,
        "seeds": list(seeds), "peer": PEER, "rows": judged(bits, dev, steps), "loops": by_loop,
        "branches": branches, "raw": {arm: {k: np.array(v).round(2).tolist() for k, v in own.items()}
                                      for arm, own in bits.items()},
    }  # fmt: skip
    return finish(result, report(result), out)


def settings(arm: str) -> dict[str, Any]:
    """The arm as dotted settings."""
    metric, recursion, temperature = arm.split("/")
    return {"kernel.metric": metric, "kernel.coupling": temperature, **RECURSIONS[recursion]}


def trained(plan: Plan, arm: str) -> tuple[KernelLM, int]:
    """The arm's model after as many multiplications as the peer's, and its steps."""
    peer, own = (override(plan.config, settings(name)) for name in (PEER, arm))
    tokens = peer.train.batch * peer.kernel.context
    whole = peer.train.tokens / tokens
    steps = max(1, round(whole * multiplications(peer.kernel) / multiplications(own.kernel)))
    folder = plan.run / arm.replace("/", "-")
    for _ in fit(Job(OCEAN, folder, own, steps, plan.train, None, plan.tokenizer)):
        pass
    return load_model(folder), steps


def branched(model: KernelLM, plan: Plan, seed: int) -> list[dict[str, Any]]:
    """Bits per byte of one domain, the seed's, before and after a kernel learned it in each way."""
    train, dev = open_cache(plan.train), open_cache(plan.dev)
    names = sorted({d or "" for d in train.domains} & {d or "" for d in dev.domains})
    domain = names[seed % len(names)]
    mine, held = (np.flatnonzero([(d or "") == domain for d in cache.domains]) for cache in (train, dev))
    segments = np.stack([train.offsets[mine], train.offsets[mine + 1]], axis=1)
    c = plan.config
    steps = max(1, round(c.train.tokens / 8 / (c.train.kernel_batch * c.kernel.context)))
    batches = Batches(train, segments, c.kernel.context, c.train.kernel_batch, seed)

    def measured(kernel: KernelLM) -> float:
        return float(document_bits(score(kernel, dev))[held].sum() / dev.byte_length[held].sum())

    rows = [{"seed": seed, "domain": domain, "way": "before", "weights": 0, "bits_per_byte": measured(model)}]
    for way in branching.WAYS:
        kernel, weights = branching.branch(model, way, batches, steps, 2e-3, seed)
        rows.append({"seed": seed, "domain": domain, "way": way, "weights": weights, "bits_per_byte": measured(kernel)})
    return rows


def judged(bits: dict[str, Any], dev: TokenCache, steps: dict[str, int]) -> list[dict[str, Any]]:
    """A row an arm: bits per byte, what a longer context changes, the difference from the peer with its verdict."""
    rows: list[dict[str, Any]] = []
    for arm, own in bits.items():
        found = {at: np.array(own[at]) for at in ("trained", "longer")}
        per_byte = {at: float(b.sum(1).mean() / dev.byte_length.sum()) for at, b in found.items()}
        against = {at: difference(b, np.array(bits[PEER][at]), dev.byte_length) for at, b in found.items()}
        rows.append({
            "arm": arm, "steps": steps[arm], "bits_per_byte": per_byte["trained"],
            "bits_per_byte_at_4_times_the_context": per_byte["longer"],
            **{f"difference_{at}": {k: _none(v) for k, v in d.to_json().items()} for at, d in against.items()},
        })  # fmt: skip
    others = [row for row in rows if row["arm"] != PEER]
    adjusted = holm([math.nan if (p := row["difference_trained"]["p_value"]) is None else p for row in others])
    for row, p in zip(others, adjusted, strict=True):
        row["holm_p"] = _none(p)
        told = row["difference_trained"]["verdict"]
        row["verdict"] = {"better": "helped", "worse": "hurt"}.get(told, "nothing shown")
    return rows


def report(result: dict[str, Any]) -> list[str]:
    """The tables, a line each."""
    lines = [f"{'arm':<27}{'steps':>6}{'bits/byte':>10}{'- peer':>9}  95 % interval      {'4 x context':>11}  verdict"]
    for row in result["rows"]:
        d = row["difference_trained"]
        lines.append(
            f"{row['arm']:<27}{row['steps']:>6}{row['bits_per_byte']:>10.4f}{d['mean']:>+9.4f}  "
            f"[{d['low']:+.4f}, {d['high']:+.4f}]{row['bits_per_byte_at_4_times_the_context']:>11.4f}  "
            f"{row.get('verdict', 'the peer')}"
        )
    for row in result["loops"]:
        nats, step = (", ".join(f"{v:.3f}" for v in row[name]) for name in ("nats", "step"))
        lines.append(f"loops of {row['arm']}, seed {row['seed']}: nats {nats}; step {step} rad")
    for way in ("before", *branching.WAYS):
        rows = [row for row in result["branches"] if row["way"] == way]
        told = ", ".join(f"{row['bits_per_byte']:.4f} ({row['domain']})" for row in rows)
        lines.append(f"branch, {way} ({rows[0]['weights']:,} weights): {told}")
    return lines


def _none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
