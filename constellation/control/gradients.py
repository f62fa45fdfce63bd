"""GradientBalance: a weight that keeps one loss's gradient at a given share of another's.

    w <- clip(share |g_reference| / |g_term|, low, high)      norms are running means, at the tensor that both reach

Equal gradient norms are the fixed point of GradNorm (Chen et al. 2018, arXiv:1711.02257) with alpha = 0; at the last
shared tensor and for one pair it is the adaptive weight of Esser et al. 2021 (arXiv:2012.09841, section 3.3). Here for
the commitment cost of a codebook, whose gradient otherwise grows with the scale of the codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from constellation.errors import ConfigError

TINY = 1e-12


@dataclass
class GradientBalance:
    """`value` is the weight, in [low, high]."""

    value: float = 1.0
    share: float = 1.0  # of the reference's gradient norm
    memory: float = 0.9  # part of a running mean that is kept, [0, 1)
    low: float = 1e-3
    high: float = 1e3
    norms: tuple[float, float] | None = None  # running means of |g_reference|, |g_term|

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.value <= self.high or not self.share > 0 or not 0 <= self.memory < 1:
            raise ConfigError(
                f"GradientBalance: 0 < low={self.low} <= value={self.value} <= high={self.high}, share={self.share} "
                f"above 0 and memory={self.memory} in [0, 1) are wanted"
            )

    def update(self, reference: float, term: float) -> float:
        """The weight after these gradient norms of the unweighted losses; a term without gradient changes nothing."""
        if not (math.isfinite(reference) and math.isfinite(term)):
            raise ConfigError(f"GradientBalance: gradient norms {reference} and {term} must be finite")
        if term <= TINY or reference <= TINY:
            return self.value
        old = self.norms or (reference, term)
        self.norms = tuple(self.memory * a + (1 - self.memory) * b for a, b in zip(old, (reference, term)))  # type: ignore[assignment]
        assert self.norms is not None
        self.value = min(self.high, max(self.low, self.share * self.norms[0] / self.norms[1]))
        return self.value

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "norms": None if self.norms is None else list(self.norms)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]
        self.norms = None if state["norms"] is None else (state["norms"][0], state["norms"][1])
