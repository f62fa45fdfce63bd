"""Semantic Fisher metric: Fisher-Rao distances that relationships shorten, closed by shortest paths.

    w_ij = d_ij / (1 + warp r_ij)              d a distance, r_ij = r_ji in [0, 1] how related i and j are, warp >= 0
    D_ij = min over paths i = k_0, ..., k_m = j of sum_s w(k_s, k_s+1)

w alone breaks the triangle inequality: a related pair in between makes a way round shorter. D does not, and it is the
largest metric that is nowhere above w. warp = 0 gives d back. (Floyd 1962; metric closure.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import floyd_warshall

from constellation.errors import ConfigError


class SemanticFisherMetric:
    """The closed metric of n points.

    distance_NN (n, n) symmetric, 0 on the diagonal and above 0 elsewhere, radians; relation_NN (n, n) in [0, 1].
    """

    def __init__(self, distance_NN: NDArray[np.floating], relation_NN: NDArray[np.floating], warp: float = 1.0):
        if not warp >= 0 or not np.isfinite(warp):
            raise ConfigError(f"warp={warp}: must be a finite number of at least 0, such as 1")
        if distance_NN.shape != relation_NN.shape or distance_NN.ndim != 2 or len(set(distance_NN.shape)) != 1:
            raise ConfigError(f"distances {distance_NN.shape}, relations {relation_NN.shape}: both must be (n, n)")
        if ((relation_NN < 0) | (relation_NN > 1)).any() or not np.allclose(relation_NN, relation_NN.T):
            raise ConfigError("relations: must be symmetric, from 0 to 1")
        self.warped_NN = np.asarray(distance_NN, np.float64) / (1 + warp * np.asarray(relation_NN, np.float64))
        self.closed_NN: NDArray[np.float64] = np.asarray(floyd_warshall(self.warped_NN), np.float64)

    def __call__(self, i: int, j: int) -> float:
        """D_ij, radians."""
        return float(self.closed_NN[i, j])

    @property
    def shortened(self) -> float:
        """Part of the pairs whose warped distance was no metric's: a way round is shorter."""
        apart = ~np.eye(len(self.closed_NN), dtype=bool)
        return float((self.closed_NN[apart] < self.warped_NN[apart] * (1 - 1e-12)).mean()) if apart.any() else 0.0


def worst_triangle(distance_NN: NDArray[np.floating]) -> float:
    """max (d_ij - d_ik - d_kj): at most 0, but for rounding, exactly where the triangle inequality holds."""
    return max(
        float((distance_NN - (distance_NN[:, k, None] + distance_NN[None, k])).max()) for k in range(len(distance_NN))
    )
