"""Running text for scores that look beyond a pair's count, in whatever tokens there are so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from constellation.coordizer.merging import Merger
from constellation.coordizer.tokenizer import Tokenizer

TRAIN_BYTES, HELD_BYTES = 1_000_000, 250_000


@dataclass(frozen=True)
class Sample:
    """Texts to learn from, and others to judge by."""

    train: list[str]
    held: list[str]

    @classmethod
    def of(cls, texts: Sequence[str], train_bytes: int = TRAIN_BYTES, held_bytes: int = HELD_BYTES) -> Sample:
        """Every eighth text is held out; of both parts the first texts of a fixed shuffle, up to so many bytes."""
        order = np.random.default_rng(0).permutation(len(texts)).tolist()
        held = [texts[i] for i in order if i % 8 == 7] or [texts[i] for i in order]
        train = [texts[i] for i in order if i % 8 != 7]
        return cls(_up_to(train, train_bytes), _up_to(held, held_bytes))


def tokenised(texts: Sequence[str], merger: Merger) -> list[NDArray[np.int64]]:
    """`texts` in the merger's tokens, each an array of its numbers."""
    tokenizer = Tokenizer(merger.named_merges())
    number = {spelling: i for i, spelling in enumerate(merger.spelling) if spelling}
    own = np.array([number.get(spelling, 0) for spelling in tokenizer.token_bytes], np.int64)
    return [own[np.array(ids, np.int64)] for ids in tokenizer.encode_batch(texts)]


def _up_to(texts: Sequence[str], limit: int) -> list[str]:
    """The first texts, the last of them cut so that all have at most `limit` characters."""
    out, left = [], limit
    for text in texts:
        if left <= 0:
            break
        out.append(text[:left])
        left -= len(text)
    return out
