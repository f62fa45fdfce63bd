"""Texts of clients to tokens, without keeping the event loop from anybody."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from constellation.coordizer.tokenizer import Tokenizer

SHORT = 1 << 14  # characters that take about a millisecond: more of them are tokenised in a thread


async def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text. The tokenizer works on a batch without holding Python's lock."""
    if sum(map(len, texts)) <= SHORT:
        return [tokenizer.encode(text) for text in texts]
    return await asyncio.to_thread(tokenizer.encode_batch, texts)
