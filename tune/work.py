"""What an evaluation is told: its work, its metrics, and how it hears that it is to stop. No Ray here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from constellation.config import Config
from constellation.regime.protocol import Advice, Recoverable

LOOK_EVERY_S = 0.5  # how often a stop is looked for
METRICS = {
    "model": {
        "dev_bits_per_byte": "bits per byte of held-out text",
        "dev_loss_nats": "nats per token of held-out text; not comparable between vocabularies",
        "train_seconds": "seconds of training, evaluation included",
    },
    "constellation": {
        "routed_bits_per_byte": "bits per byte of held-out text, each part read by the kernel it is routed to",
        "ocean_bits_per_byte": "bits per byte of held-out text, read by OCEAN alone",
        "train_seconds": "seconds of training, evaluation included",
    },
}


@dataclass(frozen=True)
class Work:
    """Everything that an evaluation needs; small, plain, picklable."""

    evaluation: str
    kind: str  # model | constellation
    config: Config
    tokens: float
    folder: Path  # OUT/trials/<evaluation>
    shared: Path  # OUT/shared
    corpus: Path | None
    metric: str
    parent: Path | None = None  # folder of the evaluation whose weights it starts from
    stop: Path | None = None  # exists when everybody is to stop


class Stopped(Exception):
    """The evaluation was asked to stop, and has a checkpoint."""


class StopFile:
    """A regime and a recovery in one: pauses the run, with a checkpoint, when a file appears. Remembers nothing."""

    def __init__(self, path: Path | None):
        self._path, self._looked, self.seen = path, 0.0, False

    def judge(self, seen: Mapping[str, float]) -> Advice:
        if self._path is not None and time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            self.seen = self._path.exists()
        return Advice.PAUSE if self.seen else Advice.GO_ON

    def act(self, training: Recoverable, advice: Advice) -> None:
        training.pause()

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass
