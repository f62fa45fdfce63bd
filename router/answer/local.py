"""All kernels in this process, each with an engine that batches its callers: the laptop's version of `Kernels`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation import roster
from constellation.config import Decode
from constellation.coordizer.tokenizer import Tokenizer
from constellation.decoding.basins import read
from constellation.decoding.sample import TokenScore
from constellation.errors import ConfigError
from constellation.kernel.model import KernelLM
from constellation.train.checkpoint import load_model, steps_on_disk
from router.answer.concurrency import Post
from router.answer.packet import Packet
from router.answer.turn import Answerer, Ear


class LocalKernels:
    """Kernels by name (`Kernels` of kernels.py); each is loaded when it is asked for the first time.

    They decode in threads of their own (constellation/decoding/engine.py), beside the event loop.
    """

    def __init__(
        self,
        models: Mapping[str, KernelLM | Callable[[], KernelLM]],
        tokenizer: Tokenizer,
        decode: Decode | None = None,
        basins: Path | None = None,
    ):
        self._models, self._tokenizer, self._decode = dict(models), tokenizer, decode or Decode()
        self._basins = basins  # the run that has them, if one has
        self._answerers: dict[str, Answerer] = {}
        self._loading = threading.Lock()
        self._post: Post | None = None

    @classmethod
    def from_run(cls, run: Path, device: str = "cpu", decode: Decode | None = None) -> LocalKernels:
        """The kernels of a run folder that have a checkpoint."""
        trained = [name for name in (roster.OCEAN, *roster.names(roster.MOST)) if steps_on_disk(run / name)]

        def loader(name: str) -> Callable[[], KernelLM]:
            return lambda: load_model(run / name, device)

        return cls({name: loader(name) for name in trained}, Tokenizer.load(run / "tokenizer.json"), decode, run)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._models)

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(self._answerers)

    async def load(self) -> None:
        """All of them now, so that nobody's first token waits for it."""
        for name in self.names:
            await self._answerer(name)

    async def turn(self, kernel: str, packet: Packet, budget_bytes: int, ear: Ear | None = None) -> Packet:
        answerer, loop = await self._answerer(kernel), asyncio.get_running_loop()
        if self._post is None or self._post.loop is not loop:
            self._post = Post(loop)
        post, ended = self._post, loop.create_future()

        def end() -> None:
            if not ended.done():
                ended.set_result(None)

        def tell(*news: Any) -> None:
            post(lambda: None if ended.done() or ear is None else ear(*news))

        turn = answerer.begin(packet, budget_bytes, tell if ear else None)
        turn.add_done_callback(lambda done: post(end))
        try:
            await ended
        finally:
            turn.cancel()  # when it has ended: nothing
        return turn.result()

    async def bits(self, kernel: str, packet: bytes, count: int) -> float:
        return await asyncio.wrap_future((await self._answerer(kernel)).submit_bits(packet, count))

    async def log_probs(self, kernel: str, windows: Sequence[Sequence[int]], tail: int) -> NDArray[np.float32]:
        return await asyncio.wrap_future((await self._answerer(kernel)).submit_log_probs(windows, tail))

    async def score(
        self, kernel: str, windows: Sequence[Sequence[int]], top: int, tail: int | None = None
    ) -> list[list[TokenScore]]:
        return await asyncio.wrap_future((await self._answerer(kernel)).submit_score(windows, top, tail))

    async def stats(self) -> dict[str, dict[str, Any]]:
        return {name: self._answerers[name].stats() for name in self.loaded}

    def answerer(self, name: str) -> Answerer:
        """The kernel called `name`, loaded if it is not yet; from any thread. ConfigError if there is none."""
        with self._loading:
            if name not in self._answerers:
                if name not in self._models:
                    raise ConfigError(f"no kernel {name!r}; there is {', '.join(self.names)}")
                model, decode = self._models[name], self._decode
                model = model if isinstance(model, KernelLM) else model()
                words = self._tokenizer
                basins = read(self._basins, words.hash, model.config.context) if self._basins else None
                made = Answerer(model, words, slots=decode.slots, precision=decode.precision, basins=basins)
                self._answerers[name] = made
            return self._answerers[name]

    async def _answerer(self, name: str) -> Answerer:
        return self._answerers[name] if name in self._answerers else await asyncio.to_thread(self.answerer, name)
