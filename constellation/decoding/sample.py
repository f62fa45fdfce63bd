"""Sampling: from logits to tokens, for a batch of requests with different settings each.

One request's token is a function of its logits, its settings and one uniform number u(seed, index, position)
from a counter-based hash; `index` numbers the answers to one question. So the sampler's whole state is
`position`, a request can move to another process between two tokens, and neighbours in the batch change nothing.

The filters, in this order, B requests, V tokens, p_(1) >= p_(2) >= ... sorted:

    repetition penalty   x_i -> x_i / r if x_i > 0 else x_i r, for tokens i of the window
    presence, frequency  x_i -> x_i - a [n_i > 0] - b n_i, n_i times that i was generated (OpenAI's meaning)
    logit bias           x_i -> x_i + bias_i
    min tokens           x_i -> -inf for the ends of an answer, while position < min_tokens
    temperature          p = softmax(x / T); T = 0 takes argmax x, the first one of several, and ends here
    top-k                the k likeliest tokens, renormalised
    top-p                the fewest likeliest ones that hold p of that mass (Holtzman et al. 2020)
    min-p                those with p_i >= m p_(1) (Nguyen et al. 2024)

The last three each keep a prefix of the sorted tokens, so their intersection is the shortest one and
256 sorted tokens nearly always suffice. A row whose prefix is longer is sorted whole or, on a CPU and without a
top-k, put into buckets, of which those alone are sorted in which the prefix and the draw end. The draw inverts
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
MOST_BIASES, MOST_STOP_TOKENS, MOST_LOGPROBS = 300, 64, 20
BUCKETS = (0x3F800000 >> 16) + 1  # of probabilities: 1.0 is the largest float of them
RECORD = np.dtype([
    ("seed", np.uint64), ("index", np.uint64), ("top_k", np.int64),
    ("top_p", np.float64), ("min_p", np.float64), ("temperature", np.float64),
])  # fmt: skip  # struct sampling of csrc/draw.c
_LARGEST_SEED, _LARGEST_TOKEN = 2**64 - 1, 2**32 - 1
_COLDEST = torch.finfo(torch.float32).tiny  # a temperature that rounds to zero would give 0 / 0

Scored = tuple[float, tuple[tuple[int, float], ...]]  # a token's log-probability, and the likeliest ones with theirs


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What one request asks of the sampler."""

    temperature: float = 1.0  # T, [0, 1e30]; 0 is greedy
    top_k: int = 0  # tokens, 0: all
    top_p: float = 1.0  # mass, (0, 1]
    min_p: float = 0.0  # part of the likeliest token's probability, [0, 1]
    repetition_penalty: float = 1.0  # r, [0.01, 100]; 1: none
    seed: int = 0  # 0..2^64-1
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    max_new_tokens: int = 128  # >= 1
    presence_penalty: float = 0.0  # a, nats, [-2, 2], off every token generated before
    frequency_penalty: float = 0.0  # b, nats, [-2, 2], the same for each time that it was
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, nats in [-100, 100]), at most 300
    min_tokens: int = 0  # before them no end of text and no stop, 0..max_new_tokens
    ignore_eos: bool = False  # the end of text is a token like any other
    stop_token_ids: tuple[int, ...] = ()  # tokens that end the answer and whose text is not part of it, at most 64
    logprobs: int | None = None  # likeliest tokens told beside each new one, 0..20; None: no log-probability at all
    index: int = 0  # of the answers to one question, each with random numbers of its own, 0..2^32-1

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, lambda x: 0 <= x <= 1e30, "from 0 to 1e30; 0 is greedy")
        _check_whole("top_k", self.top_k, 0, None)
        _check_number("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1; 1 keeps every token")
        _check_number("min_p", self.min_p, lambda x: 0 <= x <= 1, "from 0 to 1; 0 keeps every token")
        wanted = "from 0.01 to 100; 1 is none"
        _check_number("repetition_penalty", self.repetition_penalty, lambda x: 0.01 <= x <= 100, wanted)
        _check_whole("seed", self.seed, 0, _LARGEST_SEED)
        _check_whole("max_new_tokens", self.max_new_tokens, 1, None)
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise ConfigError(f"stop={self.stop!r}: must be texts of at least one character each")
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), lambda x: -2 <= x <= 2, "from -2 to 2; 0 is none")
        _check_pairs("logit_bias", self.logit_bias)
        _check_whole("min_tokens", self.min_tokens, 0, self.max_new_tokens)
        if not isinstance(self.ignore_eos, bool):
            raise ConfigError(f"ignore_eos={self.ignore_eos!r}: must be true or false")
        if not isinstance(self.stop_token_ids, tuple) or len(self.stop_token_ids) > MOST_STOP_TOKENS:
            raise ConfigError(f"stop_token_ids={self.stop_token_ids!r}: must be at most {MOST_STOP_TOKENS} tokens")
        for token in self.stop_token_ids:
            _check_whole("stop_token_ids", token, 0, _LARGEST_TOKEN)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        _check_whole("index", self.index, 0, 2**32 - 1)

    def changed(self) -> dict[str, Any]:
        """The settings that are not as by default, for `from_json`."""
        return {name: value for name, value in vars(self).items() if value != getattr(Sampling, name)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sampling:
        for name in data:
            if name not in cls.__dataclass_fields__:
                known = ", ".join(cls.__dataclass_fields__)
                raise ConfigError(f"unknown sampling parameter {name!r}; known: {known}")
        values = dict(data)
        for name in ("stop", "stop_token_ids", "logit_bias"):
            if isinstance(values.get(name), list):
                values[name] = tuple(tuple(v) if isinstance(v, list) else v for v in values[name])
        return cls(**values)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def counted(self) -> bool:
        """Whether a penalty counts the tokens that were generated."""
        return bool(self.presence_penalty or self.frequency_penalty)

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def record(self) -> tuple[int, int, int, float, float, float]:
        """What a draw needs to know, a RECORD."""
        return self.seed, self.index, self.top_k, self.top_p, self.min_p, self.temperature

    @property
    def penalised(self) -> bool:
        """Whether the logits are changed before the draw."""
        return bool(self.repetition_penalty != 1 or self.counted or self.logit_bias or self.min_tokens)


def _check_number(name: str, value: Any, in_range: Callable[[float], bool], wanted: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not in_range(value):
        raise ConfigError(f"{name}={value!r}: must be a number {wanted}")


def _check_whole(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name}={value!r}: must be a whole number {bound}")


def _check_pairs(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or len(value) > MOST_BIASES:
        raise ConfigError(f"{name}: must be at most {MOST_BIASES} pairs of a token and a number")
    for pair in value:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ConfigError(f"{name}={pair!r}: must be a token and a number")
        _check_whole(name, pair[0], 0, _LARGEST_TOKEN)
        _check_number(name, pair[1], lambda x: -100 <= x <= 100, "from -100 to 100")
    if len({token for token, _ in value}) < len(value):
        raise ConfigError(f"{name}: names a token twice")


class Settings:
    """The settings of a batch as tensors, made once for as long as the batch stays together.

    `ends` are the tokens that end an answer besides a request's own `stop_token_ids`.
    """

    def __init__(
        self, samplings: Sequence[Sampling], device: torch.device | str = "cpu", ends: Sequence[int] = ()
    ) -> None:
        def where(chosen: list[bool]) -> Tensor:
            return torch.tensor([i for i, c in enumerate(chosen) if c], dtype=torch.int64, device=device)

        def columns(rows: list[tuple[float, ...]], dtype: torch.dtype) -> tuple[Tensor, ...]:
            return torch.tensor(rows, dtype=dtype, device=device).split(1, dim=1)

        self.top_k_B1, self.top_p_B1, self.min_p_B1 = columns(
            [(s.top_k or math.inf, s.top_p if s.top_p < 1 else math.inf, s.min_p) for s in samplings], torch.float64
        )
        self.temperature_B1, self.penalty_B1, self.presence_B1, self.frequency_B1 = columns(
            [
                (max(s.temperature or 1.0, _COLDEST), s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
                for s in samplings
            ],
            torch.float32,
        )
        self.penalised = any(s.repetition_penalty != 1 for s in samplings)
        self.counted = any(s.counted for s in samplings)
        biases = [(b, token, value) for b, s in enumerate(samplings) for token, value in s.logit_bias]
        self.bias_at = _indices([(b, token) for b, token, _ in biases], device)
        self.bias = torch.tensor([value for _, _, value in biases], device=device)
        early = [(b, t, s.min_tokens) for b, s in enumerate(samplings) if s.min_tokens
                 for t in {*s.stop_token_ids, *(() if s.ignore_eos else ends)}]  # fmt: skip
        self.early_at = _indices([(b, token) for b, token, _ in early], device)
        self.early_until = np.array([until for _, _, until in early])
        self.greedy = all(s.greedy for s in samplings)
        self.seeds = np.array([s.seed for s in samplings], dtype=np.uint64)
        self.indices = np.array([s.index for s in samplings], dtype=np.uint64)
        self.records = np.array([s.record for s in samplings], dtype=RECORD)
        self.plain = where([not s.greedy and not s.filtered for s in samplings])
        self.filtered = where([not s.greedy and s.filtered for s in samplings])


def _indices(pairs: Sequence[tuple[int, int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    both = torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2)
    return both[:, 0], both[:, 1]


def uniform(
    seeds: NDArray[np.uint64], positions: NDArray[np.uint64], indices: NDArray[np.uint64] | None = None
) -> NDArray[np.float64]:
    """One number in [0, 1) per (seed, index, position): splitmix64 (Steele et al. 2014) of a stream of their own.

    The stream of a seed is its hash; that of index i > 0 the hash of seed's stream + i x another odd constant.
    52 bits, so that u x total stays below total in float64 and a draw never falls off the end.
    """
    stream = _mix(seeds + np.uint64(0x9E3779B97F4A7C15))
    if indices is not None:
        stream = np.where(indices > 0, _mix(stream + indices * np.uint64(0xD1B54A32D192ED03)), stream)
    bits = _mix(stream + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@torch.inference_mode()
def sample(
    logits_BV: Tensor,
    settings: Settings,
    positions: Sequence[int],
    seen_BV: Tensor | None = None,
    counts_BV: Tensor | None = None,
) -> Tensor:
    """The next token of every request, (B,) int64.

    `positions[b]` counts the tokens request b was given before. `seen_BV` (bool) marks the tokens of its
    window, `counts_BV` says how often each was generated; they are needed only when a row has a penalty on them.
    """
    logits_BV = penalised(logits_BV, settings, np.asarray(positions), seen_BV, counts_BV)
    if settings.greedy:
        return logits_BV.argmax(-1)
    mixed = len(settings.plain) + len(settings.filtered) < len(logits_BV)
    tokens = logits_BV.argmax(-1) if mixed else settings.plain.new_empty(len(logits_BV))
    u = uniform(settings.seeds, np.asarray(positions, dtype=np.uint64), settings.indices)
    u_B1 = torch.from_numpy(u).to(logits_BV.device)[:, None]
    for rows, draw in ((settings.plain, _draw_plain), (settings.filtered, _draw_filtered)):
        if len(rows):
            x = logits_BV if len(rows) == len(logits_BV) else logits_BV[rows]
            # the largest logit becomes 0, so that no temperature, however low, overflows
            p = torch.softmax((x - x.amax(-1, keepdim=True)) / settings.temperature_B1[rows], -1)
            tokens[rows] = draw(x, p, u_B1[rows], settings, rows)
    return tokens


def penalised(
    x_BV: Tensor,
    settings: Settings,
    positions: NDArray[np.int64],
    seen_BV: Tensor | None,
    counts_BV: Tensor | None,
) -> Tensor:
    """What each request's own history and wishes make of its logits; its own rows alone are changed."""
    if settings.penalised:
        assert seen_BV is not None
        penalised = torch.where(x_BV > 0, x_BV / settings.penalty_B1, x_BV * settings.penalty_B1)
        x_BV = torch.where(seen_BV, penalised, x_BV)
    if settings.counted:
        assert counts_BV is not None
        x_BV = x_BV - settings.presence_B1 * (counts_BV > 0) - settings.frequency_B1 * counts_BV
    if len(settings.bias):
        x_BV = x_BV.index_put(settings.bias_at, settings.bias, accumulate=True)
    if len(settings.early_until):
        rows, ids = settings.early_at
        early = torch.from_numpy(positions[rows.cpu().numpy()] < settings.early_until).to(x_BV.device)
        x_BV = x_BV.index_put((rows[early], ids[early]), x_BV.new_tensor(float("-inf")))
    return x_BV


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
        whole = longer[k_B[longer] < vocabulary] if x_BV.device.type == "cpu" else longer
        if len(whole):
            tokens[whole] = _draw_filtered(x_BV[whole], p_BV[whole], u_B1[whole], settings, rows[whole], vocabulary)
        wide = longer[k_B[longer] >= vocabulary] if x_BV.device.type == "cpu" else longer[:0]
        if len(wide):
            tokens[wide] = _draw_wide(x_BV[wide], p_BV[wide], u_B1[wide, 0], settings, rows[wide])
    return tokens


def _draw_wide(x_BV: Tensor, p_BV: Tensor, u_B: Tensor, settings: Settings, rows: Tensor) -> Tensor:
    """`_draw_filtered` by top-p and min-p of prefixes of any length, without sorting the row.

    A float's leading bits are its bucket, and grow with it: 2^7 buckets for each power of 2. The mass of the buckets
    before says in which one a cumulative mass is reached; that one is sorted.
    """
    bucket_BV = BUCKETS - 1 - (p_BV.view(torch.int32) >> 16).long()  # 0 is that of p = 1
    at_BV = bucket_BV + BUCKETS * torch.arange(len(p_BV))[:, None]
    mass = torch.bincount(at_BV.flatten(), p_BV.flatten().double(), BUCKETS * len(p_BV)).view(len(p_BV), BUCKETS)
    upto_BN = mass.cumsum(-1)
    tokens = []
    for x, p, bucket, upto, u, row in zip(x_BV, p_BV, bucket_BV, upto_BN, u_B.tolist(), rows.tolist(), strict=True):
        kept = float(p[p >= settings.min_p_B1[row] * p.max()].double().sum())
        if float(settings.top_p_B1[row]) < float(upto[-1]):
            _, cumulative = _sorted_bucket(x, p, bucket, upto, float(settings.top_p_B1[row]), right=False)
            last = torch.searchsorted(cumulative, settings.top_p_B1[row])
            kept = min(kept, float(cumulative[last.clamp(max=len(cumulative) - 1)]))
        ids, cumulative = _sorted_bucket(x, p, bucket, upto, u * kept, right=True)
        at = torch.searchsorted(cumulative, u * kept, right=True).clamp(max=len(ids) - 1)
        tokens.append(int(ids[at]))
    return torch.tensor(tokens)


def _sorted_bucket(
    x_V: Tensor, p_V: Tensor, bucket_V: Tensor, upto_N: Tensor, mass: float, right: bool
) -> tuple[Tensor, Tensor]:
    """The tokens of the bucket in which the cumulative mass reaches (with `right`: exceeds) `mass`, likeliest first,
    and the mass up to each of them."""
    n = int(torch.searchsorted(upto_N, mass, right=right).clamp(max=len(upto_N) - 1))
    ids = (bucket_V == n).nonzero()[:, 0]
    if not len(ids):  # rounding put the end behind the last bucket that holds a token
        n = int(bucket_V.max())
        ids = (bucket_V == n).nonzero()[:, 0]
    order = x_V[ids].sort(descending=True, stable=True).indices
    before = upto_N[n - 1] if n else upto_N.new_zeros(())
    return ids[order], before + p_V[ids[order]].double().cumsum(0)


def scored(log_p_TV: Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """The log-probability of each token and the `top` likeliest ones, of one tensor: equal tokens, equal numbers."""
    mine = log_p_TV.gather(1, torch.tensor(tokens, device=log_p_TV.device)[:, None])[:, 0].tolist()
    # always as many, so that among equals the order does not depend on how many are told
    values, ids = log_p_TV.topk(min(MOST_LOGPROBS, log_p_TV.shape[1]))
    pairs = (tuple(zip(i[:top], v[:top], strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return list(zip(mine, pairs, strict=True))
