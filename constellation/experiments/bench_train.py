"""How fast does a kernel train? Ratios in one run against a nanoGPT-style loop, across cores, and through Ray.

    loop    CPU-seconds of one kernel's `fit` step, with its optimizer and with AdamW, and of the peer's step, in one
            process and one thread, taking turns; all three in float32, and all three in bf16 where the processor
            has instructions for it
    cores   tokens per second of one kernel per core, all cores at once / one kernel alone
    ray     tokens per second of `fit` inside a kernel actor / `fit` in a plain process
    kernels tokens per second of a constellation's kernels, each in its actor under one supervisor, their starts
            included, / (cores x one kernel alone in its actor): all resident together, and in waves of one a core

Medians over turns. A ratio never compares two precisions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from constellation import optim, processor
from constellation.config import Config, override
from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.batches import Batches
from constellation.data.cache import build_cache, open_cache
from constellation.data.corpus import read_corpus
from constellation.experiments.harness import described, finish, machine_line
from constellation.experiments.nanogpt import NanoGPT
from constellation.kernel.loss import linear_cross_entropy
from constellation.kernel.model import KernelLM
from constellation.storage.atomic import read_json
from constellation.train.job import Job, resolve_precision
from constellation.train.loop import fit

TURN = 5  # steps of one contestant before the other one's turn


def run(config: Config, *, seconds: float = 20.0, out: Path | None = None) -> dict[str, Any]:
    """Measure everything, print the table, write the raw result to `out`."""
    config = resolve_precision(config)
    cores = os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(cores, mp_context=spawn) as pool:
        cache = _corpus(config, Path(scratch))
        loop = pool.submit(_against_peer, config, cache, seconds).result()
        one = pool.submit(_alone, config, cache, seconds).result()
        all_at_once = [f.result() for f in [pool.submit(_alone, config, cache, seconds) for _ in range(cores)]]
        steps = max(40, round(seconds * one["tokens_per_s"] / (config.train.kernel_batch * config.kernel.context)))
        ray = _through_ray(config, cache, Path(scratch), steps)
    together = sum(r["tokens_per_s"] for r in all_at_once)
    result = {
        **described(__doc__),
        "precision": config.train.precision,
        "config": config.to_json(),
        "loop": loop,
        "one_kernel": one,
        "one_kernel_per_core": {"tokens_per_s": together, "each": all_at_once},
        "cores_ratio": together / one["tokens_per_s"],
        "ray": ray,
    }
    return finish(result, report(result), out)


def report(result: dict[str, Any]) -> list[str]:
    loop, ray, cores = result["loop"], result["ray"], result["cores"]
    lines = [f"{machine_line(result)}; one thread a model, {loop['parameters']:,} parameters"]

    def row(what: str, speed: float, note: str, unit: str = "tokens/s") -> None:
        lines.append(f"{what:<34} {speed:>9,.0f} {unit:<14} {note}")

    for precision, speed in loop["speeds"].items():
        ours, plain, peer = speed["kernel"], speed["kernel_adamw"], speed["peer"]
        note = f"/ nanoGPT-style {ours / peer:.2f} (goal 1.0); step / AdamW's step {plain / ours:.2f} (goal <= 1.35)"
        row(f"kernel, {loop['optimizer']}, {precision}", ours, note, "tokens/CPU-s")
        row(f"kernel, AdamW, {precision}", plain, f"/ nanoGPT-style {plain / peer:.2f}", "tokens/CPU-s")
        row(f"nanoGPT-style, AdamW, {precision}", peer, "", "tokens/CPU-s")
    row(f"{cores} kernels, {cores} cores, {result['precision']}", result["one_kernel_per_core"]["tokens_per_s"],
        f"/ one kernel alone {result['cores_ratio']:.2f} (goal 1.7 on two)")  # fmt: skip
    row("fit in a process", ray["plain"], "")
    row("fit in a Ray actor", ray["actor"], f"overhead {100 * ray['overhead']:+.1f} % (goal < 3 %)")
    for name, found in ray["kernels"].items():
        note = f"/ ({cores} x one actor) {found['ratio']:.2f} (goal 0.85), {found['peak_mem_bytes'] / 2**20:,.0f} MiB"
        row(f"all kernels, {name}, {found['resident']} at once", found["tokens_per_s"], note)
    lines.append(f"peak memory of one training process {result['one_kernel']['peak_mem_bytes'] / 2**20:,.0f} MiB")
    return lines


def _corpus(config: Config, scratch: Path) -> Path:
    documents = read_corpus(None, config.data).documents
    tokenizer = Tokenizer.train((d.text for d in documents[:500]), config.kernel.vocab_size)
    return build_cache(documents, tokenizer, scratch).path


def _kernel_step(config: Config, cache: Path, precision: str, optimizer_name: str) -> Callable[[int], None]:
    changes = {"optim.name": optimizer_name}
    if "ns_precision" in optim.registry.row(optimizer_name).names:
        changes["optim.ns_precision"] = precision
    batches = Batches(open_cache(cache), None, config.kernel.context, config.train.kernel_batch, 0)
    model = KernelLM(config.kernel)
    optimizer = optim.build(override(config, changes).optim, model)

    def step(i: int) -> None:
        x, y = (torch.from_numpy(a) for a in batches.at(i))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = linear_cross_entropy(model.hidden(x), model.unembedding, y, config.train.loss_chunk)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _peer_step(config: Config, cache: Path, precision: str) -> Callable[[int], None]:
    batches = Batches(open_cache(cache), None, config.kernel.context, config.train.kernel_batch, 0)
    model = NanoGPT(config.kernel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(i: int) -> None:
        x, y = (torch.from_numpy(a) for a in batches.at(i))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _against_peer(config: Config, cache: Path, seconds: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    processor.keep_memory()
    precisions = ("fp32", "bf16") if processor.fast_bf16("cpu") else ("fp32",)
    contestants: dict[tuple[str, str], Callable[[int], None]] = {}
    for precision in precisions:
        contestants |= {
            (precision, "kernel"): _kernel_step(config, cache, precision, config.optim.name),
            (precision, "kernel_adamw"): _kernel_step(config, cache, precision, "adamw"),
            (precision, "peer"): _peer_step(config, cache, precision),
        }
    times: dict[tuple[str, str], list[float]] = {name: [] for name in contestants}
    for step in contestants.values():
        for i in range(3):
            step(i)
    began, turn = time.perf_counter(), 0
    while time.perf_counter() - began < len(contestants) * seconds:
        for name, step in contestants.items():
            tick = time.process_time()
            for i in range(TURN):
                step(turn * TURN + i)
            times[name].append((time.process_time() - tick) / TURN)
        turn += 1
    tokens = config.train.kernel_batch * config.kernel.context
    speeds = {
        precision: {
            who: tokens / statistics.median(times[precision, who]) for who in ("kernel", "kernel_adamw", "peer")
        }
        for precision in precisions
    }
    parameters = KernelLM(config.kernel, seed=None).num_parameters()
    return {"speeds": speeds, "turns": turn, "optimizer": config.optim.name, "parameters": parameters}


def _alone(config: Config, cache: Path, seconds: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    processor.keep_memory()
    step = _kernel_step(config, cache, config.train.precision, config.optim.name)
    for i in range(3):
        step(i)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step(done)
        done += 1
    spent = time.perf_counter() - began
    tokens = done * config.train.kernel_batch * config.kernel.context
    return {"tokens_per_s": tokens / spent, "peak_mem_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _job(config: Config, cache: Path, folder: Path, steps: int) -> Job:
    train = dataclasses.replace(config.train, eval_every=0, checkpoint_every=max(10, steps // 4))
    return Job("heart", folder, dataclasses.replace(config, train=train), steps, cache)


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most that this process's descendants held resident at once, looked at every half second."""
    from actors.processes import resident_bytes

    found, end = [0], threading.Event()

    def watch() -> None:
        while not end.wait(0.5):
            found[0] = max(found[0], resident_bytes(os.getpid()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        end.set()
        thread.join()


def _plain(job: Job) -> float:
    for _ in fit(job):
        pass
    return _speed(job)


def _speed(job: Job) -> float:
    """Tokens per second of a finished job, from the first step to the last checkpoint."""
    summary = read_json(job.folder / "summary.json")
    return float(summary["tokens"] / summary["runtime_s"])


def _through_ray(config: Config, cache: Path, scratch: Path, steps: int) -> dict[str, Any]:
    """The same job by `fit` in a fresh process and in a kernel actor under its supervisor, three times each in turn."""
    from actors.connect import connected
    from actors.placement import reserve, share
    from actors.supervisor import Supervisor

    def train(jobs: Sequence[Job], resident: int) -> float:
        """Seconds from the first actor's start to the last one's end."""
        placement = reserve([share(config)] * resident, 60.0, print)
        began = time.perf_counter()
        for _ in Supervisor(config, placement, print).train(jobs):
            pass
        spent = time.perf_counter() - began
        placement.release()
        return spent

    def actor(job: Job) -> float:
        train([job], 1)
        return _speed(job)

    def constellation(turn: int, resident: int) -> dict[str, float]:
        folder, names = scratch / f"all{turn}-{resident}", config.kernels
        jobs = [dataclasses.replace(_job(config, cache, folder / name, steps), role=name) for name in names]
        with peak_memory() as peak:
            spent = train(jobs, resident)
        tokens = steps * len(jobs) * config.train.kernel_batch * config.kernel.context
        return {"tokens_per_s": tokens / spent, "peak_mem_bytes": peak[0]}

    speeds: dict[str, list[float]] = {"plain": [], "actor": []}
    spawn = multiprocessing.get_context("spawn")
    with connected(None):
        for turn in range(3):
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                job = _job(config, cache, scratch / f"plain{turn}", steps)
                speeds["plain"].append(pool.submit(_plain, job).result())
            speeds["actor"].append(actor(_job(config, cache, scratch / f"actor{turn}", steps)))
        cores = processor.cores()
        resident = {"waves": min(cores, len(config.kernels)), "together": len(config.kernels)}
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in resident}
        for turn in range(2):
            for name, count in resident.items():
                turns[name].append(constellation(turn, count))
    plain, through = statistics.median(speeds["plain"]), statistics.median(speeds["actor"])
    kernels = {
        name: {
            "resident": resident[name],
            "tokens_per_s": (speed := statistics.median(one["tokens_per_s"] for one in found)),
            "ratio": speed / (cores * through),
            "peak_mem_bytes": max(one["peak_mem_bytes"] for one in found),
            "turns": found,
        }
        for name, found in turns.items()
    }
    ray = {"plain": plain, "actor": through, "overhead": plain / through - 1, "turns": speeds}
    return {**ray, "kernels": kernels}
