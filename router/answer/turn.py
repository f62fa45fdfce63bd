"""One turn of one kernel: a packet in, the same packet some bytes of text further out.

A turn has no memory that changes its outcome. The kernel decodes the token window of each packet until the packet has
`budget_bytes` new bytes, a stop, the end of the text or its last token. So a turn may be repeated, a packet may be
answered by any process that holds the same weights, and a request that goes to another kernel and comes back
continues as if it had never left. What the kernel still holds of a window from an earlier turn it does not read anew,
which gives the same numbers sooner (decoding/batch.py).

Who wants a turn's tokens while it is under way gives it an ear, which is told of `SOON_TOKENS` of them at a time, or of
fewer so that none waits longer than `SOON_S` when the next one comes as late as the last.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from constellation.coordizer.tokenizer import Tokenizer
from constellation.decoding.basins import Basins
from constellation.decoding.batch import Batch, Prefill, Writing
from constellation.decoding.engine import Engine
from constellation.decoding.sample import TokenScore, scored
from constellation.errors import ArtifactError, ConfigError
from constellation.kernel.model import KernelLM
from router.answer.packet import Packet

T = TypeVar("T")
NATS = 0.6931471805599453  # of a bit
SOON_TOKENS, SOON_S = 8, 0.04  # a reader is told of a token before so many more have come, and so soon

Ear = Callable[
    [int, tuple[int, ...], tuple[TokenScore, ...]], None
]  # (number of the first token, tokens, their scores)


class Answerer:
    """A kernel that takes turns, scores texts, and does all of it for many at once."""

    def __init__(
        self,
        model: KernelLM,
        tokenizer: Tokenizer,
        *,
        slots: int = 32,
        precision: str = "fp32",
        basins: Basins | None = None,
    ):
        vocabulary = model.config.vocab_size
        if tokenizer.vocab_size > vocabulary:
            raise ArtifactError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the kernel's vocabulary {vocabulary}: not of one run"
            )
        self.tokenizer, self.context, self.vocabulary = tokenizer, model.config.context, vocabulary
        silent = [t for t in range(vocabulary) if not tokenizer.token_bytes[t : t + 1] or not tokenizer.token_bytes[t]]
        silent.remove(tokenizer.eos)
        bias_V = torch.zeros(vocabulary, device=model.embedding.weight.device)
        bias_V[silent] = float("-inf")  # reserved tokens and ids without a token: no text holds them
        batch = Batch(model, slots=slots, precision=precision, bias_V=bias_V, ends=(tokenizer.eos,), basins=basins)
        self.engine = Engine(batch)

    def begin(self, packet: Packet, budget_bytes: int, ear: Ear | None = None) -> Future[Packet]:
        """The packet after one turn, taken together with whatever else is under way. From any thread.

        The future fails with what is wrong with this packet alone; cancelling it frees the slot. The engine's thread
        tells `ear`.
        """
        row = TurnRow(packet, self.context, self.tokenizer, budget_bytes, ear)
        return self.engine.submit([] if packet.finish else [row.work], row.result)

    def submit(self, packet: bytes, budget_bytes: int, ear: Ear | None = None) -> Future[bytes]:
        """The same for a packet that travels; one that is finished comes back as it is."""
        row = TurnRow(Packet.decode(packet), self.context, self.tokenizer, budget_bytes, ear)
        return self.engine.submit([] if row.packet.finish else [row.work], lambda: row.result().encode())

    def submit_score(
        self, windows: Sequence[Sequence[int]], top: int, tail: int | None = None
    ) -> Future[list[list[TokenScore]]]:
        """For each window the log-probability of its last `tail` tokens (None: of all but the first), given those
        before them, and the `top` likeliest tokens in their places; both of one tensor."""
        return self._scores(windows, top, tail, lambda found: found)

    def submit_log_probs(self, windows: Sequence[Sequence[int]], tail: int) -> Future[NDArray[np.float32]]:
        """Log-probability of the next token after each of the last `tail` tokens of each window, (B, tail, V).

        Windows are cut to their last `context` tokens; one shorter than `tail` has -inf before its first token.
        """
        found = np.full((len(windows), tail, self.vocabulary), -np.inf, np.float32)
        cut = [list(window)[-self.context :] for window in windows]

        def emit(at: int, first: int, log_p_MV: Tensor) -> None:
            begin = tail - len(cut[at]) + first
            found[at, begin : begin + len(log_p_MV)] = log_p_MV.cpu().numpy()

        return self._read(cut, tail, emit, lambda: found)

    def submit_bits(self, packet: bytes, count: int) -> Future[float]:
        """Bits this kernel needs for the last `count` tokens of the packet's window, given those before them."""
        tokens = Packet.decode(packet).tokens[-self.context :]
        count = min(count, len(tokens) - 1)
        return self._scores([tokens], 0, count, lambda found: -sum(log_p for log_p, _ in found[0]) / NATS)

    def stats(self) -> dict[str, Any]:
        """Slots and how many of them work, hold or wait; tokens so far (decoding/batch.py)."""
        return self.engine.stats()

    def _scores(
        self, windows: Sequence[Sequence[int]], top: int, tail: int | None, make: Callable[[list[list[TokenScore]]], T]
    ) -> Future[T]:
        found: list[list[TokenScore]] = [[] for _ in windows]
        for window in windows:
            wanted = max(1, len(window) - 1) if tail is None else tail
            if not 1 <= wanted < len(window):
                raise ConfigError(f"a window of {len(window)} tokens: its last {wanted} cannot be scored")

        def emit(at: int, first: int, log_p_MV: Tensor) -> None:
            named = list(windows[at])[first + 1 : first + 1 + len(log_p_MV)]
            found[at] += scored(log_p_MV[: len(named)], named, top)

        return self._read([list(window)[:-1] for window in windows], tail, emit, lambda: make(found))

    def _read(self, windows: Sequence[list[int]], tail: int | None, emit: Any, make: Callable[[], T]) -> Future[T]:
        """What `make` makes after `emit(window, position, log-probabilities (M, V))` for the last `tail` positions."""

        def reading(at: int, window: list[int]) -> Prefill:
            first = max(0, len(window) - tail) if tail else 0
            return Prefill(
                tokens=window,
                first=first,
                emit=lambda position, logits_MV: emit(at, position, torch.log_softmax(logits_MV, -1)),
            )

        return self.engine.submit([reading(at, window) for at, window in enumerate(windows)], make)


class Ending:
    """Whether an answer is whole: the rules that a packet's sampling sets, token after token."""

    def __init__(self, packet: Packet, tokenizer: Tokenizer):
        self.sampling, self.tokenizer = packet.sampling, tokenizer
        self.stops = [s.encode("utf-8", "surrogatepass") for s in packet.sampling.stop]
        self.longest = max(map(len, self.stops), default=1)
        self.tail = packet.pending  # end of the answer's bytes in which a stop text may have begun

    def after(self, token: int, taken: int) -> str:
        """Why the answer ends with `token`, the `taken`-th one; "" when it goes on."""
        sampling, text = self.sampling, self.tail + self.tokenizer.token_bytes[token]
        self.tail = text[len(text) - min(len(text), self.longest - 1) :]
        if token == self.tokenizer.eos and not sampling.ignore_eos:
            return "eos"
        if token in sampling.stop_token_ids:
            return "stop"
        if taken >= sampling.min_tokens and any(stop in text for stop in self.stops):
            return "stop"
        return "length" if taken >= sampling.max_new_tokens else ""


def step_of(context: int) -> int:
    """Tokens by which a window slides, when it has to: a quarter of the context."""
    return max(1, context // 4)


def kept(tokens: Sequence[int], position: int, before: Packet, context: int) -> tuple[int, ...]:
    """What of `tokens`, which begin with those of the packet `before`, the packet at `position` holds.

    The window, what is new, and all of the answer if a penalty counts it. They begin a whole number of steps later, so
    the window of the next turn begins where it would have without a turn's end.
    """
    needed, step = (
        max(context, position - before.position, position if before.sampling.counted else 0),
        step_of(context),
    )
    return tuple(tokens[max(0, len(tokens) - needed) // step * step :])


class TurnRow:
    """One packet during a turn."""

    def __init__(self, packet: Packet, context: int, tokenizer: Tokenizer, budget_bytes: int, ear: Ear | None = None):
        self.packet, self.context, self.tokenizer, self.budget_bytes = packet, context, tokenizer, budget_bytes
        self.ear, self.told = ear, packet.position  # tokens of the answer that the ear knows
        self.came_s = self.waits_s = time.monotonic()  # when the last token came, and the first that waits to be told
        self.work = Writing(
            tokens=list(packet.tokens),
            sampling=packet.sampling,
            taken=packet.position,
            room=step_of(context),
            take=self.take,
        )
        self.ending, self.spent, self.finish = Ending(packet, tokenizer), 0, packet.finish

    def take(self, token: int) -> bool:
        """Whether the turn of this packet ends with `token`."""
        # an end of text that is ignored has no bytes, and a turn has an end
        self.spent += max(1, len(self.tokenizer.token_bytes[token]))
        self.finish = self.ending.after(token, self.work.taken)
        if self.finish or self.spent >= self.budget_bytes:
            return True
        if self.ear:
            self._tell(self.ear)
        return False

    def _tell(self, ear: Ear) -> None:
        """Tell of what waits, unless it can wait for the next token."""
        work, now_s = self.work, time.monotonic()
        new = work.taken - self.told
        if new == 1:
            self.waits_s = now_s
        if new >= SOON_TOKENS or now_s - self.waits_s + now_s - self.came_s >= SOON_S:
            ear(self.told, tuple(work.tokens[-new:]), tuple(work.scored[-new:]))
            self.told = work.taken
        self.came_s = now_s

    def result(self) -> Packet:
        if self.packet.finish:
            return self.packet
        return dataclasses.replace(
            self.packet,
            tokens=kept(self.work.tokens, self.work.taken, self.packet, self.context),
            position=self.work.taken,
            pending=self.ending.tail,
            finish=self.finish,
            logprobs=None if self.packet.sampling.logprobs is None else tuple(self.work.scored),
        )
