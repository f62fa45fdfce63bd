"""What a training run says is saved, once it is in the store; training goes on while the store takes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from constellation.errors import ConstellationError
from constellation.storage.mirror import Mirror

AHEAD = 2  # checkpoints that may wait to go up before training waits for them


class Reported(Protocol):
    """A step; `checkpoint` names the one that was written after it, if any."""

    @property
    def checkpoint(self) -> str | None: ...


S = TypeVar("S", bound=Reported)


def uploaded(steps: Iterator[S], mirror: Mirror, part: str) -> Generator[S, None, None]:
    """`steps` in their order, each with a checkpoint when that is up, and those after it later still.

    A thread sends the snapshots of `part` one after another. RunError when the store stays away too long; the local
    folder has everything then. When `steps` fail, what they left (the reason) goes up before the error is raised.
    """
    waiting = deque[tuple[Future[None] | None, S]]()
    thread = ThreadPoolExecutor(1, thread_name_prefix=f"upload-{part}")
    try:
        while (step := _next(steps, mirror, part, waiting)) is not None:
            sending = thread.submit(mirror.push, part, mirror.snapshot(part)) if step.checkpoint else None
            waiting.append((sending, step))
            while waiting and (_is_up(waiting[0][0]) or sum(not _is_up(up) for up, _ in waiting) > AHEAD):
                yield _take(waiting)
        while waiting:
            yield _take(waiting)
    except GeneratorExit:
        _drain(waiting)
        raise
    finally:
        getattr(steps, "close", lambda: None)()
        thread.shutdown(cancel_futures=True)


def _next(steps: Iterator[S], mirror: Mirror, part: str, waiting: deque[tuple[Future[None] | None, S]]) -> S | None:
    try:
        return next(steps, None)
    except ConstellationError:
        _drain(waiting)
        mirror.push(part)
        raise


def _is_up(sending: Future[None] | None) -> bool:
    return sending is None or sending.done()


def _take(waiting: deque[tuple[Future[None] | None, S]]) -> S:
    sending, step = waiting.popleft()
    if sending is not None:
        sending.result()
    return step


def _drain(waiting: deque[tuple[Future[None] | None, S]]) -> None:
    while waiting:
        _take(waiting)
