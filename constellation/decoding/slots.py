"""Keys and values of many requests, a slot each, and the forward pass of rows of them.

A row is one token of one request: it writes its key and value into column `position` of its slot and attends to the
columns up to there. Rows of a pass may belong to any requests, also several to one (a piece of its prompt): a token is
computed by the same operations whatever it is in company of, which makes it the same to the bit on a CPU. Hence no
attention kernel with several queries: each row has one query, and columns come in blocks, the unused ones masked.
Shapes as in packed.py; S slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from constellation.decoding.packed import Layer, Packed
from constellation.kernel.geodesic import half_square_angle

BLOCK = 16  # columns are counted in blocks: one AVX-512 vector of float32
PAIRS = 2**22  # keys of all heads and rows that geodesic attention copies at once


@dataclasses.dataclass(frozen=True)
class Run:
    """Rows first..first+count-1 of a pass: one token of each of the slots from `slot` on, or `count` of `slot`."""

    first: int
    count: int
    slot: int
    spread: bool  # over as many slots
    columns: int  # to look at: more than the largest position


class Slots:
    """`count` slots of `packed.context` columns, and a spare one where graph.py wants it."""

    def __init__(self, packed: Packed, count: int, spare: bool = False):
        self.packed, self.count, self.spare = packed, count, packed.context
        self.columns = _blocks(packed.context + spare)
        self.held = self._allocate()
        self._column_C = torch.arange(self.columns, device=packed.device)
        self._views = functools.lru_cache(maxsize=64)(self._look)  # most passes look where the one before looked

    def _allocate(self) -> tuple[Tensor, ...]:
        """Keys and values of each layer, (slots, columns, 2, G, K)."""
        packed = self.packed
        shape = (packed.layers_count, self.count, self.columns, 2, packed.groups, packed.size)
        if packed.device.type == "cpu":  # from numpy, whose zeros take no memory before they are written to
            return torch.from_numpy(np.zeros(shape, np.float32)).unbind(0)
        return torch.zeros(shape, device=packed.device).unbind(0)

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` columns of one slot into another."""
        for kv in self.held:
            kv[target, :length] = kv[source, :length]

    @torch.inference_mode()
    def read(
        self, tokens: Sequence[int], before: Sequence[int], position: Sequence[int], slot: Sequence[int],
        runs: Sequence[Run],
    ) -> Tensor:  # fmt: skip
        """The last layer's output (N, D) for each row: token, token before it (V: none), position, slot."""
        rows = torch.tensor((tokens, before, position, slot), device=self.packed.device)
        return self.forward(rows, runs)

    def forward(self, rows_4N: Tensor, runs: Sequence[Run]) -> Tensor:
        packed, (tokens_N, before_N, position_N, slot_N) = self.packed, rows_4N.unbind(0)
        count = len(tokens_N)
        spare = max(0, packed.min_rows - count)
        x_ND = packed.embed(tokens_N, before_N)
        rotary_N21K = packed.rotary_C21K.index_select(0, position_N.clamp(max=packed.context - 1))
        at_N = slot_N * self.columns + position_N
        masks = [self._mask(position_N[run.first : run.first + run.count], run.columns) for run in runs]
        if spare:  # a product needs them; what they say is not looked at
            x_ND = torch.cat((x_ND, x_ND[:1].expand(spare, -1)))
        views = [self._views(run.slot, run.count, run.spread, run.columns) for run in runs]
        for at, (layer, held) in enumerate(zip(packed.layers, self.held, strict=True)):
            qkv = layer.qkv(packed.normal(x_ND))
            mine = qkv[:count]
            packed.turned(layer, mine, rotary_N21K)
            held.view(len(held) * self.columns, -1).index_copy_(0, at_N, mine[:, packed.width :])
            parts = [
                self._attend(layer, mine, position_N, run, kv[at], mask)
                for run, kv, mask in zip(runs, views, masks, strict=True)
            ]
            if spare:
                parts.append(qkv[count:, : packed.width])
            y_ND = torch.cat(parts) if len(parts) > 1 else parts[0]
            x_ND = layer.out.onto(y_ND, x_ND)
            x_ND = layer.down.onto(layer.gated(packed.normal(x_ND)), x_ND)
        return x_ND[:count]

    def _mask(self, position_N: Tensor, columns: int) -> Tensor:
        """0 at the columns a row sees, else -inf: (N, 1, 1, columns)."""
        unseen = self._column_C[:columns] > position_N[:, None]
        return torch.zeros_like(unseen, dtype=torch.float32).masked_fill_(unseen, float("-inf"))[:, None, None]

    def _look(self, slot: int, rows: int, spread: bool, columns: int) -> list[tuple[Tensor, Tensor]]:
        """The keys and values (rows, G, columns, K) of each layer."""
        found = []
        for kv in self.held:
            k, v = kv[slot : slot + (rows if spread else 1), :columns].permute(2, 0, 3, 1, 4).unbind(0)
            found.append((k, v) if spread else (k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)))
        return found

    def _attend(
        self, layer: Layer, qkv_NO: Tensor, position_N: Tensor, run: Run, kv: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """The queries of a row that share a key stand below one another: q (rows, G, H / G, K)."""
        packed, rows = self.packed, slice(run.first, run.first + run.count)
        q = qkv_NO[rows, : packed.width].view(run.count, packed.groups, -1, packed.size)
        if layer.concentration_H is None or packed.coupling_C is None:
            return F.scaled_dot_product_attention(q, *kv, attn_mask=mask, scale=1.0).view(-1, packed.width)
        coupling_N = packed.coupling_C[position_N[rows].clamp(max=packed.context - 1)]
        factor = coupling_N[:, None, None, None] * layer.concentration_H.view(packed.groups, -1, 1)
        few = max(1, PAIRS // (kv[0][0].numel()))
        parts = []
        for start in range(0, run.count, few):
            at = slice(start, start + few)
            logits = torch.addcmul(mask[at], half_square_angle(q[at] @ kv[0][at].mT), factor[at], value=-1)
            parts.append(torch.softmax(logits, -1) @ kv[1][at])
        return torch.cat(parts).view(-1, packed.width)

    def logits(self, x_ND: Tensor) -> Tensor:
        """(N, V) of the last layer's output."""
        spare = max(0, self.packed.min_rows - len(x_ND))
        x = torch.cat((x_ND, x_ND[:1].expand(spare, -1))) if spare else x_ND
        return self.packed.logits(x)[: len(x_ND)]


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK) * BLOCK
