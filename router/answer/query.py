"""The life of a query, told once, whoever carries it: it says what it needs of the kernels and goes on with the answer.

    look -> turn of W bytes -> text -> look at all bytes so far -> the same kernels, or a hand-off -> ...

`live` is a generator without any transport in it. It yields lists of calls (`Turn`, `ReadCall`, `Bits`), is sent
their results, and yields a `Piece` for every stretch of new text; it returns the `Answer`. Its driver is service.py,
for the command line, Python and HTTP alike.

A driver that learns of a turn's tokens while it is under way lets `hear` them and sends what `tell` makes of them; the
turn's own piece is then the rest. Looks are where turns end, whoever listens.

All that a kernel needs of a request travels in its packet, a turn has no state: kernels may die or move between turns.

**Kernels that answer together** would have to be asked for every token. Instead the heaviest of them drafts a
stretch, all read it at once, and the token of their mixture is drawn at each place with the number u(seed, position)
that belongs to it, up to and including the first that differs from the draft. What was drawn is what would have been
drawn one by one, whatever the draft was: the draft decides how often kernels are asked, not what is written.
(Speculative decoding, Leviathan et al. 2023, with common random numbers instead of rejection.)
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from constellation.config import Config
from constellation.coordizer.tokenizer import Tokenizer
from constellation.decoding.basins import Basins
from constellation.decoding.basins import check as check_terms
from constellation.decoding.sample import Sampling, TokenScore
from constellation.errors import ConfigError, RunError
from constellation.roster import OCEAN
from router.answer.certificate import CertificateWriter
from router.answer.generation import GenerationTelemetry, generation_telemetry
from router.answer.joint import JointAnswer
from router.answer.packet import Packet
from router.answer.text import ShownText
from router.answer.turn import step_of
from router.answer.view import Look, View, integration_of
from router.decide.fisher_rao import FisherRaoRouter
from router.decide.mixture import Weights, combine, judged, weights
from router.decide.modes import MIXED, MODES, ROUTE
from router.decide.policy import FIRST, Policy


@dataclass(frozen=True)
class Ask:
    """A question: a text, or the tokens of one, and how it is to be continued."""

    prompt: str | tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    mode: str = ROUTE  # "route" | "mixture" | "barycenter" | "phi", or the name of the one kernel that answers
    top_k: int = 3  # kernels that answer together, in the modes that mix
    request: str = ""  # id, unique among the requests that are under way
    draft: bool = True  # False: kernels that mix are asked for every token; the oracle of the drafts
    measure: bool = False  # complete HandOff.bits_lost: two more readings a hand-off
    telemetry: bool = False  # tell Answer.generation


@dataclass(frozen=True)
class Piece:
    """Some more of an answer; `text` may lag behind the tokens while a stop text or a character may be half there."""

    text: str
    token_ids: tuple[int, ...]
    kernel: str  # who wrote it; the heaviest of those that wrote it together
    logprobs: tuple[TokenScore, ...] | None = None  # one for each token; None when not asked for


@dataclass(frozen=True)
class HandOff:
    """The answer went from one kernel to another at byte `at_bytes` of prompt and answer."""

    at_bytes: int
    source: str
    target: str
    bits_lost: float | None = None  # bits of the next turn's tokens under `target` minus under `source`, if measured


@dataclass(frozen=True)
class Answer:
    """The answer to a request; `text` is that of all its pieces."""

    request: int | str
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
    certificate: str = ""  # of the looks, for certificate.replay; "" without looks by a fitted router
    generation: GenerationTelemetry | None = None  # where it was asked for

    def to_json(self) -> dict[str, Any]:
        told = asdict(self)
        if self.generation is None:
            del told["generation"]
        return told


@dataclass(frozen=True)
class Turn:
    """Wanted: the packet after one turn of `kernel` (turn.py)."""

    kernel: str
    packet: Packet
    budget_bytes: int
    draft: bool = False  # its tokens may not be the answer's


@dataclass(frozen=True)
class Bits:
    """Wanted: bits `kernel` needs for the last `count` tokens of the packet's window."""

    kernel: str
    packet: bytes
    count: int


@dataclass(frozen=True)
class ReadCall:
    """Wanted: `kernel`'s log-probabilities of the next token after each of the last `tail` of `window`, (tail, V)."""

    kernel: str
    window: tuple[int, ...]
    tail: int


Call = Turn | Bits | ReadCall
Steps = Generator[list[Call] | Piece, Sequence[Any], Answer]


def check(ask: Ask, policy: Policy | None, names: Sequence[str]) -> None:
    """ConfigError unless kernels called `names` can answer."""
    routed = ask.mode in MODES
    if not routed and ask.mode not in names:
        raise ConfigError(f"mode={ask.mode!r}: choose one of {', '.join((*MODES, *names))}")
    if routed and policy is None:
        raise ConfigError(f"mode={ask.mode!r} needs a fitted router; name one of {', '.join(names)} instead")
    if routed and policy is not None:
        judged(ask.mode, np.ones(len(policy.names)), integration_of(policy))
    absent = [name for name in (*policy.names, OCEAN) if name not in names] if routed and policy else []
    if absent:
        raise ConfigError(f"the router may choose {absent[0]!r}, which is not there; there is {tuple(names)}")
    if isinstance(ask.top_k, bool) or not isinstance(ask.top_k, int) or ask.top_k < 1:
        raise ConfigError(f"top_k={ask.top_k!r}: must be a whole number of kernels, at least 1")


class QueryLife:
    """One request from its first look to its answer. `policy` may be None when one kernel is named."""

    def __init__(self, number: int | str, ask: Ask, policy: Policy | None, tokenizer: Tokenizer, config: Config,
                 basins: Basins | None = None):  # fmt: skip
        check_terms(ask.sampling, basins)
        self.basins = basins
        self.number, self.ask, self.tokenizer, self.config = number, ask, tokenizer, config
        prompt, tokens = read_prompt(ask.prompt, tokenizer)
        self.prompt_tokens = len(tokens)
        self.view = View(policy) if policy and ask.mode in MODES else None
        self.panel: Weights = ((ask.mode, 1.0),)  # who answers next, and their weights, which sum to 1
        self.shown, self.written = ShownText(ask.sampling.stop), ""
        self.num_bytes = 0  # of prompt and answer
        self.fresh_bytes = 0  # since the last look
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.heard: list[int] = []  # tokens of the turn under way
        self.heard_scores: list[TokenScore] = []
        self.told = 0  # how many of them pieces hold already
        self.kernels: list[str] = []
        self.looks: list[Look] = []
        self.certificate = (
            CertificateWriter(policy, ask.mode, ask.top_k)
            if self.view and isinstance(policy, FisherRaoRouter)
            else None
        )
        self.draft_bytes = FIRST  # a draft's length, which follows how far the last ones were good
        self.hand_offs: list[HandOff] = []
        self.seconds = 0.0
        context = config.kernel.context
        self.question = tuple(opened(tokens, tokenizer)[-context:])
        # a window that is full would slide with the first token: it is cut to what it would be then, and read once
        full = len(self.question) == context
        self.opening = self.question[step_of(context) - 1 :] if full else self.question
        self.packet = Packet(ask.request or str(number), ask.mode, self.opening, ask.sampling)
        self._read(prompt)
        self._look()

    def live(self) -> Steps:
        """Yields calls, is sent their results; yields pieces, is sent nothing; returns the answer."""
        unmeasured: list[Call] = []
        while not self.packet.finish:
            begin = time.perf_counter()
            if len(self.panel) == 1:
                packet, *bits = yield [Turn(self.packet.kernel, self.packet, self._budget()), *unmeasured]
                self._measured(bits)
                unmeasured = self._unmeasured(packet)
            else:
                packet = yield from self._together()
            self.seconds += time.perf_counter() - begin
            yield self._absorb(packet)
            if self.fresh_bytes >= self.every and not self.packet.finish:
                self._look()
        if unmeasured:
            self._measured((yield unmeasured))
        return self._answer()

    def _together(self) -> Generator[list[Call], Sequence[Any], Packet]:
        """The packet after a stretch that all of the panel wrote: draft, read, draw."""
        joint = JointAnswer(self.packet, self.opening, self.token_ids, self.tokenizer, self.config.kernel.context,
                            self.basins)  # fmt: skip
        window, draft, budget = joint.window, tuple[int, ...](), min(self._budget(), self.draft_bytes)
        if self.ask.draft and joint.room and budget:
            (drafted,) = yield [Turn(self.packet.kernel, joint.drafting(), budget, draft=True)]
            draft = _new(self.packet, drafted)[: joint.room]
        rows = yield [ReadCall(name, (*window, *draft), len(draft) + 1) for name, _ in self.panel]
        drawn = joint.draw(combine(self.ask.mode, np.stack(rows), [w for _, w in self.panel]), draft)
        left = self._budget()
        for at, token in enumerate(drawn):
            joint.write(token)
            left -= len(self.tokenizer.token_bytes[token])
            if joint.finish or left <= 0 or at == len(draft) or token != draft[at]:
                break
        if draft:  # one that is wrong at once costs more than it saves: none until the next look, after a few of them
            kept = at >= len(draft) or token == draft[at]
            self.draft_bytes = min(self.every, 2 * budget) if kept else budget if at else budget // 2
        return joint.written()

    def _budget(self) -> int:
        """Bytes until the next look; the first turn is a short one, so that the first text comes soon."""
        return self.every - self.fresh_bytes if self.token_ids else min(FIRST, self.every)

    def _read(self, new: bytes) -> None:
        self.num_bytes += len(new)
        self.fresh_bytes += len(new)
        if self.view:
            self.view.update(new)

    def _look(self) -> None:
        """Decide who goes on."""
        self.draft_bytes = max(self.draft_bytes, FIRST // 2)
        self.fresh_bytes, every = 0, self.config.router.every
        self.every = min(FIRST, every) if self.num_bytes < every else every  # as training text is looked at
        if not self.view:
            return
        before = self.packet.kernel
        look = self.view.decide(self.num_bytes, self.config.router.hysteresis)
        self.panel = ((look.kernel, 1.0),)
        if self.certificate:
            self.certificate.add(self.view)
        if self.ask.mode in MIXED and not look.abstained:
            self.panel = weights(self.view.names, self.view.judged(self.ask.mode), self.ask.top_k)
            look = replace(look, kernel=max(self.panel, key=lambda one: one[1])[0])
        self.looks.append(replace(look, weights=self.panel))
        if self.kernels and look.kernel != before and self.ask.mode == ROUTE:
            self.hand_offs.append(HandOff(self.num_bytes, before, look.kernel))
        self.packet = replace(self.packet, kernel=look.kernel)

    def hear(self, position: int, tokens: tuple[int, ...], scores: tuple[TokenScore, ...] = ()) -> None:
        """Tokens of the turn under way, the first of which is number `position` of the answer.

        A turn that is taken again, by a kernel that replaces a lost one, is heard again, which changes nothing.
        """
        known = self.packet.position + len(self.heard) - position
        if known >= 0:  # else some before them were lost on the way: the turn's end has all
            self.heard += tokens[known:]
            self.heard_scores += scores[known:]

    def tell(self) -> Piece | None:
        """What was heard and is in no piece yet."""
        new, scores = tuple(self.heard[self.told :]), tuple(self.heard_scores[self.told :])
        if not new:
            return None
        self.told += len(new)
        return Piece(self._show(new), new, self.packet.kernel, None if self.ask.sampling.logprobs is None else scores)

    def _absorb(self, packet: Packet) -> Piece:
        """Take a turn's outcome; the text that may be shown now."""
        new, told = _new(self.packet, packet), self.told
        if new[: len(self.heard)] != tuple(self.heard):
            raise RunError(f"kernel {packet.kernel!r} took a turn again and wrote other tokens; ask again")
        self.kernels += [name for name, _ in self.panel if name not in self.kernels]
        self.packet, self.heard, self.heard_scores, self.told = packet, [], [], 0
        self.token_ids += new
        self._read(self.tokenizer.decode(new[:-1] if packet.ended_by_token else new))
        self.log_probs += [log_p for log_p, _ in packet.logprobs or ()]
        rest, scores = new[told:], packet.logprobs and packet.logprobs[told:]
        text = self._show(rest[:-1]) + self._show(rest[-1:], packet) if packet.finish else self._show(rest)
        return Piece(text, rest, packet.kernel, scores)

    def _show(self, new: tuple[int, ...], ended: Packet | None = None) -> str:
        """What may be shown after `new`; with `ended`, whose last token they are, all the rest up to a stop text."""
        written = self.tokenizer.decode(() if ended and ended.ended_by_token else new)
        text = self.shown.feed(written, last=ended is not None)
        self.written += text
        return text

    def _unmeasured(self, packet: Packet) -> list[Call]:
        """What has to be read to complete the last hand-off, if this was the turn after it."""
        if not self.ask.measure or not self.hand_offs or self.hand_offs[-1].at_bytes != self.num_bytes:
            return []
        last, count = self.hand_offs[-1], packet.position - self.packet.position
        data = packet.encode()
        return [Bits(last.target, data, count), Bits(last.source, data, count)]

    def _measured(self, bits: Sequence[float]) -> None:
        if bits:
            at = next(i for i, hand_off in enumerate(self.hand_offs) if hand_off.bits_lost is None)
            self.hand_offs[at] = replace(self.hand_offs[at], bits_lost=bits[0] - bits[1])

    def judged(self) -> Answer:
        """An answer of no tokens: those who were to write have judged what is written."""
        self.kernels = [name for name, _ in self.panel]
        return replace(self._answer(), finish_reason="stop")

    def _answer(self) -> Answer:
        return Answer(
            request=self.number,
            text=self.written,
            token_ids=tuple(self.token_ids),
            finish_reason=self.packet.finish,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.token_ids),
            mode=self.ask.mode,
            kernels=tuple(self.kernels),
            looks=tuple(self.looks),
            hand_offs=tuple(self.hand_offs),
            seconds=self.seconds,
            seconds_per_token=self.seconds / max(1, len(self.token_ids)),
            certificate=self.certificate.certificate(self.written, self.token_ids) if self.certificate else "",
            generation=generation_telemetry(self.opening, self.token_ids, self.basins, self.log_probs)
            if self.ask.telemetry
            else None,
        )


def read_prompt(prompt: str | Sequence[int], tokenizer: Tokenizer) -> tuple[bytes, list[int]]:
    """(bytes, tokens) of a prompt; ConfigError for a token that is none."""
    if isinstance(prompt, str):
        data = prompt.encode("utf-8", "surrogatepass")
        return data, tokenizer.encode(data)
    wrong = [t for t in prompt if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < tokenizer.vocab_size]
    if wrong:
        raise ConfigError(f"prompt: {wrong[0]!r} is no token; there are 0 to {tokenizer.vocab_size - 1}")
    return tokenizer.decode(prompt), list(prompt)


def opened(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """`tokens` after the end of another document, which is what the kernels have read before every first byte."""
    return list(tokens) if tokens and tokens[0] == tokenizer.eos else [tokenizer.eos, *tokens]


def numbered(ask: Ask, index: int) -> Ask:
    """The `index`-th of several answers to one question: the same seed, random numbers of its own."""
    request = f"{ask.request}/{index}" if ask.request and index else ask.request
    return replace(ask, sampling=replace(ask.sampling, index=index), request=request)


def _new(before: Packet, after: Packet) -> tuple[int, ...]:
    """The tokens that a turn added."""
    return after.tokens[len(after.tokens) - (after.position - before.position) :]
