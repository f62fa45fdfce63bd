"""Asking a service, in tests."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

from router.answer.concurrency import together
from router.answer.query import Answer, Ask, Piece
from router.answer.service import Service


def untimed(answer: Answer, **changes: Any) -> Answer:
    """What of an answer is the same each time."""
    return dataclasses.replace(answer, **{"request": 0, "seconds": 0.0, "seconds_per_token": 0.0, **changes})


async def whole(service: Service, ask: Ask) -> tuple[list[Piece], Answer]:
    """The pieces of a stream, and its answer."""
    *pieces, answer = [step async for step in service.stream(ask)]
    assert isinstance(answer, Answer) and all(isinstance(piece, Piece) for piece in pieces)
    return pieces, answer  # type: ignore[return-value]


def streams(service: Service, asks: Sequence[Ask]) -> list[tuple[list[Piece], Answer]]:
    """`whole` of all of them at once."""

    async def go() -> list[tuple[list[Piece], Answer]]:
        return await together([whole(service, ask) for ask in asks])

    return asyncio.run(go())


def answers(service: Service, asks: Sequence[Ask]) -> list[Answer]:
    """The answers, untimed, of asking all at once."""

    async def go() -> list[Answer]:
        return await together([service.answer(ask) for ask in asks])

    return [untimed(answer) for answer in asyncio.run(go())]
