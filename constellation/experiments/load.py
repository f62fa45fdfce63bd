"""A load for a service: streams that ask for texts over HTTP and note when each piece came.

    closed   every stream has an answer under way all the time: `streams` answers at once
    open     requests arrive as a Poisson process of `rate` a second, whether or not the service keeps up; one that
             finds all streams busy waits for the next free one, and its clock runs from its arrival. Otherwise a
             service that stalls would be asked less while it does and look better than it is (coordinated omission).

Every request asks for exactly `tokens` tokens (`ignore_eos`), so an answer is right when it has that many, a finish
reason and the end mark; anything else is an error with its message. Some clients may leave early on purpose.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

PATIENCE_S = 60.0  # without a byte, then the service counts as stuck
WARM_S = 3.0  # streams of a closed load begin spread over so long


@dataclass(frozen=True)
class Load:
    """What is asked of the service."""

    streams: int = 64  # connections
    seconds: float = 300.0  # in which requests begin; those under way at the end are finished
    tokens: int = 64  # of an answer
    rate: float | None = None  # requests a second; None: closed
    leave: float = 0.0  # part of the requests whose client leaves after the first piece, [0, 1]
    mode: str = ""  # who answers; empty: the service's default
    seed: int = 0


@dataclass
class Exchange:
    """One request. Times in seconds from the start of the load."""

    stream: int
    due_s: float  # when it arrived
    sent_s: float = 0.0
    first_s: float | None = None  # when its first token came
    last_s: float | None = None  # and its last
    end_s: float = 0.0
    tokens: int = 0
    left: bool = False  # on purpose
    error: str = ""  # empty: right
    gaps: list[tuple[float, int]] = field(default_factory=list)  # seconds since the piece before, tokens of this piece
    kernels: Counter[str] = field(default_factory=Counter)  # tokens by who wrote them


async def drive(url: str, load: Load, prompts: Sequence[str], key: str = "") -> list[Exchange]:
    """Every request that was made, in the order of their ends."""
    draw = random.Random(load.seed)
    done: list[Exchange] = []
    waiting: asyncio.Queue[float] = asyncio.Queue()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=load.streams, max_keepalive_connections=load.streams)

    async def arrive() -> None:
        assert load.rate
        at = draw.expovariate(load.rate)
        while at < load.seconds:
            await asyncio.sleep(max(0.0, at - (time.perf_counter() - begin)))
            waiting.put_nowait(at)
            at += draw.expovariate(load.rate)
        for _ in range(load.streams):
            waiting.put_nowait(float("inf"))

    async def stream(number: int, client: httpx.AsyncClient) -> None:
        due = number / load.streams * min(WARM_S, load.seconds / 10)  # the first time: every stream asks at least once
        if load.rate is None:
            await asyncio.sleep(due)
        while True:
            if load.rate is not None:
                due = await waiting.get()
            if due >= load.seconds:
                return
            asked = Exchange(number, due, left=draw.random() < load.leave)
            body = _body(load, prompts[draw.randrange(len(prompts))], draw.randrange(2**31))
            await _ask(client, asked, body, load.tokens, begin)
            done.append(asked)
            due = time.perf_counter() - begin

    timeout = httpx.Timeout(PATIENCE_S)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=timeout) as client:
        begin = time.perf_counter()
        work = [stream(number, client) for number in range(load.streams)]
        await asyncio.gather(*work, *([arrive()] if load.rate else []))
    return done


def _body(load: Load, prompt: str, seed: int) -> dict[str, Any]:
    body = {
        "prompt": prompt, "max_tokens": load.tokens, "ignore_eos": True, "temperature": 1.0, "seed": seed,
        "truncate_prompt_tokens": -1,  # a prompt may be longer than small kernels read
        "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    return body | ({"mode": load.mode} if load.mode else {})


async def _ask(client: httpx.AsyncClient, asked: Exchange, body: dict[str, Any], tokens: int, begin: float) -> None:
    """Sends one request and fills `asked` with what came of it."""

    def now() -> float:
        return time.perf_counter() - begin

    asked.sent_s = now()
    finish, whole = None, False
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                asked.error = f"{response.status_code} {(await response.aread()).decode(errors='replace')[:200]}"
                return
            async for data in _events(response):
                if data == "[DONE]":
                    whole = True
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    asked.error = str(chunk["error"].get("message", chunk["error"]))[:200]
                    return
                new = (chunk.get("usage") or {}).get("completion_tokens", asked.tokens) - asked.tokens
                if new > 0:
                    _piece(asked, now(), new, (chunk.get("constellation") or {}).get("kernel", ""))
                    if asked.left:
                        return
                for choice in chunk["choices"]:
                    finish = choice["finish_reason"] or finish
        if not (whole and finish == "length" and asked.tokens == tokens):
            asked.error = f"{asked.tokens} of {tokens} tokens, finish {finish}, {'' if whole else 'no '}end mark"
    except (httpx.HTTPError, ValueError, KeyError) as error:
        asked.error = f"{type(error).__name__}: {str(error) or repr(error.__context__)}"[:200]
    finally:
        asked.end_s = now()


def _piece(asked: Exchange, now_s: float, tokens: int, kernel: str) -> None:
    if asked.last_s is None:
        asked.first_s = now_s
    else:
        asked.gaps.append((now_s - asked.last_s, tokens))
    asked.last_s = now_s
    asked.tokens += tokens
    asked.kernels[kernel] += tokens


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()
