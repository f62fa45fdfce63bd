"""Signals derived from what a run left: its trace and its logged steps. Nothing here is a measurement of its own.

loss_nats, grad_norm, lr, tokens   as traced; the last state has no gradient
loss_smooth                        s_t = a s_(t-1) + (1 - a) loss_t, a = 0.9, s_0 = loss_0; a failed step leaves it
wall_s                             running sum of the steps' seconds, without what lay between sittings
dev_bits_per_byte, and each number that a probe or a term of the objective left, at the steps that have it
theta                              (T+1, P), where it was traced
theta_moved                        |theta_t - theta_0| / sqrt P, root mean square
update                             (T, P), theta_(t+1) - theta_t, at t + 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation.artifacts.signal import Signal

UNITS = {
    "loss_nats": "nats/token", "grad_norm": "1", "lr": "1", "tokens": "tokens", "dev_bits_per_byte": "bits/byte",
    "wall_s": "s",
}  # fmt: skip
SMOOTH = 0.9
_KNOWN = ("loss_nats", "grad_norm", "lr", "tokens")


def derive(trace: Mapping[str, NDArray[Any]], steps: Sequence[Mapping[str, Any]] = ()) -> dict[str, Signal]:
    """Every signal above that `trace` and the logged `steps` give."""
    at = np.asarray(trace["step"], np.int64)
    found = {name: Signal(np.asarray(trace[name]), at, UNITS[name]) for name in _KNOWN}
    loss = found["loss_nats"].values
    found["loss_smooth"] = Signal(_smooth(loss), at, UNITS["loss_nats"], meaning="exponential mean of loss_nats")
    found |= _logged(steps)
    if "theta" in trace:
        theta = np.asarray(trace["theta"], np.float64)
        found["theta"] = Signal(theta, at)
        found["theta_moved"] = Signal(np.sqrt(np.square(theta - theta[:1]).mean(1)), at, meaning="rms from the start")
        found["update"] = Signal(np.diff(theta, axis=0), at[1:])
    return found


def _logged(steps: Sequence[Mapping[str, Any]]) -> dict[str, Signal]:
    wall, series = 0.0, dict[str, list[tuple[int, float]]]()
    for step in steps:
        at = int(step["step"])
        wall += float(step.get("wall_s", 0.0))
        own = {"wall_s": wall, **(step.get("measured") or {})}
        if step.get("dev_bits_per_byte") is not None:
            own["dev_bits_per_byte"] = step["dev_bits_per_byte"]
        for name, value in own.items():
            series.setdefault(name, []).append((at, float(value)))
    return {
        name: Signal(np.array([v for _, v in rows]), np.array([s for s, _ in rows], np.int64), UNITS.get(name, "1"))
        for name, rows in series.items()
    }


def _smooth(loss: NDArray[Any]) -> NDArray[Any]:
    """The recurrence by scipy's filter; where a loss is not finite, the one before stands in."""
    from scipy.signal import lfilter

    if not np.isfinite(loss).any():
        return loss
    good = np.where(np.isfinite(loss), np.arange(len(loss)), -1)
    first = int(np.argmax(good >= 0))
    whole = loss[np.maximum(np.maximum.accumulate(good), first)]
    smooth, _ = lfilter([1 - SMOOTH], [1, -SMOOTH], whole, zi=[SMOOTH * whole[0]])
    return np.asarray(smooth)
