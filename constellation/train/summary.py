"""What summary.json says of a run: where its loss began, ended and was best, and whether it still fell."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def describe(losses: np.ndarray) -> dict[str, float | None]:
    """Of the losses of a run, nats per token; None where there are none."""
    losses = finite(losses)
    return {
        "first_loss_nats": float(losses[0]) if len(losses) else None,
        "last_loss_nats": float(losses[-1]) if len(losses) else None,
        "best_loss_nats": float(losses.min()) if len(losses) else None,
    }


def optimizer_stats(optimizer: Any) -> dict[str, float]:
    """What a gated optimizer says of itself: how often it took its dear step, and what that cost."""
    return {name: value for name, value in optimizer.get_stats().items() if math.isfinite(value)}


def converged(losses: np.ndarray) -> bool | None:
    """Whether the mean loss of the last tenth is within 1 % of that of the tenth before; None under 40 states."""
    losses = finite(losses)
    tenth = len(losses) // 10
    if tenth < 4:
        return None
    return bool(abs(losses[-tenth:].mean() - losses[-2 * tenth : -tenth].mean()) < 0.01 * losses[-tenth:].mean())


def finite(losses: np.ndarray) -> np.ndarray:
    """Without the steps that failed and were skipped."""
    return losses[np.isfinite(losses)]
