"""An answer that several kernels write together, token by token (query.py), by the rules of a turn (turn.py).

Where the window begins follows from how many tokens there are, as in a turn, so what a token is drawn from does not
depend on the stretches that the tokens before it were written in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from constellation.coordizer.tokenizer import Tokenizer
from constellation.decoding.basins import Basins
from constellation.decoding.batch import slid
from constellation.decoding.sample import RowSettings, TokenScore, sample, scored
from router.answer.packet import Packet
from router.answer.turn import Ending, kept, step_of


class JointAnswer:
    """Writes on: `opening` is the window that the request came with, `written` all tokens of the answer so far."""

    def __init__(
        self, packet: Packet, opening: Sequence[int], written: Sequence[int], tokenizer: Tokenizer, context: int,
        basins: Basins | None = None,
    ):  # fmt: skip
        self.packet, self.tokenizer, self.context, self.basins = packet, tokenizer, context, basins
        self.tokens, self.answered = [*opening, *written], len(written)
        self.window = tuple(self.tokens[slid(len(self.tokens), context, step_of(context)) :])
        self.ending, self.finish = Ending(packet, tokenizer), packet.finish
        self.scored: list[TokenScore] = []

    @property
    def room(self) -> int:
        """Tokens until the window slides."""
        return self.context - len(self.window)

    def drafting(self) -> Packet:
        """The packet to draft behind: its window is ours, so what was kept of reading it serves again."""
        sampling = replace(self.packet.sampling, logprobs=None)
        return replace(self.packet, tokens=self._kept(), sampling=sampling, logprobs=None)

    def draw(self, log_p_TV: NDArray[np.float64], draft: Sequence[int]) -> list[int]:
        """The token at each of T = len(draft) + 1 places, were those before it the draft's.

        Row t is drawn by itself with the random number of its position, so it does not matter how many rows there are.
        """
        count, sampling = len(log_p_TV), self.packet.sampling
        logits_TV = torch.from_numpy(log_p_TV.astype(np.float32))
        settings = RowSettings([sampling] * count, ends=(self.tokenizer.eos,))
        seen_TV = _running(self.window, draft, logits_TV) > 0 if settings.penalised else None
        mine = self.tokens[len(self.tokens) - self.answered :]
        counts_TV = _running(mine, draft, logits_TV) if settings.counted else None
        terms_TV = None
        if self.basins and sampling.geometric:
            befores = [[*self.tokens, *draft[:t]] for t in range(count)]
            size = logits_TV.shape[1]
            terms_TV = torch.stack([self.basins.terms(before, sampling, size) for before in befores])
        places = range(self.answered, self.answered + count)
        drawn = sample(logits_TV, settings, places, seen_TV, counts_TV, terms_TV).tolist()
        if sampling.logprobs is not None:
            self.scored += scored(logits_TV, drawn, sampling.logprobs)
        return list(drawn)

    def write(self, token: int) -> None:
        self.tokens.append(token)
        self.answered += 1
        self.finish = self.ending.after(token, self.answered)

    def written(self) -> Packet:
        """The packet after all of it."""
        new = self.answered - self.packet.position
        return replace(
            self.packet,
            tokens=self._kept(),
            position=self.answered,
            pending=self.ending.tail,
            finish=self.finish,
            logprobs=None if self.packet.sampling.logprobs is None else tuple(self.scored[:new]),
        )

    def _kept(self) -> tuple[int, ...]:
        return kept(self.tokens, self.answered, self.packet, self.context)


def _running(before: Sequence[int], draft: Sequence[int], like_TV: torch.Tensor) -> torch.Tensor:
    """How often each token came before place t, (T, V): in `before` and in the draft's first t."""
    counts_TV = torch.zeros_like(like_TV)
    counts_TV[:] = torch.bincount(torch.tensor(list(before), dtype=torch.int64), minlength=like_TV.shape[1])
    for t, token in enumerate(draft):
        counts_TV[t + 1 :, token] += 1
    return counts_TV
