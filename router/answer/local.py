"""All kernels in this process: the laptop's version of the seam, and the oracle of the one made of actors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from constellation.config import Decode
from constellation.coordizer.tokenizer import Tokenizer
from constellation.errors import ConfigError
from constellation.kernel.model import KernelLM
from constellation.roster import OCEAN, ROLES
from constellation.train.checkpoint import load_model, steps_on_disk
from router.answer.turn import Answerer


class LocalKernels:
    """Kernels by name; one that has to be loaded is loaded when it is asked for the first time."""

    def __init__(
        self,
        models: Mapping[str, KernelLM | Callable[[], KernelLM]],
        tokenizer: Tokenizer,
        decode: Decode | None = None,
    ):
        self._models, self._tokenizer, self._decode = dict(models), tokenizer, decode or Decode()
        self._answerers: dict[str, Answerer] = {}

    @classmethod
    def from_run(cls, run: Path, device: str = "cpu", decode: Decode | None = None) -> LocalKernels:
        """The kernels of a run folder that have a checkpoint."""
        trained = [name for name in (OCEAN, *ROLES) if steps_on_disk(run / name)]

        def loader(name: str) -> Callable[[], KernelLM]:
            return lambda: load_model(run / name, device)

        return cls({name: loader(name) for name in trained}, Tokenizer.load(run / "tokenizer.json"), decode)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._models)

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(self._answerers)

    def turns(self, work: Mapping[str, Sequence[bytes]], budget_bytes: int) -> dict[str, list[bytes]]:
        return {name: self.answerer(name).turn(packets, budget_bytes) for name, packets in work.items()}

    def bits(self, kernel: str, packet: bytes, count: int) -> float:
        return self.answerer(kernel).bits(packet, count)

    def log_probs(self, kernel: str, windows: Sequence[Sequence[int]], tail: int) -> NDArray[np.float32]:
        return self.answerer(kernel).log_probs(windows, tail)

    def answerer(self, name: str) -> Answerer:
        if name not in self._answerers:
            if name not in self._models:
                raise ConfigError(f"no kernel {name!r}; there is {', '.join(self.names)}")
            model = self._models[name]
            model = model if isinstance(model, KernelLM) else model()
            self._answerers[name] = Answerer(
                model, self._tokenizer, slots=self._decode.slots, precision=self._decode.precision
            )
        return self._answerers[name]
