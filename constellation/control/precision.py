"""Learned precisions: each sum of squares is a Gaussian's, whose log variance is learned inside bounds.

    L = sum_k (n_k / 2) s_k + SSE_k / (2 e^{s_k})        s_k = low + (high - low) sigmoid(r_k)

n_k residuals with the variance e^{s_k}; at its minimum e^{s_k} = SSE_k / n_k. The usual exp(-s) L + s (Kendall, Gal &
Cipolla 2018) lets s go to minus infinity as L goes to 0, and the weight e^{-s} with it; here the loss is at least
sum_k n_k low / 2 and the weight at most e^{-low}.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from constellation.errors import ConfigError

LOW, HIGH = -9.0, 3.0  # of the log variance: standard deviations from 0.011 to 4.5


class LearnedPrecisions(nn.Module):
    """A log variance for each name, begun in the middle unless `start` says e^s."""

    def __init__(self, names: tuple[str, ...], low: float = LOW, high: float = HIGH, start: float | None = None):
        super().__init__()
        if not low < high:
            raise ConfigError(f"LearnedPrecisions: low={low} must be below high={high}")
        self.low, self.high = low, high
        part = 0.5 if start is None else (torch.tensor(start).log().item() - low) / (high - low)
        if not 0 < part < 1:
            raise ConfigError(f"LearnedPrecisions: start={start} must lie between e^{low:g} and e^{high:g}")
        self.raw = nn.ParameterDict({name: nn.Parameter(torch.tensor(part).logit()) for name in names})

    def log_variance(self, name: str) -> Tensor:
        """s, a scalar in (low, high)."""
        return self.low + (self.high - self.low) * torch.sigmoid(self.raw[name])

    def weights(self) -> dict[str, float]:
        """1 / (2 e^s), what each sum of squares is multiplied with."""
        return {name: float(0.5 * torch.exp(-self.log_variance(name).detach())) for name in self.raw}

    def forward(self, squares: Mapping[str, Tensor], residuals: Mapping[str, float]) -> Tensor:
        """L in nats, from sums of squares (scalars, at least 0) and how many residuals each has."""
        parts = []
        for name in self.raw:
            s = self.log_variance(name)
            parts.append(0.5 * residuals[name] * s + 0.5 * squares[name] * torch.exp(-s))
        return torch.stack(parts).sum()
