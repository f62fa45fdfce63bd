"""LossFreeBalance: a bias on each choice, in the selection alone, that evens out how often each is chosen.

    choice = argmax_k (score_k + b_k)        b_k <- b_k + u sign(mean load - load_k)

No gradient goes through b and no loss is added, so that the scores keep their meaning (Wang et al. 2024,
arXiv:2408.15664). A relay (bang-bang) controller: it ends in a limit cycle of amplitude u, which `decay` lets shrink
as u_t = u / (1 + decay t).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from constellation.errors import ConfigError


class LossFreeBalance:
    """`bias` (K,), mean 0; `target` (K,) are the wanted shares, equal ones by default."""

    def __init__(self, choices: int, rate: float = 1e-3, decay: float = 0.0, target: ArrayLike | None = None):
        if choices < 1 or not rate > 0 or not decay >= 0:
            raise ConfigError(f"LossFreeBalance: choices={choices}, rate={rate} above 0 and decay={decay} from 0 on")
        self.bias: NDArray[np.float64] = np.zeros(choices)
        self.rate, self.decay, self.updates = rate, decay, 0
        even = np.full(choices, 1 / choices)
        self.target = even if target is None else np.asarray(target, np.float64) / np.sum(target)

    def update(self, loads: ArrayLike) -> NDArray[np.float64]:
        """The bias after choices that were taken `loads` (K,) times; nothing changes where none was."""
        load_K = np.asarray(loads, np.float64)
        total = load_K.sum()
        if total > 0:
            step = self.rate / (1 + self.decay * self.updates)
            moved = self.bias + step * np.sign(self.target - load_K / total)
            self.bias, self.updates = moved - moved.mean(), self.updates + 1
        return self.bias

    def state(self) -> dict[str, Any]:
        return {"bias": self.bias.tolist(), "updates": self.updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.bias, self.updates = np.array(state["bias"]), state["updates"]
