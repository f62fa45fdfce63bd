"""What does a kind of kernel cost beside another of the same size? Speeds in one run, one thread, float32.

    train     tokens a CPU-second of a step (forward, backward, clip, the optimizer of the preset)
    decode    tokens a CPU-second of the engine, 1 stream and 16, greedy, the prompt read anew

Both kinds of a pair take turns, and a ratio is the median of the ratios of neighbouring turns, beside their quartiles.
Weights and tokens are random: what is measured does not depend on them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from constellation import optim, processor
from constellation.config import Config
from constellation.config import Kernel as KernelConfig
from constellation.decoding.batch import Batch, Writing
from constellation.decoding.sample import Sampling
from constellation.experiments.harness import described, finish, machine_line
from constellation.kernel.loss import linear_cross_entropy
from constellation.kernel.model import KernelLM

PROMPT, NEW = 32, 64
STREAMS = (1, 16)
# (kind, settings, peer, settings, least ratio of the speeds or None)
PAIRS: list[tuple[str, dict[str, Any], str, dict[str, Any], float | None]] = [
    ("fidelity", {}, "dot", {"metric": "dot"}, 0.95),
    ("geodesic", {"metric": "geodesic"}, "dot", {"metric": "dot"}, None),
    ("scalable", {"coupling": "scalable"}, "fixed coupling", {}, None),
    ("one key for all heads", {"kv_heads": 1}, "a key a head", {}, None),
    ("1 + 1 x 3 + 1 tied", {"layers": 3, "prelude": 1, "loops": 3, "coda": 1}, "5 untied", {"layers": 5}, 1.0),
]


def run(config: Config, *, turns: int = 15, out: Path | None = None) -> dict[str, Any]:
    """Measure, print the table, write the raw result to `out`."""
    torch.set_num_threads(1)
    processor.keep_memory()
    result: dict[str, Any] = {**described(__doc__), "turns": turns, "kernel": vars(config.kernel), "rows": []}
    for kind, changes, peer, others, least in PAIRS:
        models = [KernelLM(dataclasses.replace(config.kernel, **c), seed=1) for c in (changes, others)]
        tasks = {"train": [training(config, model) for model in models]}
        tasks |= {f"decode {n}": [decoding(model, n) for model in models] for n in STREAMS}
        for task, (ours, theirs) in tasks.items():
            speeds, ratios = compare(ours, theirs, turns)
            low, ratio, high = statistics.quantiles(ratios, n=4)
            result["rows"].append({
                "task": task, "kind": kind, "peer": peer, "tokens_per_s": speeds[0], "peer_tokens_per_s": speeds[1],
                "ratio": ratio, "quartiles": [low, high], "least": least,
                "met": None if least is None else ratio >= least,
            })  # fmt: skip
    return finish(result, report(result), out)


Task = Callable[[], int]  # does its work once; tokens


def compare(ours: Task, theirs: Task, turns: int) -> tuple[list[float], list[float]]:
    """Median speeds of both, and the ratio of each turn."""
    for task in (ours, theirs):
        task()
    found = [[_speed(task) for task in ((ours, theirs) if turn % 2 else (theirs, ours))] for turn in range(turns)]
    pairs = [pair if turn % 2 else pair[::-1] for turn, pair in enumerate(found)]
    return [statistics.median(p[i] for p in pairs) for i in (0, 1)], [a / b for a, b in pairs]


def _speed(task: Task) -> float:
    tick = time.process_time()
    tokens = task()
    return tokens / (time.process_time() - tick)


def training(config: Config, model: KernelLM) -> Task:
    """Five steps."""
    optimizer, shape = optim.build(config.optim, model), (config.train.kernel_batch, config.kernel.context)
    x, y = (torch.randint(config.kernel.vocab_size, shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))

    def steps() -> int:
        for _ in range(5):
            loss = linear_cross_entropy(model.hidden(x), model.unembedding, y, config.train.loss_chunk)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return 5 * x.numel()

    return steps


def decoding(model: KernelLM, streams: int) -> Task:
    """NEW tokens after each of `streams` prompts."""
    config: KernelConfig = model.config
    batch, shape = Batch(model, slots=streams), (streams, PROMPT)
    prompts = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(2)).tolist()

    def decode() -> int:
        batch.forget()
        for prompt in prompts:
            batch.add(Writing(tokens=list(prompt), sampling=Sampling(temperature=0), room=NEW, take=_counted()))
        while not batch.idle:
            batch.step()
        return streams * NEW

    return decode


def _counted() -> Callable[[int], bool]:
    count = iter(range(1, NEW + 1))
    return lambda token: next(count) == NEW


def report(result: dict[str, Any]) -> list[str]:
    """The table, a line each."""
    lines = [
        f"{machine_line(result)}; one thread, float32, {result['turns']} turns",
        f"{'task':<10}{'kind':<23}{'tokens/s':>9}  {'beside':<15}{'tokens/s':>9}{'ratio':>7}  quartiles     target",
    ]
    for row in result["rows"]:
        low, high = row["quartiles"]
        verdict = "" if row["least"] is None else f">= {row['least']:g} {'met' if row['met'] else 'MISSED'}"
        lines.append(
            f"{row['task']:<10}{row['kind']:<23}{row['tokens_per_s']:>9.0f}  {row['peer']:<15}"
            f"{row['peer_tokens_per_s']:>9.0f}{row['ratio']:>7.2f}  {low:.2f} - {high:.2f}   {verdict}"
        )
    return lines
