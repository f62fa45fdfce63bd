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
ROUTED = "bits per byte of held-out text, each part read by the kernel it is routed to"
MIXED = "bits per byte of held-out text, read by the router.top_k likeliest kernels together"
METRICS = {
    "model": {
        "dev_bits_per_byte": "bits per byte of held-out text",
        "dev_loss_nats": "nats per token of held-out text; not comparable between vocabularies",
        "train_seconds": "seconds of training, evaluation included",
    },
    "router": {"routed_bits_per_byte": ROUTED, "mixture_bits_per_byte": MIXED},
    "constellation": {
        "routed_bits_per_byte": ROUTED,
        "mixture_bits_per_byte": MIXED,
        "ocean_bits_per_byte": "bits per byte of held-out text, read by OCEAN alone",
        "train_seconds": "seconds of training, evaluation included; what trials share aside",
    },
}


@dataclass(frozen=True)
class Work:
    """Everything that an evaluation needs; small, plain, picklable."""

    evaluation: str
    kind: str  # model | router | constellation
    config: Config
    default: Config  # the sweep's own settings, with this evaluation's seed
    tokens: float
    folder: Path  # OUT/trials/<evaluation>
    shared: Path  # OUT/shared
    corpus: Path | None
    metric: str
    parent: Path | None = None  # folder of the evaluation whose weights it starts from
    stop: Path | None = None  # exists when everybody is to stop
    first: bool = True  # of those that share what `default` makes: it is charged with that


class Stopped(Exception):
    """The evaluation was asked to stop, and has a checkpoint."""


class StopFile:
    """A regime and a recovery in one: pauses the run, with a checkpoint, when a file appears. Remembers nothing."""

    def __init__(self, path: Path | None):
        self._path, self._looked, self.seen = path, 0.0, False

    def asked(self) -> bool:
        """Whether the file is there, as of LOOK_EVERY_S ago."""
        if self._path is not None and time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            self.seen = self._path.exists()
        return self.seen

    def judge(self, seen: Mapping[str, float]) -> Advice:
        return Advice.PAUSE if self.asked() else Advice.GO_ON

    def act(self, training: Recoverable, advice: Advice) -> None:
        training.pause()

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass
