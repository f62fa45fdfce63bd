"""What a kernel's process tells Prometheus through its Ray node, as gauges of `run` and `kernel`.

    ray_constellation_train_*    of the newest step: step, steps (planned), tokens, loss_nats (nats per token),
                                 grad_norm, lr, wall_s (seconds of it), dev_bits_per_byte (of the newest evaluation),
                                 and what probes measured, such as phi, kappa_eff, basin_distance
    ray_constellation_engine_*   what its engine says while it serves (decoding/batch.py)

Ray's agent collects them every few seconds. They are told when the supervisor asks for news, once a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from constellation.telemetry.step import Step

OF_STEP = ("step", "steps", "tokens", "loss_nats", "grad_norm", "lr", "wall_s", "dev_bits_per_byte")


class KernelGauges:
    """Gauges of one process."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}

    def train(self, run: str, step: Step) -> None:
        for name in OF_STEP:
            self._set(f"train_{name}", getattr(step, name), run, step.role)
        for name, value in (step.measured or {}).items():
            self._set(f"train_{name}", value, run, step.role)

    def engine(self, run: str, kernel: str, says: Mapping[str, Any]) -> None:
        for name, value in says.items():
            self._set(f"engine_{name}", value, run, kernel)

    def _set(self, name: str, value: Any, run: str, kernel: str) -> None:
        if not isinstance(value, int | float):
            return
        whole = f"constellation_{name}"
        if whole not in self._gauges:
            self._gauges[whole] = Gauge(whole, f"{name} of a kernel", ("run", "kernel"))
        self._gauges[whole].set(float(value), {"run": run, "kernel": kernel})
