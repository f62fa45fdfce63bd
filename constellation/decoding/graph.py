"""The decoding step of all slots as one CUDA graph: one launch instead of some thirty a layer.

A graph is a fixed sequence of kernels on fixed addresses, so the step it holds is the widest one: a row for every slot,
attention to every column. A slot that does not write gets a row all the same, whose key and value go into the spare
column behind the context, where nobody looks. `Wide` is that step without a graph, the oracle on any device: a row's
numbers are those of a narrow pass (slots.py), to the bit where rows do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from constellation.decoding.slots import Run, Slots


class Wide:
    """Logits (N, V) after one token in each of N slots, by a pass over all of them. Needs `Slots(..., spare=True)`."""

    def __init__(self, slots: Slots):
        self.slots, packed = slots, slots.packed
        count, device = slots.count, packed.device
        idle = (packed.vocabulary, packed.vocabulary, slots.spare, 0)
        self.rows_4S = torch.tensor(idle, device=device)[:, None].repeat(1, count)
        self.rows_4S[3] = torch.arange(count, device=device)
        self._idle_3S = self.rows_4S[:3].clone()
        self._runs = [Run(0, count, 0, True, slots.columns)]

    def __call__(
        self, tokens: Sequence[int], before: Sequence[int], position: Sequence[int], slot: Sequence[int]
    ) -> Tensor:
        at = torch.tensor(slot, device=self.rows_4S.device)
        self.rows_4S[:3].copy_(self._idle_3S)
        self.rows_4S[:3, at] = torch.tensor((tokens, before, position), device=self.rows_4S.device)
        return self._pass().index_select(0, at)

    def _pass(self) -> Tensor:
        return self.slots.logits(self.slots.forward(self.rows_4S, self._runs))


class Graph(Wide):
    """The same, captured once and replayed."""

    def __init__(self, slots: Slots):
        super().__init__(slots)
        side = torch.cuda.Stream(slots.packed.device)
        side.wait_stream(torch.cuda.current_stream(slots.packed.device))
        with torch.cuda.stream(side):  # libraries set themselves up outside of the capture
            for _ in range(3):
                super()._pass()
        torch.cuda.current_stream(slots.packed.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_SV = super()._pass()

    def _pass(self) -> Tensor:
        self._graph.replay()
        return self._logits_SV
