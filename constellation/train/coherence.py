"""Coherence of a text: how much better a model that has not written it foresees it in its order than in others.

    gain = (mean over ORDERS shuffles of the text's units of bits(shuffled) - bits(text)) / bytes      bits per byte

Units are sentences and lines. A text whose order matters gains; one whose units were shuffled is as good as its own
shuffles and gains about 0; one that repeats itself is its own shuffle and gains exactly 0, as a text of one unit does.
So one number tells real text from both. Bits are those of one window of the model, the text's beginning.

Companions, which say what the gain cannot: `distinct`, the share of different n-grams, and `repetition`, the share of
4-grams that stand in the text before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import log

import numpy as np
import torch
from torch import Tensor

from constellation.coordizer.tokenizer import Tokenizer
from constellation.kernel.model import KernelLM

ORDERS, GRAM = 4, 4
_UNIT = re.compile(r"[^\n.!?;]*(?:[.!?;]+\s*|\n+|$)")


@dataclass(frozen=True)
class Coherence:
    """Of one text; bits per byte, shares in [0, 1]."""

    gain: float
    surprisal: float  # bits per byte of the text in its own order
    distinct: float  # different bigrams / bigrams
    repetition: float
    units: int

    def to_json(self) -> dict[str, float]:
        return asdict(self)


class CoherenceTracker:
    """Judges texts by a model that is held out: it has neither written nor been trained on them."""

    def __init__(self, model: KernelLM, tokenizer: Tokenizer, orders: int = ORDERS):
        self.model, self.tokenizer, self.orders = model.eval(), tokenizer, orders

    def judge(self, text: str, seed: int = 0) -> Coherence:
        """The coherence of `text`, of which one window of the model is read; the empty text has 0 everywhere."""
        parts = units(text)
        generator = np.random.default_rng(seed)
        orders = [generator.permutation(len(parts)) for _ in range(self.orders if len(set(parts)) > 1 else 0)]
        texts = [text, *("".join(parts[i] for i in order) for order in orders)]
        bits = self._bits([self.tokenizer.encode(one) for one in texts])
        size = max(1, len(text.encode("utf-8", "surrogatepass")))
        gain = (sum(bits[1:]) / len(orders) - bits[0]) / size if orders else 0.0
        ids = self.tokenizer.encode(text)
        return Coherence(gain, bits[0] / size, distinct(ids, 2), repetition(ids), len(parts))

    @torch.inference_mode()
    def _bits(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Bits of the first window of each of some texts of much the same length, behind the end of another text."""
        context, eos = self.model.config.context, self.tokenizer.eos
        rows = [[eos, *ids][: context + 1] for ids in texts]
        longest = max(map(len, rows))
        x_BT = torch.tensor([row + [eos] * (longest - len(row)) for row in rows])
        if longest < 2:
            return [0.0] * len(rows)
        logits: Tensor = self.model(x_BT[:, :-1]).float()
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x_BT[:, 1:].flatten(), reduction="none")
        table = nats.view(len(rows), -1).double()
        return [float(table[i, : len(row) - 1].sum()) / log(2) for i, row in enumerate(rows)]


def units(text: str) -> list[str]:
    """Sentences and lines with what ends them; joined they are the text."""
    return [part for part in _UNIT.findall(text) if part]


def distinct(ids: Sequence[int], n: int) -> float:
    """Different n-grams / n-grams (Li et al. 2016); 1 for fewer than n tokens.

    >>> distinct([1, 2, 3], 2), distinct([7] * 5, 2)
    (1.0, 0.25)
    """
    grams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(ids: Sequence[int], n: int = GRAM) -> float:
    """Share of the n-grams that stood in the text before; 0 for fewer than n tokens.

    >>> repetition([1, 2, 3, 4, 5]), repetition([7] * 11)
    (0.0, 0.875)
    """
    return 1 - distinct(ids, n)
