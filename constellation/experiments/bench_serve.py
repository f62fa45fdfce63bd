"""Does the service hold under load: no error, no leak, everyone served alike; how soon and how fast do tokens come?

    first token      arrival of a request to its first token; p50, p99
    inter-token      time between two pieces / tokens of the later one, each token counted; p50, p99
    longest gap      the longest time any stream waited for its next piece
    fair             Jain's index of the streams' tokens, (sum x)^2 / (n sum x^2): 1 when all got as many, 1/n at worst
    memory           resident memory of the service, every second; growth from the second quarter to the last, medians
    agrees           tokens that the service counted = tokens that arrived, unless clients left on purpose
    idle             after the last answer nothing is in flight
    tokens a CPU-second   tokens / processor time of the service's process (of the front alone, when kernels are actors)
    parts            where that time goes (parts.py), microseconds a token; of a service started here

The service is at --url, or started here for the run (`--run`) on a free port of the loopback, in one process. Every
model answers once before the clock starts. The load (load.py) is made in this process, on the same machine: its
processor time is reported beside the rest.
"""

from __future__ import annotations

import asyncio
import functools
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from constellation.config import Data
from constellation.data.corpus import read_corpus
from constellation.errors import ConfigError
from constellation.experiments.harness import described, finish, machine_line
from constellation.experiments.load import Exchange, Load, drive
from constellation.experiments.parts import sampled
from constellation.experiments.served import resident_mb, running, served

FAIR, FAIR_ANSWERS = 0.98, 8.0  # least index of a closed load, judged from so many answers a stream on
GROWTH = 0.02, 8.0  # memory may grow by that part, or by so many MB
PROMPT_BYTES = (16, 400)
_CPU = "process_cpu_seconds_total"
WARM_UP_S = 60.0  # patience with kernels that are loaded at the first question


def run(
    url: str | None, load: Load, *, run: Path | None = None, key: str = "", out: Path | None = None
) -> dict[str, Any]:
    """Load the service, print the table, write the raw result to `out`."""
    if (url is None) == (run is None):
        raise ConfigError("name a service that runs by --url URL, or a run folder by --run DIR to start one")
    with served(run) if run else running(url or "") as (where, pid):
        done, seen = asyncio.run(_measure(where, load, _prompts(load.seed), key, pid))
    result = {
        **described(__doc__),
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "service": f"constellation serve --run {run.name} --local" if run else url,
        "load": asdict(load),
        **judge(done, seen, load),
    }
    return finish(result, report(result), out)


def judge(done: Sequence[Exchange], seen: dict[str, Any], load: Load) -> dict[str, Any]:
    """The numbers and verdicts, of what the clients saw and what the service said of itself."""
    right = [asked for asked in done if not asked.error]
    first_ms = [1e3 * (asked.first_s - asked.due_s) for asked in right if asked.first_s is not None]
    gaps = np.array([gap for asked in right for gap in asked.gaps]).reshape(-1, 2)
    between_ms = 1e3 * gaps[:, 0] / np.maximum(gaps[:, 1], 1)
    by_stream = [sum(asked.tokens for asked in done if asked.stream == i) for i in range(load.streams)]
    tokens = sum(by_stream)
    length = max((asked.end_s for asked in done), default=0.0)
    memory = [mb for _, mb in seen["memory_mb"]]
    growth = _growth(memory)
    counted = seen["tokens_after"] - seen["tokens_before"]
    errors = Counter(asked.error for asked in done if asked.error)
    fair = jain(by_stream)
    verdicts = {
        "no_error": bool(right) and not errors,
        "fair": fair >= FAIR if load.rate is None and len(done) >= FAIR_ANSWERS * load.streams else None,
        "no_leak": growth["mb"] <= max(GROWTH[0] * growth["from_mb"], GROWTH[1]) if growth else None,
        "agrees": counted == tokens if load.leave == 0 and not errors else None,
        "idle": seen["in_flight_after"] == 0,
    }
    return {
        "seconds": round(length, 3),
        "requests": len(done),
        "right": len(right),
        "left_on_purpose": sum(asked.left for asked in right),
        "errors": dict(errors.most_common(20)),
        "tokens": tokens,
        "tokens_per_second": round(tokens / length, 2) if length else 0.0,
        "tokens_by_kernel": dict(sum((asked.kernels for asked in done), Counter()).most_common()),
        "first_token_ms": _percentiles(first_ms),
        "from_sending_ms": _percentiles([1e3 * (a.first_s - a.sent_s) for a in right if a.first_s is not None]),
        "inter_token_ms": _percentiles(between_ms, gaps[:, 1]),
        "longest_gap_ms": round(1e3 * float(gaps[:, 0].max()), 3) if len(gaps) else None,
        "jain": round(fair, 5),
        "tokens_by_stream": by_stream,
        "memory_growth": growth,
        "warm_up_seconds": seen["warm_up_s"],
        "client_cpu_seconds": round(seen["client_cpu_s"], 2),
        "server_cpu_seconds": round(seen["server_cpu_s"], 2),
        "tokens_per_cpu_second": round(tokens / seen["server_cpu_s"], 1) if seen["server_cpu_s"] else None,
        "parts_us_per_token": {
            name: round(1e6 * share * seen["server_cpu_s"] / max(1, tokens), 1) for name, share in seen["parts"].items()
        },
        "verdicts": verdicts,
        "raw": {
            **seen,
            "columns": ["stream", "due_s", "sent_s", "first_s", "end_s", "tokens"],
            "answers": [[a.stream, *(_r(t) for t in (a.due_s, a.sent_s, a.first_s, a.end_s)), a.tokens] for a in done],
        },
    }


def jain(amounts: Sequence[float]) -> float:
    """Jain's index of fairness (Jain, Chiu & Hawe 1984), [1/n, 1]; 1 when nobody got anything."""
    total, squares = float(sum(amounts)), float(sum(x * x for x in amounts))
    return total * total / (len(amounts) * squares) if squares else 1.0


def report(result: dict[str, Any]) -> list[str]:
    """The table, a line each."""
    load, verdicts = result["load"], result["verdicts"]
    kind = "closed" if load["rate"] is None else f"open, {load['rate']:g} requests/s"
    lines = [
        f"{machine_line(result)}; {result['service']}",
        f"{load['streams']} streams, {load['tokens']} tokens an answer, {kind}; {result['seconds']:.0f} s",
        f"{'':<20}{'p50':>10}{'p90':>10}{'p99':>10}{'most':>10}",
    ]
    for name, what in (("first_token_ms", "first token, ms"), ("inter_token_ms", "inter-token, ms")):
        row = result[name]
        lines.append(f"{what:<20}" + "".join(f"{'-' if row[p] is None else f'{row[p]:.2f}':>10}" for p in _SHOWN))
    growth = result["memory_growth"]
    memory = f"{growth['from_mb']:.0f} MB {growth['mb']:+.1f} MB" if growth else "not known"
    facts = (
        ("warm-up", f"{result['warm_up_seconds']:.1f} s", None),
        ("tokens a second", f"{result['tokens_per_second']:.1f}", None),
        ("a CPU-second of it", "-" if (cpu := result["tokens_per_cpu_second"]) is None else f"{cpu:.1f} tokens", None),
        ("answers", f"{result['right']} right of {result['requests']}", "no_error"),
        ("longest gap", "-" if result["longest_gap_ms"] is None else f"{result['longest_gap_ms']:.0f} ms", None),
        ("Jain's index", f"{result['jain']:.4f}", "fair"),
        ("memory", memory, "no_leak"),
        ("service counted", f"{result['raw']['tokens_after'] - result['raw']['tokens_before']:.0f} tokens", "agrees"),
        ("in flight after", f"{result['raw']['in_flight_after']:.0f}", "idle"),
    )
    words = {True: "  good", False: "  MISSED", None: ""}
    lines += [f"{what:<20}{said:>24}{words[verdicts.get(name) if name else None]}" for what, said, name in facts]
    if parts := result["parts_us_per_token"]:
        lines.append("us a token: " + ", ".join(f"{name} {us:.0f}" for name, us in parts.items()))
    return lines + [f"{count} x {error}" for error, count in result["errors"].items()]


async def _measure(
    url: str, load: Load, prompts: Sequence[str], key: str, pid: int | None
) -> tuple[list[Exchange], dict[str, Any]]:
    """The requests, and what was seen of the service before, during and after them."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=WARM_UP_S) as client:
        warm_s = await _warm_up(client)
        before = await _metrics(client)
        memory: list[tuple[float, float]] = []
        begin, cpu = time.perf_counter(), time.process_time()

        async def watch() -> None:
            while True:
                mb = resident_mb(pid) if pid else (await _metrics(client)).get("process_resident_memory_bytes", 0) / 1e6
                if mb:
                    memory.append((round(time.perf_counter() - begin, 2), round(mb, 2)))
                await asyncio.sleep(1.0)

        watching = asyncio.create_task(watch())
        with sampled(pid) as parts:
            done = await drive(url, load, prompts, key)
            cpu, last = time.process_time() - cpu, await _metrics(client)
        watching.cancel()
        for _ in range(20):  # a client sees the end a little before the service has noted it
            after = await _metrics(client)
            if not after.get("constellation_in_flight"):
                break
            await asyncio.sleep(0.1)
    return done, {
        "memory_mb": memory,
        "tokens_before": before.get("constellation_tokens_total", 0.0),
        "tokens_after": after.get("constellation_tokens_total", 0.0),
        "in_flight_after": after.get("constellation_in_flight", -1.0),
        "client_cpu_s": cpu,
        "server_cpu_s": last.get(_CPU, 0.0) - before.get(_CPU, 0.0),
        "parts": parts,
        "warm_up_s": round(warm_s, 3),
    }


async def _warm_up(client: httpx.AsyncClient) -> float:
    """Seconds until each model has answered once, all asked at once: kernels may be loaded when first asked."""
    begin = time.perf_counter()
    models = await client.get("/v1/models")
    if models.status_code == 200:  # otherwise the load itself will tell what is wrong
        names = [model["id"] for model in models.json()["data"]]
        asks = [{"model": name, "prompt": "x", "max_tokens": 2} for name in names]
        await asyncio.gather(*(client.post("/v1/completions", json=ask) for ask in asks))
    return time.perf_counter() - begin


async def _metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """Sums over labels of what /metrics says; this request itself does not count."""
    said = await client.get("/metrics")
    said.raise_for_status()
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(said.text):
        for sample in family.samples:
            if sample.labels.get("endpoint") == "/metrics":
                continue
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


@functools.cache
def _prompts(seed: int, count: int = 256) -> tuple[str, ...]:
    """Pieces of held-out documents of the embedded corpus, their lengths log-uniform in `PROMPT_BYTES`."""
    rng = np.random.default_rng(seed)
    documents = [d.text for d in read_corpus(None, Data()).split(0.1)[1] if len(d.text) > 2 * PROMPT_BYTES[1]]
    lengths = np.exp(rng.uniform(np.log(PROMPT_BYTES[0]), np.log(PROMPT_BYTES[1]), count)).astype(int).tolist()
    picks = [documents[i] for i in rng.integers(0, len(documents), count).tolist()]
    begins = [int(rng.integers(0, len(text) - size)) for text, size in zip(picks, lengths)]
    return tuple(text[begin : begin + size] for text, begin, size in zip(picks, begins, lengths))


_SHOWN = ("p50", "p90", "p99", "most")


def _percentiles(values: Sequence[float], weights: Any = None) -> dict[str, float | None]:
    """The least value that at least so much of the weight does not exceed."""
    x = np.asarray(values, np.float64)
    if not len(x):
        return dict.fromkeys(_SHOWN)
    order = np.argsort(x)
    reached = np.cumsum(np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)[order])
    at = [int(np.searchsorted(reached, share * reached[-1])) for share in (0.5, 0.9, 0.99, 1.0)]
    return {name: round(float(x[order[min(i, len(x) - 1)]]), 3) for name, i in zip(_SHOWN, at)}


def _growth(memory: Sequence[float]) -> dict[str, float]:
    """Median of the last quarter less that of the second: the first one fills caches. Empty when seen too rarely."""
    n = len(memory) // 4
    if n == 0:
        return {}
    early, late = statistics.median(memory[n : 2 * n]), statistics.median(memory[-n:])
    return {"from_mb": round(early, 2), "to_mb": round(late, 2), "mb": round(late - early, 2)}


def _r(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
