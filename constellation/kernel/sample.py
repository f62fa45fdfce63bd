"""Sampling: from logits to tokens, for a batch of requests with different settings each.

One request's token is a function of its logits, its settings and one uniform number u(seed, position)
from a counter-based hash. So the sampler's whole state is (seed, position), a request can move to
another process between two tokens, and neighbours in the batch change nothing.

The filters, in this order, B requests, V tokens, p_(1) >= p_(2) >= ... sorted:

    repetition penalty   x_i -> x_i / r if x_i > 0 else x_i r, for tokens i of the window
    temperature          p = softmax(x / T); T = 0 takes argmax x, the first one of several, and ends here
    top-k                the k likeliest tokens, renormalised
    top-p                the fewest likeliest ones that hold p of that mass (Holtzman et al. 2020)
    min-p                those with p_i >= m p_(1) (Nguyen et al. 2024)

The last three each keep a prefix of the sorted tokens, so their intersection is the shortest one and
256 sorted tokens nearly always suffice; a row whose prefix is longer is sorted whole. The draw inverts
the cumulative distribution, in sorted order with a filter, in the order of ids without one.
The penalty is that of Keskar et al. (2019), with the sign handled as implementations do since: dividing
a negative logit would make the repetition likelier.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from constellation.errors import ConfigError

PREFILTER = 256  # likeliest tokens looked at before a whole row is sorted
_LARGEST_SEED = 2**64 - 1
_COLDEST = torch.finfo(torch.float32).tiny  # a temperature that rounds to zero would give 0 / 0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What one request asks of the sampler."""

    temperature: float = 1.0  # T, >= 0; 0 is greedy
    top_k: int = 0  # tokens, 0: all
    top_p: float = 1.0  # mass, (0, 1]
    min_p: float = 0.0  # part of the likeliest token's probability, [0, 1]
    repetition_penalty: float = 1.0  # r, > 0; 1: none
    seed: int = 0  # 0..2^64-1
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    max_new_tokens: int = 128  # >= 1

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, lambda x: x >= 0, "at least 0; 0 is greedy")
        _check_whole("top_k", self.top_k, 0, None)
        _check_number("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1; 1 keeps every token")
        _check_number("min_p", self.min_p, lambda x: 0 <= x <= 1, "from 0 to 1; 0 keeps every token")
        _check_number("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "above 0; 1 is none")
        _check_whole("seed", self.seed, 0, _LARGEST_SEED)
        _check_whole("max_new_tokens", self.max_new_tokens, 1, None)
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise ConfigError(f"stop={self.stop!r}: must be texts of at least one character each")

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "stop": list(self.stop)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sampling:
        known = [f.name for f in dataclasses.fields(cls)]
        for name in data:
            if name not in known:
                raise ConfigError(f"unknown sampling parameter {name!r}; known: {', '.join(known)}")
        values = dict(data)
        if isinstance(values.get("stop"), list):
            values["stop"] = tuple(values["stop"])
        return cls(**values)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def _check_number(name: str, value: Any, in_range: Callable[[float], bool], wanted: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not in_range(value):
        raise ConfigError(f"{name}={value!r}: must be a number {wanted}")


def _check_whole(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name}={value!r}: must be a whole number {bound}")


class Settings:
    """The settings of a batch as tensors, made once for as long as the batch stays together."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device | str = "cpu"):
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

        def where(chosen: list[bool]) -> Tensor:
            return torch.tensor([i for i, c in enumerate(chosen) if c], dtype=torch.int64, device=device)

        self.temperature_B1 = column([s.temperature or 1.0 for s in samplings]).float().clamp(min=_COLDEST)
        self.top_k_B1 = column([float(s.top_k or math.inf) for s in samplings])
        self.top_p_B1 = column([s.top_p if s.top_p < 1 else math.inf for s in samplings])
        self.min_p_B1 = column([s.min_p for s in samplings])
        self.penalty_B1 = column([s.repetition_penalty for s in samplings]).float()
        self.penalised = any(s.repetition_penalty != 1 for s in samplings)
        self.seeds = np.array([s.seed for s in samplings], dtype=np.uint64)
        self.plain = where([not s.greedy and not s.filtered for s in samplings])
        self.filtered = where([not s.greedy and s.filtered for s in samplings])


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) per (seed, position): splitmix64 (Steele et al. 2014) of the seed's own stream.

    52 bits, so that u x total stays below total in float64 and a draw never falls off the end.
    """
    stream = _mix(seeds + np.uint64(0x9E3779B97F4A7C15))
    bits = _mix(stream + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@torch.inference_mode()
def sample(logits_BV: Tensor, settings: Settings, positions: Sequence[int], seen_BV: Tensor | None = None) -> Tensor:
    """The next token of every request, (B,) int64.

    `positions[b]` counts the tokens request b was given before; `seen_BV` (bool) marks the tokens of
    its window and is needed only when a row has a repetition penalty.
    """
    if settings.penalised:
        assert seen_BV is not None
        penalised = torch.where(logits_BV > 0, logits_BV / settings.penalty_B1, logits_BV * settings.penalty_B1)
        logits_BV = torch.where(seen_BV, penalised, logits_BV)
    tokens = logits_BV.argmax(-1)
    if len(settings.plain) + len(settings.filtered) == 0:
        return tokens
    u_B1 = torch.from_numpy(uniform(settings.seeds, np.asarray(positions, dtype=np.uint64))).to(logits_BV.device)[
        :, None
    ]
    for rows, draw in ((settings.plain, _draw_plain), (settings.filtered, _draw_filtered)):
        if len(rows):
            x = logits_BV if len(rows) == len(logits_BV) else logits_BV[rows]
            # the largest logit becomes 0, so that no temperature, however low, overflows
            p = torch.softmax((x - x.amax(-1, keepdim=True)) / settings.temperature_B1[rows], -1)
            tokens[rows] = draw(x, p, u_B1[rows], settings, rows)
    return tokens


def _draw_plain(x_BV: Tensor, p_BV: Tensor, u_B1: Tensor, settings: Settings, rows: Tensor) -> Tensor:
    return _invert(p_BV.cumsum(-1, dtype=torch.float64), u_B1)


def _invert(cumulative: Tensor, target_B1: Tensor) -> Tensor:
    """Where the cumulative mass first exceeds u x total."""
    return torch.searchsorted(cumulative, target_B1 * cumulative[:, -1:], right=True)[:, 0]


def _draw_filtered(
    x_BV: Tensor, p_BV: Tensor, u_B1: Tensor, settings: Settings, rows: Tensor, width: int = PREFILTER
) -> Tensor:
    vocabulary = x_BV.shape[1]
    width = min(width, vocabulary)
    ids_BW = x_BV.topk(width).indices if width < vocabulary else x_BV.sort(dim=-1, descending=True, stable=True).indices
    p_BW = p_BV.gather(1, ids_BW).double()
    cumulative_BW = p_BW.cumsum(-1)
    k_B1 = settings.top_k_B1[rows]
    mass_B1 = torch.where(k_B1 <= width, cumulative_BW.gather(1, k_B1.clamp(max=width).long() - 1), 1.0)
    keep_BW = (torch.arange(width, device=x_BV.device) < k_B1) & (p_BW >= settings.min_p_B1[rows] * p_BW[:, :1])
    keep_BW &= cumulative_BW - p_BW < settings.top_p_B1[rows] * mass_B1
    last_B1 = keep_BW.sum(-1, keepdim=True) - 1
    within = torch.searchsorted(cumulative_BW, u_B1 * cumulative_BW.gather(1, last_B1), right=True)
    tokens = ids_BW.gather(1, within)[:, 0]
    if width < vocabulary:
        # the prefix may go on beyond what was sorted, or the mass of the k likeliest is not known yet
        k_B = k_B1[:, 0]
        longer = ((k_B > width) & (keep_BW[:, -1] | (k_B < vocabulary))).nonzero()[:, 0]
        if len(longer):
            tokens[longer] = _draw_filtered(
                x_BV[longer], p_BV[longer], u_B1[longer], settings, rows[longer], vocabulary
            )
    return tokens
