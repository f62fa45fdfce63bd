"""Where tokens lie on the simplex, and what of it a draw may be told: log-linear terms, off unless a request asks.

p_i (N,) are a token's coordinates (coordizer/coordinates.py), its basin k_i the largest of them, c the mean p of the
last RECENT tokens that have text, and j the last one. A request adds to the logit of token i, before the temperature:

    + basin_weight ln sum_n sqrt(p_in c_n)         affinity to where the text has been; at most 0
    - distance_weight d_FR(p_i, p_j)               radians, [0, pi]
    + transition_weight ln T[k_j, k_i]             how often basins follow each other in the training text, one added

What a term reads are the last tokens before the place, so a packet that moves on carries all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from constellation.decoding.sampling import Sampling
from constellation.errors import ArtifactError, ConfigError
from constellation.geometry import simplex
from constellation.storage import array_file

KIND = "basins"  # of the file in a run's folder
RECENT = 32  # tokens; of a kernel that sees fewer than twice as many, half of what it sees
WAY_OUT = "this run has no coordinates of its tokens; train one with --tokenizer FOLDER (constellation coordizer train)"


class Basins:
    """Coordinates of a run's tokens, and how its basins follow each other.

    p_VN    (V, N) rows on the simplex       log_transition_NN   (N, N) ln T, rows sum to 1 in T
    """

    def __init__(self, p_VN: NDArray[np.floating], log_transition_NN: NDArray[np.floating], context: int = 2 * RECENT):
        self.p_VN = torch.from_numpy(np.asarray(p_VN, np.float32).copy())
        self.root_VN = self.p_VN.sqrt()
        self.basin_V = self.p_VN.argmax(-1)
        self.log_transition_NN = torch.from_numpy(np.asarray(log_transition_NN, np.float32).copy())
        self.recent = max(1, min(RECENT, context // 2))

    def terms(self, before: Sequence[int], sampling: Sampling, size: int) -> Tensor:
        """What is added to the logits (size,) behind the tokens `before`, nats; 0 for ids without coordinates."""
        out = torch.zeros(size)
        known = [t for t in before[-self.recent :] if 0 < t < len(self.p_VN)]
        if not known:
            return out
        last, own = known[-1], out[: len(self.p_VN)]
        if sampling.basin_weight:
            own += sampling.basin_weight * torch.log(self.affinity(self.p_VN[known].mean(0)).clamp_min(1e-6))
        if sampling.distance_weight:
            own -= sampling.distance_weight * simplex.distance(self.p_VN, self.p_VN[last])
        if sampling.transition_weight:
            own += sampling.transition_weight * self.log_transition_NN[self.basin_V[last], self.basin_V]
        return out

    def affinity(self, c_N: Tensor) -> Tensor:
        """sum_n sqrt(p_in c_n) of every token, (V,), in [0, 1]."""
        return (self.root_VN @ c_N.sqrt()).clamp(max=1)


def transitions(basin_V: NDArray[np.integer], tokens_T: NDArray[np.integer], basins: int) -> NDArray[np.float64]:
    """ln T (N, N) of a text: T[k, l] = (1 + how often l follows k) / sum over l."""
    seen = basin_V[tokens_T].astype(np.int64)
    counts = np.bincount(seen[:-1] * basins + seen[1:], minlength=basins**2).reshape(basins, basins) + 1.0
    found: NDArray[np.float64] = np.log(counts / counts.sum(1, keepdims=True))
    return found


def write(run: Path, p_VN: NDArray[np.floating], log_transition_NN: NDArray[np.floating], tokenizer: str) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "p": np.asarray(p_VN, np.float32), "log_transition": np.asarray(log_transition_NN, np.float32),
    }  # fmt: skip
    array_file.write(run, KIND, {"tokenizer": tokenizer}, arrays)


def read(run: Path, tokenizer: str, context: int) -> Basins | None:
    """Those of a run, None where it has none; ArtifactError for those of another tokenizer."""
    if not (run / f"{KIND}.json").exists():
        return None
    header, arrays = array_file.read(run, KIND)
    if header.get("tokenizer") != tokenizer:
        raise ArtifactError(f"{run / KIND}.json: of another tokenizer than the run's; delete it")
    return Basins(arrays["p"], arrays["log_transition"], context)


def check(sampling: Sampling, basins: Basins | None) -> None:
    """ConfigError where a request asks for terms that there is nothing to compute from."""
    for name in ("basin_weight", "distance_weight", "transition_weight"):
        if getattr(sampling, name) and basins is None:
            raise ConfigError(f"{name}={getattr(sampling, name)}: {WAY_OUT}")
