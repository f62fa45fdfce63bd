"""Attention by the exact squared Fubini-Study distance of unit vectors.

    logit_ij = -f_i theta_ij^2 / 2,    theta_ij = arccos |<q_i, k_j>|  in [0, pi / 2]

f_i is the factor of the row. A state and its negative are the same, and the logit is 0 where they agree, at least
-f_i pi^2 / 8 elsewhere. No product of q and k gives it, so it is computed over all T x T pairs on a CPU, and by
FlexAttention on a GPU. Shapes as in attention.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from constellation.kernel.attention import states

NEAR = 0.02  # 1 - |x| below which the series below is taken: its 9 terms end at 1e-18
SERIES = [2**n / (n * n * math.comb(2 * n, n)) for n in range(1, 10)]


def half_square_angle(x: Tensor) -> Tensor:
    """arccos(|x|)^2 / 2, in [0, pi^2 / 8]; |x| above 1, which is rounding, counts as 1.

    With d = 1 - |x| it is analytic at d = 0, where arccos itself has no derivative:
    sum_n (2 d)^n / (n^2 binom(2n, n)) = d + d^2 / 6 + ...; its derivative in |x| is -theta / sin theta, -1 at the end.
    At x = 0, where two branches of slope -+ pi / 2 meet, the derivative is 0.
    """
    size = x.abs().clamp(max=1)
    d = 1 - size
    near = d < NEAR
    small = d.where(near, 0.0)
    series = torch.zeros_like(d)
    for coefficient in reversed(SERIES):
        series = (series + coefficient) * small
    return series.where(near, torch.acos(size.where(~near, 0.5)).square() / 2)


def geodesic_attention(
    qkv_BT3HK: Tensor, factor_HT: Tensor, cos_TK: Tensor, sin_TK: Tensor, mask_TT: Tensor | None
) -> Tensor:
    """y (B, T, H K). With `mask_TT` (0 / -inf) over all pairs, without it by FlexAttention."""
    ones = torch.ones_like(factor_HT[:1])
    q, k, v = states(qkv_BT3HK, ones, cos_TK, sin_TK, unit=True)
    if mask_TT is None:
        y_BHTK = _flex(q, k, v, factor_HT)
    else:
        logits = torch.addcmul(
            mask_TT, half_square_angle((q @ k.mT).to(factor_HT.dtype)), factor_HT[..., None], value=-1
        )
        y_BHTK = torch.softmax(logits, -1).to(v.dtype) @ v
    return y_BHTK.transpose(1, 2).flatten(2)


def _flex(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, factor_HT: Tensor) -> Tensor:
    def score(product: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return -factor_HT[head, row] * half_square_angle(product)

    mask = _block_mask(q_BHTK.shape[2], q_BHTK.device)
    y: Tensor = _compiled()(q_BHTK, k_BHTK, v_BHTK, score_mod=score, block_mask=mask, scale=1.0)
    return y


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=8)
def _block_mask(length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda batch, head, row, column: row >= column, None, None, length, length, device)
