"""A batch of queries, answered in one thread: the driver of query.py for the command line, experiments and tests.

Who decodes is behind one seam, `Kernels`: all models in this process (local.py) or one actor each. Requests
that are under way at once share their kernels' batches, a turn at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from constellation.config import Config
from constellation.coordizer.tokenizer import Tokenizer
from router.answer.packet import Packet
from router.answer.query import ROUTE, Answer, Ask, Bits, Call, HandOff, Life, Piece, Turn, check
from router.decide.policy import Policy

__all__ = ["ROUTE", "Answer", "Chunk", "HandOff", "Kernels", "Request", "generate"]

Request = Ask


class Kernels(Protocol):
    """Those who answer."""

    @property
    def names(self) -> tuple[str, ...]:
        """Who can be asked, OCEAN among them."""
        ...

    def turns(self, work: Mapping[str, Sequence[bytes]], budget_bytes: int) -> dict[str, list[bytes]]:
        """One turn of every kernel in `work` on its packets, in their order (turn.py says what a turn is)."""
        ...

    def bits(self, kernel: str, packet: bytes, count: int) -> float:
        """Bits `kernel` needs for the last `count` tokens of the packet's window."""
        ...

    def log_probs(self, kernel: str, windows: Sequence[Sequence[int]], tail: int) -> NDArray[np.float32]:
        """Log-probability of the next token after each of the last `tail` tokens of each window, (B, tail, V).

        Asked of kernels that answer together.
        """
        ...


@dataclass(frozen=True)
class Chunk:
    """Some more text of the answer to request number `request`."""

    request: int
    text: str
    kernel: str


def generate(
    policy: Policy | None,
    kernels: Kernels,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    config: Config,
    measure_hand_offs: bool = False,
) -> Iterator[Chunk | Answer]:
    """Answer all requests: chunks as they come, an `Answer` for each when it is whole.

    `policy` may be None when no request has mode "route". `measure_hand_offs` costs two more forward
    passes per hand-off, for `HandOff.bits_lost`.
    """
    if measure_hand_offs:
        requests = [replace(request, measure=True) for request in requests]
    for request in requests:
        check(request, policy, kernels.names)
    return _run([Life(i, request, policy, tokenizer, config) for i, request in enumerate(requests)], kernels)


def _run(lives: Sequence[Life], kernels: Kernels) -> Iterator[Chunk | Answer]:
    steps = {i: life.live() for i, life in enumerate(lives)}
    results: dict[int, Any] = dict.fromkeys(steps)
    while steps:
        wanted: dict[int, list[Call]] = {}
        for i in list(steps):
            try:
                step = steps[i].send(results[i])
                while isinstance(step, Piece):
                    if step.text:
                        yield Chunk(i, step.text, step.kernel)
                    step = next(steps[i])
                wanted[i] = step
            except StopIteration as end:
                del steps[i]
                yield end.value
        results = _fetch(wanted, kernels)


def _fetch(wanted: Mapping[int, Sequence[Call]], kernels: Kernels) -> dict[int, list[Any]]:
    """The results of all calls, by life and in their order; turns of a kernel make one batch."""
    found: dict[int, list[Any]] = {i: [None] * len(calls) for i, calls in wanted.items()}
    turns: dict[int, dict[str, list[tuple[int, int, bytes]]]] = {}
    for i, calls in wanted.items():
        for at, call in enumerate(calls):
            if isinstance(call, Turn):
                turns.setdefault(call.budget_bytes, {}).setdefault(call.kernel, []).append(
                    (i, at, call.packet.encode())
                )
            elif isinstance(call, Bits):
                found[i][at] = kernels.bits(call.kernel, call.packet, call.count)
            else:
                found[i][at] = kernels.log_probs(call.kernel, [call.window], call.tail)[0]
    for budget, work in turns.items():
        done = kernels.turns({name: [packet for *_, packet in group] for name, group in work.items()}, budget)
        for name, group in work.items():
            for (i, at, _), data in zip(group, done[name], strict=True):
                found[i][at] = Packet.decode(data)
    return found
