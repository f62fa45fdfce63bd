"""Which way to answer is worth its cost: bits per byte on held-out text beside tokens per second, mode by mode.

    quality   causal bits per byte of held-out documents: the weight of a token uses only bytes before it
    cost      tokens per second of answers to the beginnings of those documents, one by one, in this process
    calls     of kernels, per token: how often an answer would cross to another process
    overhead  the same answers through actors, and through HTTP, actors and a front: microseconds a token more

A mode wins for its cost when none that is at least as fast is better, and the best of those is the one that no
dearer mode beats by more than `WORTH` bits per byte for each doubling of the time. The barycenter needs whole
distributions, so texts are read here by the service's own scorer (router/answer/scoring.py), mode by mode.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.cache import open_cache
from constellation.data.corpus import read_corpus
from constellation.decoding.sample import Sampling
from constellation.errors import DataError
from constellation.experiments.harness import described
from constellation.pipeline.prepare import document_bytes, open_plan
from constellation.pipeline.serving import application, servable, service_of
from constellation.roster import OCEAN
from router.answer.kernels import Kernels
from router.answer.local import LocalKernels
from router.answer.packet import Packet
from router.answer.query import Answer, Ask
from router.answer.service import Service
from router.answer.turn import Ear
from router.decide.modes import BARYCENTER, MIXTURE, ROUTE
from router.http.listen import Listener, bind

WORTH = 0.01  # bits per byte that a doubling of the time must save
TEMPERATURE, TOP_P = 0.8, 0.95
ROUNDS = 4  # of each answer whose overhead is measured


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to answer."""

    mode: str
    top_k: int = 1

    @property
    def name(self) -> str:
        return f"{self.mode}_{self.top_k}" if self.mode in (MIXTURE, BARYCENTER) else self.mode


MODES = (Mode(OCEAN), Mode(ROUTE), *(Mode(mode, k) for mode in (MIXTURE, BARYCENTER) for k in (2, 3)))


class Counted:
    """Kernels, and how often they were asked."""

    def __init__(self, inner: Kernels):
        self.inner, self.turns, self.readings = inner, 0, 0
        self.names = inner.names
        self.bits, self.score, self.stats = inner.bits, inner.score, inner.stats

    async def turn(self, kernel: str, packet: Packet, budget_bytes: int, ear: Ear | None = None) -> Packet:
        self.turns += 1
        return await self.inner.turn(kernel, packet, budget_bytes, ear)

    async def log_probs(self, kernel: str, windows: Sequence[Sequence[int]], tail: int) -> Any:
        self.readings += 1
        return await self.inner.log_probs(kernel, windows, tail)


def run(
    run: Path,
    *,
    corpus: Path | None = None,
    most_bytes: int = 30_000,
    answers: int = 8,
    tokens: int = 128,
    over_ray: bool = True,
    modes: Sequence[Mode] = MODES,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure `run` on text that it was not trained on, `most_bytes` of it."""
    config = servable(run)
    torch.set_num_threads(1)
    texts = held_out(run, corpus, most_bytes)
    prompts = [text[:64].decode("utf-8", "ignore") for text in texts if len(text) >= 256][:answers]
    if not prompts:
        raise DataError("held-out documents of 256 bytes at least are needed to answer their beginnings")
    kernels = Counted(LocalKernels.from_run(run))
    service = service_of(run, kernels)
    rows: dict[str, dict[str, Any]] = {}
    for mode in modes:
        rows[mode.name] = asyncio.run(_measure(service, kernels, mode, texts, prompts, tokens))
        say(_line(mode.name, rows[mode.name]))
    result: dict[str, Any] = {
        **described(__doc__), "run": run.name, "preset": config.preset,
        "corpus": corpus.name if corpus else "held out by the run",
        "documents": len(texts), "bytes": sum(map(len, texts)), "prompts": len(prompts), "tokens": tokens,
        "every_bytes": config.router.every, "temperature": TEMPERATURE, "top_p": TOP_P, "worth_bits": WORTH,
        "modes": rows, "wins": winner(rows),
    }  # fmt: skip
    say(f"wins for its cost: {result['wins']}")
    result["overhead"] = overhead(run, prompts, tokens, over_ray)
    for where, row in result["overhead"].items():
        say(f"{where:<12} {row['us_per_token']:>8.0f} us a token, {row['more_us_per_token']:>+7.0f} over this process")
    return result


def held_out(run: Path, corpus: Path | None, most_bytes: int) -> list[bytes]:
    """Documents that the run was not trained on, in an order of their own, until there are `most_bytes`."""
    plan = open_plan(run)
    if corpus is None:
        found = document_bytes(open_cache(plan.dev), Tokenizer.load(plan.tokenizer))
    else:
        trained = set(open_cache(plan.train).ids)
        found = [d.text.encode() for d in read_corpus(corpus, plan.config.data).documents if d.id not in trained]
    order = np.random.default_rng(0).permutation(len(found))
    texts, size = list[bytes](), 0
    for i in order:
        if found[i] and size < most_bytes:
            texts.append(found[i][: most_bytes - size])
            size += len(texts[-1])
    if not texts:
        raise DataError(f"{corpus or run}: no text that the run was not trained on")
    return texts


async def _measure(
    service: Service, kernels: Counted, mode: Mode, texts: Sequence[bytes], prompts: Sequence[str], tokens: int
) -> dict[str, Any]:
    nats_D = np.array([await _nats(service, mode, text) for text in texts])
    bytes_D = np.array([len(text) for text in texts])
    await _answer(service, mode, prompts[0], tokens, 0)  # loads what answers
    kernels.turns = kernels.readings = 0
    answers = [await _answer(service, mode, prompt, tokens, seed, measure=mode.mode == ROUTE)
               for seed, prompt in enumerate(prompts)]  # fmt: skip
    count, seconds = sum(a.completion_tokens for a in answers), sum(a.seconds for a in answers)
    lost = [h.bits_lost for a in answers for h in a.hand_offs if h.bits_lost is not None]
    return {
        "bits_per_byte": float(nats_D.sum() / math.log(2) / bytes_D.sum()),
        "bits_per_byte_D": (nats_D / math.log(2) / bytes_D).round(6).tolist(),
        "tokens_per_s": count / seconds,
        "turns_per_token": kernels.turns / count,
        "readings_per_token": kernels.readings / count,
        "hand_offs_per_1000_tokens": 1000 * sum(len(a.hand_offs) for a in answers) / count,
        "bits_lost_per_hand_off": statistics.fmean(lost) if lost else None,
    }


async def _nats(service: Service, mode: Mode, text: bytes) -> float:
    scored = await service.score([*service.tokenizer.encode(text), service.tokenizer.eos], mode.mode, 0, mode.top_k)
    return -sum(one.log_prob for one in scored if one is not None)


async def _answer(service: Service, mode: Mode, prompt: str, tokens: int, seed: int, measure: bool = False) -> Answer:
    how = Sampling(TEMPERATURE, top_p=TOP_P, seed=seed, max_new_tokens=tokens, ignore_eos=True)
    return await service.answer(Ask(prompt, how, mode.mode, mode.top_k, measure=measure))


def winner(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The mode with the least bits per byte + WORTH log2(time a token), ties to the faster one."""
    return min(rows, key=lambda name: (cost(rows[name]), -rows[name]["tokens_per_s"]))


def cost(row: Mapping[str, Any]) -> float:
    return float(row["bits_per_byte"] - WORTH * math.log2(row["tokens_per_s"]))


# -- what lies between a client and a kernel ---------------------------------------------------------------------------


def overhead(run: Path, prompts: Sequence[str], tokens: int, over_ray: bool) -> dict[str, dict[str, float]]:
    """Microseconds a token of one stream at a time, the same tokens in every place: {place: row}."""
    local = LocalKernels.from_run(run)
    places: dict[str, float] = {"process": asyncio.run(_by_service(service_of(run, local), prompts, tokens))}
    places["http"] = asyncio.run(_by_http(run, local, prompts, tokens))
    if over_ray:
        from actors.remote import open_kernels

        with open_kernels(run) as kernels:  # those that are up, else ones for the length of the block
            places["ray"] = asyncio.run(_by_service(service_of(run, kernels), prompts, tokens))
            places["http + ray"] = asyncio.run(_by_http(run, kernels, prompts, tokens))
    first = places["process"]
    return {name: {"us_per_token": t * 1e6, "more_us_per_token": (t - first) * 1e6} for name, t in places.items()}


async def _by_service(service: Service, prompts: Sequence[str], tokens: int) -> float:
    """Seconds a token: the least of some rounds for each prompt, for others use this machine too; mean over prompts."""

    async def ask(prompt: str, seed: int) -> None:
        await _answer(service, Mode(ROUTE), prompt, tokens, seed)

    return await _least(ask, prompts, tokens)


async def _by_http(run: Path, kernels: Kernels, prompts: Sequence[str], tokens: int) -> float:
    """The same of streamed completions."""
    import httpx

    async with _listening(run, kernels) as url, httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def ask(prompt: str, seed: int) -> None:
            body = {"model": "constellation", "prompt": prompt, "max_tokens": tokens, "seed": seed, "stream": True,
                    "ignore_eos": True, "temperature": TEMPERATURE, "top_p": TOP_P}  # fmt: skip
            async with client.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                async for _ in response.aiter_lines():
                    pass

        return await _least(ask, prompts, tokens)


async def _least(ask: Callable[[str, int], Awaitable[None]], prompts: Sequence[str], tokens: int) -> float:
    seconds = np.empty((ROUNDS, len(prompts)))
    for i in range(ROUNDS):  # the first one also loads what answers
        for seed, prompt in enumerate(prompts):
            begin = time.perf_counter()
            await ask(prompt, seed)
            seconds[i, seed] = time.perf_counter() - begin
    return float(seconds.min(axis=0).mean() / tokens)


@contextlib.asynccontextmanager
async def _listening(run: Path, kernels: Kernels) -> AsyncIterator[str]:
    listener = Listener(application(run, kernels), bind("127.0.0.1", 0), grace_s=5)
    await listener.start()
    try:
        yield f"http://127.0.0.1:{listener.port}"
    finally:
        await listener.drain()


# -- words -------------------------------------------------------------------------------------------------------------


def _line(name: str, row: Mapping[str, Any]) -> str:
    lost = row["bits_lost_per_hand_off"]
    told = f"{row['bits_per_byte']:.4f} bits/byte, {row['tokens_per_s']:.0f} tokens/s"
    calls = f"{row['turns_per_token']:.2f} turns and {row['readings_per_token']:.2f} readings a token"
    return f"{name:<14}{told}, {calls}" + ("" if lost is None else f", {lost:+.2f} bits lost a hand-off")
