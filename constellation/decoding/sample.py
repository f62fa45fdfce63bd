"""Sampling: from logits to tokens, for a batch of requests with different settings each.

One request's token is a function of its logits, its settings and one uniform number u(seed, index, position)
from a counter-based hash; `index` numbers the answers to one question. So the sampler's whole state is
`position`, a request can move to another process between two tokens, and neighbours in the batch change nothing.

The filters, in this order, B requests, V tokens, p_(1) >= p_(2) >= ... sorted:

    repetition penalty   x_i -> x_i / r if x_i > 0 else x_i r, for tokens i of the window
    presence, frequency  x_i -> x_i - a [n_i > 0] - b n_i, n_i times that i was generated (OpenAI's meaning)
    logit bias           x_i -> x_i + bias_i
    basin terms          x_i -> x_i + what basins.py says of i behind the last tokens
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

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from constellation.decoding.sampling import MOST_LOGPROBS
from constellation.decoding.sampling import Sampling as Sampling

PREFILTER = 256  # likeliest tokens looked at before a whole row is sorted
BUCKETS = (0x3F800000 >> 16) + 1  # of probabilities: 1.0 is the largest float of them
RECORD = np.dtype([
    ("seed", np.uint64), ("index", np.uint64), ("top_k", np.int64),
    ("top_p", np.float64), ("min_p", np.float64), ("temperature", np.float64),
])  # fmt: skip  # struct sampling of csrc/draw.c
_COLDEST = torch.finfo(torch.float32).tiny  # a temperature that rounds to zero would give 0 / 0

TokenScore = tuple[
    float, tuple[tuple[int, float], ...]
]  # a token's log-probability, and the likeliest ones with theirs


class RowSettings:
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
    settings: RowSettings,
    positions: Sequence[int],
    seen_BV: Tensor | None = None,
    counts_BV: Tensor | None = None,
    terms_BV: Tensor | None = None,
) -> Tensor:
    """The next token of every request, (B,) int64.

    `positions[b]` counts the tokens request b was given before. `seen_BV` (bool) marks the tokens of its
    window, `counts_BV` says how often each was generated; they are needed only when a row has a penalty on them, as
    `terms_BV` (basins.py) are when a row asks for some.
    """
    logits_BV = penalised(logits_BV, settings, np.asarray(positions), seen_BV, counts_BV, terms_BV)
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
    settings: RowSettings,
    positions: NDArray[np.int64],
    seen_BV: Tensor | None,
    counts_BV: Tensor | None,
    terms_BV: Tensor | None = None,
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
    if terms_BV is not None:
        x_BV = x_BV + terms_BV
    if len(settings.early_until):
        rows, ids = settings.early_at
        early = torch.from_numpy(positions[rows.cpu().numpy()] < settings.early_until).to(x_BV.device)
        x_BV = x_BV.index_put((rows[early], ids[early]), x_BV.new_tensor(float("-inf")))
    return x_BV


def _draw_plain(x_BV: Tensor, p_BV: Tensor, u_B1: Tensor, settings: RowSettings, rows: Tensor) -> Tensor:
    return _invert(p_BV.cumsum(-1, dtype=torch.float64), u_B1)


def _invert(cumulative: Tensor, target_B1: Tensor) -> Tensor:
    """Where the cumulative mass first exceeds u x total."""
    return torch.searchsorted(cumulative, target_B1 * cumulative[:, -1:], right=True)[:, 0]


def _draw_filtered(
    x_BV: Tensor, p_BV: Tensor, u_B1: Tensor, settings: RowSettings, rows: Tensor, width: int = PREFILTER
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


def _draw_wide(x_BV: Tensor, p_BV: Tensor, u_B: Tensor, settings: RowSettings, rows: Tensor) -> Tensor:
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


def scored(log_p_TV: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """The log-probability of each token and the `top` likeliest ones, of one tensor: equal tokens, equal numbers."""
    mine = log_p_TV.gather(1, torch.tensor(tokens, device=log_p_TV.device)[:, None])[:, 0].tolist()
    # always as many, so that among equals the order does not depend on how many are told
    values, ids = log_p_TV.topk(min(MOST_LOGPROBS, log_p_TV.shape[1]))
    pairs = (tuple(zip(i[:top], v[:top], strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return list(zip(mine, pairs, strict=True))
