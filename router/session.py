"""The life of a query: route the prompt, let a kernel take a turn, look again, hand off, until it is answered.

    text -> look -> kernel -> turn of W bytes -> look at all bytes so far -> the same kernel, or a hand-off -> ...

Who decodes is behind one seam, `Kernels`: all models in this process (local.py) or one actor each. All
state of a request travels in its packet, a turn has none, so kernels may die or move between turns.
Requests that are under way at once share their kernels' batches, a turn at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from constellation.config import OCEAN, Config
from constellation.coordizer.tokenizer import Tokenizer
from constellation.errors import ConfigError
from constellation.kernel.sample import Sampling
from router.packet import Packet
from router.policy import Policy
from router.text import ShownText
from router.view import Look, View

ROUTE = "route"


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


@dataclass(frozen=True)
class Request:
    prompt: str
    sampling: Sampling = field(default_factory=Sampling)
    mode: str = ROUTE  # "route", or the name of the one kernel that answers


@dataclass(frozen=True)
class Chunk:
    """Some more text of the answer to request number `request`."""

    request: int
    text: str
    kernel: str


@dataclass(frozen=True)
class HandOff:
    """The answer went from one kernel to another at byte `at_bytes` of prompt and answer."""

    at_bytes: int
    source: str
    target: str
    bits_lost: float | None = None  # bits of the next turn's tokens under `target` minus under `source`, if measured


@dataclass(frozen=True)
class Answer:
    """The answer to request number `request`; `text` is all its chunks."""

    request: int
    text: str
    token_ids: tuple[int, ...]  # all that were sampled, an end of text or a stop text's among them
    finish_reason: str  # "stop" | "eos" | "length"
    prompt_tokens: int
    completion_tokens: int
    mode: str
    kernels: tuple[str, ...]  # those that answered, in order of their first turn
    looks: tuple[Look, ...]
    hand_offs: tuple[HandOff, ...]
    seconds: float  # of the turns this request took part in
    seconds_per_token: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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
    for request in requests:
        _check(request, policy, kernels)
    lives = [_Life(i, request, policy, tokenizer, config) for i, request in enumerate(requests)]
    return _run(lives, kernels, config.router.every, measure_hand_offs)


def _check(request: Request, policy: Policy | None, kernels: Kernels) -> None:
    if request.mode != ROUTE and request.mode not in kernels.names:
        raise ConfigError(f"mode={request.mode!r}: choose one of {ROUTE}, {', '.join(kernels.names)}")
    if request.mode == ROUTE:
        if policy is None:
            raise ConfigError(f"mode='{ROUTE}' needs a fitted router; name one of {', '.join(kernels.names)} instead")
        absent = [name for name in (*policy.names, OCEAN) if name not in kernels.names]
        if absent:
            raise ConfigError(f"the router may choose {absent[0]!r}, which is not there; there is {kernels.names}")


def _run(lives: Sequence[_Life], kernels: Kernels, every: int, measure: bool) -> Iterator[Chunk | Answer]:
    going = list(lives)
    while going:
        work: dict[str, list[_Life]] = {}
        for life in going:
            work.setdefault(life.packet.kernel, []).append(life)
        begin = time.perf_counter()
        done = kernels.turns({name: [life.packet.encode() for life in group] for name, group in work.items()}, every)
        seconds = time.perf_counter() - begin
        for name, group in work.items():
            for life, data in zip(group, done[name], strict=True):
                if measure:
                    life.measure(kernels, data)
                text = life.absorb(data, seconds)
                if text:
                    yield Chunk(life.index, text, name)
                if life.packet.finish:
                    yield life.answer()
                else:
                    life.look()
        going = [life for life in going if not life.packet.finish]


class _Life:
    """One request from its first look to its answer."""

    def __init__(self, index: int, request: Request, policy: Policy | None, tokenizer: Tokenizer, config: Config):
        self.index, self.request, self.tokenizer, self.config = index, request, tokenizer, config
        prompt = request.prompt.encode("utf-8", "surrogatepass")
        tokens = tokenizer.encode(prompt)
        self.prompt_tokens = len(tokens)
        self.view = View(policy) if policy and request.mode == ROUTE else None
        self.shown, self.written = ShownText(request.sampling.stop), ""
        self.num_bytes = 0
        self.token_ids: list[int] = []
        self.kernels: list[str] = []
        self.looks: list[Look] = []
        self.hand_offs: list[HandOff] = []
        self.seconds = 0.0
        # a document follows the end of another one: this is what the kernels have read before every first byte
        window = [tokenizer.eos, *tokens][-config.kernel.context :]
        self.packet = Packet(str(index), request.mode, tuple(window), request.sampling)
        self._read(prompt)
        self.look()

    def _read(self, new: bytes) -> None:
        self.num_bytes += len(new)
        if self.view:
            self.view.update(new)

    def look(self) -> None:
        """Decide who goes on."""
        if not self.view:
            return
        before = self.packet.kernel
        look = self.view.decide(self.num_bytes, self.config.router.hysteresis)
        self.looks.append(look)
        if self.kernels and look.kernel != before:
            self.hand_offs.append(HandOff(self.num_bytes, before, look.kernel))
        self.packet = replace(self.packet, kernel=look.kernel, **self.view.carried())

    def absorb(self, data: bytes, seconds: float) -> str:
        """Take a turn's outcome; the text that may be shown now."""
        packet = Packet.decode(data)
        new = list(packet.tokens[len(packet.tokens) - (packet.position - self.packet.position) :])
        if packet.kernel not in self.kernels:
            self.kernels.append(packet.kernel)
        self.packet = packet
        self.token_ids += new
        self.seconds += seconds
        written = self.tokenizer.decode(new)
        self._read(written)
        text = self.shown.feed(written, last=bool(packet.finish))
        self.written += text
        return text

    def measure(self, kernels: Kernels, data: bytes) -> None:
        """Complete the last hand-off, if this was the turn after it."""
        if not self.hand_offs or self.hand_offs[-1].at_bytes != self.num_bytes:
            return
        last, count = self.hand_offs[-1], Packet.decode(data).position - self.packet.position
        lost = kernels.bits(last.target, data, count) - kernels.bits(last.source, data, count)
        self.hand_offs[-1] = replace(last, bits_lost=lost)

    def answer(self) -> Answer:
        return Answer(
            request=self.index,
            text=self.written,
            token_ids=tuple(self.token_ids),
            finish_reason=self.packet.finish,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.token_ids),
            mode=self.request.mode,
            kernels=tuple(self.kernels),
            looks=tuple(self.looks),
            hand_offs=tuple(self.hand_offs),
            seconds=self.seconds,
            seconds_per_token=self.seconds / len(self.token_ids),
        )
