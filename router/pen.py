"""A packet that is being written token by token by kernels that answer together (life.py).

The window slides in steps: once it is longer than the context, its oldest quarter is dropped. So what a token is drawn
from follows from the tokens before it alone, whatever stretches they were written in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from constellation.coordizer.tokenizer import Tokenizer
from constellation.kernel.sample import Settings, sample
from router.packet import Packet


class Pen:
    """Writes tokens into a packet, by the rules of a turn (turn.py)."""

    def __init__(self, packet: Packet, tokenizer: Tokenizer, context: int):
        self.before, self.tokenizer, self.context = packet, tokenizer, context
        self.window = self._cut(packet.tokens)
        self.written: list[int] = []
        self.stops = [s.encode("utf-8", "surrogatepass") for s in packet.sampling.stop]
        self.longest = max(map(len, self.stops), default=1)
        self.tail, self.finish = packet.pending, packet.finish

    def write(self, token: int) -> None:
        self.written.append(token)
        text = self.tail + self.tokenizer.token_bytes[token]
        self.tail = text[len(text) - min(len(text), self.longest - 1) :]
        if token == self.tokenizer.eos:
            self.finish = "eos"
        elif any(stop in text for stop in self.stops):
            self.finish = "stop"
        elif self.before.position + len(self.written) >= self.before.sampling.max_new_tokens:
            self.finish = "length"

    def packet(self) -> Packet:
        return replace(
            self.before,
            tokens=(*self.window, *self.written),
            position=self.before.position + len(self.written),
            pending=self.tail,
            finish=self.finish,
        )

    def _cut(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tokens if len(tokens) <= self.context else tokens[-(self.context - self.context // 4) :]


def draw(log_p_TV: NDArray[np.float64], pen: Pen, draft: Sequence[int]) -> list[int]:
    """The token at each of T = len(draft) + 1 places, were those before it the draft's, by u(seed, position + t).

    Each row is drawn by itself, so what is drawn at a place does not depend on how many there are.
    """
    count, sampling = len(log_p_TV), pen.before.sampling
    logits_TV = torch.from_numpy(log_p_TV.astype(np.float32))
    settings = Settings([sampling] * count)
    seen_TV = None
    if settings.penalised:
        seen_TV = torch.zeros(logits_TV.shape, dtype=torch.bool)
        seen_TV[:, list(pen.window)] = True
        for t, token in enumerate(draft):
            seen_TV[t + 1 :, token] = True
    positions = range(pen.before.position, pen.before.position + count)
    found: list[int] = sample(logits_TV, settings, positions, seen_TV).tolist()
    return found
