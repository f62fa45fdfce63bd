"""Long texts of clients are worked on in a thread, so that they keep the event loop from nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from constellation.coordizer.tokenizer import Tokenizer

T = TypeVar("T")
SHORT = 1 << 14  # characters, or tokens, that take about a millisecond


async def beside(size: int, work: Callable[..., T], *arguments: Any) -> T:
    """`work(*arguments)`, in a thread when it is about more than `SHORT` things."""
    return work(*arguments) if size <= SHORT else await asyncio.to_thread(work, *arguments)


async def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text: the tokenizer works on a batch without Python's lock, on a single text with it."""
    if sum(map(len, texts)) <= SHORT:
        return [tokenizer.encode(text) for text in texts]
    return await asyncio.to_thread(tokenizer.encode_batch, texts)
