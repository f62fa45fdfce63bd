"""Causal attention of whole sequences, from what the product with the QKV weights gives to what the next one takes.

    q_i = rotate_i(f_i x_i / |x_i|)    the factor f_i of the row in it; k_i the same without f_i; "dot": not divided
    y_i = sum_{j <= i} softmax_j <q_i, k_j> v_j

Shapes: B batch, T position, H heads, K head size. Three ways:

explicit   two products around a softmax over all T x T logits: up to 512 positions on a CPU. With bf16 products that
           trains faster than the fused CPU kernel
fused      scaled_dot_product_attention: GPUs and longer sequences
by hand    the explicit way in float32 (derivative.py). S rows at a time, whose logits stay in the cache, with the
           keys that they can see and no others: half of the products for T >> S. In base 2, which is cheaper:

    z = log2(e) <q, k>,   E = 2^(z - max z),   s = sum_j E,   y = E v / s
    g' = ln(2) g / s:     dz = E (<g', v> - <g', y>),   dv = E^T g' / ln 2,   dq = dz k,   dk = dz^T q
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from constellation.kernel.derivative import by_hand, first_alone, pulled_back

EXPLICIT_UP_TO = 512  # positions; above it the T x T logits of the explicit path cost more than the fused kernel
EPS = 1e-6  # in |x|^2 + eps
LOG2_E = 1 / math.log(2)
ROWS = 64  # S


def attention(
    qkv_BT3HK: Tensor, factor_HT: Tensor, cos_TK: Tensor, sin_TK: Tensor, mask_TT: Tensor | None, unit: bool
) -> Tensor:
    """y (B, T, H K). With `mask_TT` (0 / -inf) explicitly or by hand, without it by the fused kernel.

    factor_HT   f; 1 in place of H where all heads have the same
    unit        whether q and k are divided by their lengths
    """
    if mask_TT is not None and by_hand(qkv_BT3HK):
        return _ByHand.apply(qkv_BT3HK, factor_HT, cos_TK, sin_TK, unit)
    return _formula(qkv_BT3HK, factor_HT, cos_TK, sin_TK, mask_TT, unit)


def states(
    qkv_BT3HK: Tensor, factor_HT: Tensor, cos_TK: Tensor, sin_TK: Tensor, unit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (B, H, T, K); logits are then plainly q.k."""
    q, k, v = qkv_BT3HK.permute(2, 0, 3, 1, 4)
    if unit:
        q = q * (torch.rsqrt((q * q).sum(-1, keepdim=True) + EPS) * factor_HT[..., None])
        k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + EPS)
    else:
        q = q * factor_HT[..., None]
    return rotate(q, cos_TK, sin_TK).to(v.dtype), rotate(k, cos_TK, sin_TK).to(v.dtype), v


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): the pair (x_i, x_{i + K/2}) turns by position x frequency_i."""
    a, b = x_BHTK.chunk(2, dim=-1)
    return torch.cat((a * cos_TK - b * sin_TK, b * cos_TK + a * sin_TK), dim=-1)


def attend(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask_TT: Tensor | None) -> Tensor:
    """Causal softmax(q k^T) v. With `mask_TT` (0 / -inf) by explicit products, else by the fused kernel."""
    if mask_TT is None:
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True, scale=1.0)
    q, k, v = q_BHTK.flatten(0, 1), k_BHTK.flatten(0, 1), v_BHTK.flatten(0, 1)
    logits = torch.baddbmm(mask_TT.to(q.dtype).expand(len(q), *mask_TT.shape), q, k.transpose(1, 2))
    return (torch.softmax(logits, -1) @ v).view(q_BHTK.shape)


def causal_mask(length: int) -> Tensor:
    return torch.full((length, length), float("-inf")).triu(1)


def _formula(
    qkv_BT3HK: Tensor, factor_HT: Tensor, cos_TK: Tensor, sin_TK: Tensor, mask_TT: Tensor | None, unit: bool
) -> Tensor:
    return attend(*states(qkv_BT3HK, factor_HT, cos_TK, sin_TK, unit), mask_TT).transpose(1, 2).flatten(2)


class _ByHand(torch.autograd.Function):
    """N = B H heads side by side; 2 in front of it: q and k. `turn` is cos and sin for all of a head's K channels."""

    @staticmethod
    def forward(ctx: Any, qkv_BT3HK: Tensor, factor_HT: Tensor, cos_TK: Tensor, sin_TK: Tensor, unit: bool) -> Tensor:
        batch, length, _, heads, size = qkv_BT3HK.shape
        x_3BHTK = qkv_BT3HK.new_empty(3, batch, heads, length, size).copy_(qkv_BT3HK.permute(2, 0, 3, 1, 4))
        x = x_3BHTK[:2]
        turn = torch.cat((cos_TK, cos_TK), -1), torch.cat((-sin_TK, sin_TK), -1)
        r = torch.linalg.vecdot(x, x).add_(EPS).rsqrt_() if unit else x.new_ones(2, batch, heads, length)
        scale = r.clone()
        scale[0] *= factor_HT * LOG2_E
        u = x * scale[..., None]
        q, k = (u * turn[0]).addcmul_(u.roll(size // 2, -1), turn[1]).flatten(1, 2)
        v = x_3BHTK[2].flatten(0, 1)
        y_BTHK = qkv_BT3HK.new_empty(batch, length, heads, size)
        s = q.new_empty(len(q), length, 1)
        parts, mask = [], causal_mask(min(ROWS, length)).to(q.dtype)
        for start in range(0, length, ROWS):
            rows = slice(start, min(start + ROWS, length))
            z = torch.bmm(q[:, rows], k[:, : rows.stop].mT)
            width = rows.stop - start
            z[:, :, start:] += mask[:width, :width]
            e = z.sub_(z.amax(-1, keepdim=True)).exp2_()
            sums = torch.sum(e, -1, keepdim=True, out=s[:, rows])
            y = torch.bmm(e, v[:, : rows.stop]).div_(sums)
            y_BTHK[:, rows] = y.view(batch, heads, width, size).transpose(1, 2)
            parts.append(e)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(
                qkv_BT3HK, factor_HT, cos_TK, sin_TK, x_3BHTK, r, scale, q, k, s, y_BTHK, *turn, *parts
            )
            ctx.unit = unit
        return y_BTHK.flatten(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs, (x_3BHTK, r, scale, q, k, s, y_BTHK, cos, sin, *parts) = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        (g,) = grads
        batch, length, heads, size = y_BTHK.shape
        if not first_alone(g):
            mask = causal_mask(length).to(q.dtype)
            return (*pulled_back(_formula, (*inputs, mask, ctx.unit), g)[:4], None)
        g_BTHK, v = g.view(y_BTHK.shape), x_3BHTK[2].flatten(0, 1)
        inner = torch.linalg.vecdot(g_BTHK, y_BTHK).transpose(1, 2).reshape(-1, length, 1)
        over = math.log(2) / s
        g_NTK = torch.empty_like(q)
        torch.mul(g_BTHK.transpose(1, 2), over.view(batch, heads, length, 1), out=g_NTK.view(x_3BHTK.shape[1:]))
        inner.mul_(over)
        dw = torch.empty_like(x_3BHTK[:2])
        dq, dk = dw.flatten(1, 2)
        dv = torch.empty_like(v)
        for start, e in reversed(list(zip(range(0, length, ROWS), parts, strict=True))):
            rows, seen = slice(start, start + e.shape[1]), slice(0, e.shape[2])
            g_rows, q_rows = g_NTK[:, rows], q[:, rows]
            dz = torch.bmm(g_rows, v[:, seen].mT).sub_(inner[:, rows]).mul_(e)
            dq[:, rows] = torch.bmm(dz, k[:, seen])
            if seen.stop == length:  # the last rows see all keys
                torch.bmm(dz.mT, q_rows, out=dk)
                torch.bmm(e.mT, g_rows, out=dv)
            else:
                dk[:, seen] += torch.bmm(dz.mT, q_rows)
                dv[:, seen] += torch.bmm(e.mT, g_rows)
        du = (dw * cos).addcmul_(dw.roll(size // 2, -1), sin, value=-1)
        along = torch.linalg.vecdot(du, x_3BHTK[:2])
        d_qkv = torch.empty_like(inputs[0])
        d_3BHTK = d_qkv.permute(2, 0, 3, 1, 4)
        torch.mul(dv.view(x_3BHTK.shape[1:]), LOG2_E, out=d_3BHTK[2])
        torch.mul(du, scale[..., None], out=d_3BHTK[:2])
        if ctx.unit:
            d_3BHTK[:2].addcmul_(x_3BHTK[:2], (along * scale * r.square())[..., None], value=-1)
        d_factor = (along[0] * r[0]).sum(0).sum_to_size(inputs[1].shape) * LOG2_E
        return d_qkv, d_factor, None, None, None
