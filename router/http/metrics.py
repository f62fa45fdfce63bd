"""What a front measures of itself, for Prometheus. Definitions; all times in seconds on one monotonic clock.

    constellation_time_to_first_token_seconds   from the request's arrival to its first piece with a token, by mode
    constellation_inter_token_seconds           time between two pieces / tokens of the later one, once per token
    constellation_request_seconds               arrival to end, by mode
    constellation_requests_total                ended requests by endpoint and HTTP status; 499: the client left
    constellation_in_flight                     requests that have arrived and not ended, by endpoint
    constellation_tokens_total                  tokens made, by kernel: their rate is tokens per second
    constellation_tokens_per_second             the same over the last 10 seconds, for who looks without a Prometheus
    constellation_prompt_tokens_total           tokens of prompts read
    constellation_looks_total                   decisions of the router, by the kernel they put in force
    constellation_look_posterior                posterior of the likeliest kernel at these decisions, [0, 1]
    constellation_hand_offs_total               by source and target
    constellation_refused_total                 requests that were not let in, by code
    constellation_kernel_*                      what each kernel's engine says when asked: slots, queue, occupancy

A piece holds tokens that are told together: a client sees the time between pieces, a reader of text the time per token.
Buckets begin at 50 microseconds, as kernels of a million parameters need that little.

A `Metrics` has a registry of its own: two fronts in one process do not see each other. A front has one thread, and so
has this.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from router.answer.query import Answer

WINDOW_S = 10.0  # of tokens per second
CLIENT_LEFT = 499  # nginx's number for a client that closed the connection
SECONDS = tuple(float(f"{step}e{power}") for power in range(-5, 2) for step in (1, 2.5, 5))[2:]  # 50 us .. 50 s
POSTERIORS = (0.125, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class Metrics:
    """Counts what happens in a front; `render` is the answer to GET /metrics."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.registry = CollectorRegistry()
        registry = self.registry
        self._engines: Mapping[str, Mapping[str, Any]] = {}
        self._recent: dict[str, deque[tuple[float, int]]] = {}
        self._first = Histogram(
            "constellation_time_to_first_token_seconds", "Arrival to first token", ["mode"],
            registry=registry, buckets=SECONDS,
        )  # fmt: skip
        self._between = Histogram(
            "constellation_inter_token_seconds", "Time between pieces over the later one's tokens, per token", ["mode"],
            registry=registry, buckets=SECONDS,
        )  # fmt: skip
        self._whole = Histogram(
            "constellation_request_seconds", "Arrival to end", ["mode"], registry=registry, buckets=SECONDS
        )
        self._requests = Counter(
            "constellation_requests", "Requests that ended", ["endpoint", "status"], registry=registry
        )
        self._in_flight = Gauge("constellation_in_flight", "Requests not ended", ["endpoint"], registry=registry)
        self._tokens = Counter("constellation_tokens", "Tokens made", ["kernel"], registry=registry)
        self._prompts = Counter("constellation_prompt_tokens", "Tokens of prompts", registry=registry)
        self._looks = Counter("constellation_looks", "Decisions of the router", ["kernel"], registry=registry)
        self._posterior = Histogram(
            "constellation_look_posterior", "Posterior of the likeliest kernel", registry=registry, buckets=POSTERIORS
        )
        self._hand_offs = Counter("constellation_hand_offs", "Hand-offs", ["source", "target"], registry=registry)
        self._refused = Counter("constellation_refused", "Requests not let in", ["code"], registry=registry)
        registry.register(_Live(self))
        ProcessCollector(registry=registry)  # memory, processor time and open files of this process

    def watch(self, endpoint: str, mode: str = "") -> Watch:
        """A request has arrived; call `ended` when it ends."""
        return Watch(self, endpoint, mode)

    def answered(self, answer: Answer) -> None:
        """An answer is whole: what its life tells of the router."""
        self._prompts.inc(answer.prompt_tokens)
        for look in answer.looks:
            self._looks.labels(look.kernel).inc()
            self._posterior.observe(look.posterior)
        for move in answer.hand_offs:
            self._hand_offs.labels(move.source, move.target).inc()

    def refused(self, code: str) -> None:
        """A request was not let in."""
        self._refused.labels(code).inc()

    def render(self, engines: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[bytes, str]:
        """The page and its content type; `engines`: what each kernel says of its load, numbers by name."""
        self._engines = engines or {}
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def tokens_per_second(self) -> dict[str, float]:
        """Tokens of the last `WINDOW_S` seconds over their length, by kernel."""
        since, rates = self.clock() - WINDOW_S, {}
        for kernel, made in self._recent.items():
            while made and made[0][0] <= since:
                made.popleft()
            rates[kernel] = sum(count for _, count in made) / WINDOW_S
        return rates

    def _made(self, kernel: str, tokens: int, now_s: float) -> None:
        self._tokens.labels(kernel).inc(tokens)
        made = self._recent.setdefault(kernel, deque())
        made.append((now_s, tokens))
        while made[0][0] <= now_s - WINDOW_S:
            made.popleft()


class Watch:
    """One request; `mode` may be told once it is known. Pieces of several prompts name the `stream` they belong to."""

    def __init__(self, metrics: Metrics, endpoint: str, mode: str):
        self.metrics, self.endpoint, self.mode = metrics, endpoint, mode
        self.began_s = metrics.clock()
        self._last: dict[int, float] = {}  # stream -> when its last piece came
        self._ended = False
        metrics._in_flight.labels(endpoint).inc()

    def piece(self, kernel: str, tokens: int, stream: int = 0) -> None:
        """So many new tokens, made by `kernel`, have come; a piece without tokens is none."""
        if tokens == 0:
            return
        metrics, now = self.metrics, self.metrics.clock()
        if stream in self._last:
            between, seconds = metrics._between.labels(self.mode), (now - self._last[stream]) / tokens
            for _ in range(tokens):  # the library has no weights; a turn's tokens are few
                between.observe(seconds)
        else:
            metrics._first.labels(self.mode).observe(now - self.began_s)
        self._last[stream] = now
        metrics._made(kernel, tokens, now)

    def ended(self, status: int = 200) -> None:
        """The request is over; a second call changes nothing, so it may stand in a `finally`."""
        if not self._ended:
            self._ended = True
            metrics = self.metrics
            metrics._in_flight.labels(self.endpoint).dec()
            metrics._requests.labels(self.endpoint, str(status)).inc()
            metrics._whole.labels(self.mode).observe(metrics.clock() - self.began_s)


class _Live:
    """What is true at the moment of asking."""

    def __init__(self, metrics: Metrics):
        self.metrics = metrics

    def describe(self) -> Iterator[Metric]:
        return iter(())  # families depend on what engines say

    def collect(self) -> Iterator[Metric]:
        rate = GaugeMetricFamily(
            "constellation_tokens_per_second", f"Tokens made over the last {WINDOW_S:g} s", labels=["kernel"]
        )
        for kernel, value in self.metrics.tokens_per_second().items():
            rate.add_metric([kernel], value)
        yield rate
        engines = self.metrics._engines
        for name in sorted({name for says in engines.values() for name in says}):
            family = GaugeMetricFamily(f"constellation_kernel_{name}", f"{name} of the engine", labels=["kernel"])
            for kernel, says in engines.items():
                if isinstance(says.get(name), int | float):
                    family.add_metric([kernel], float(says[name]))
            if family.samples:
                yield family
