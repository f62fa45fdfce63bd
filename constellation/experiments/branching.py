"""Ways for a kernel to branch from a trained model and learn one domain, at equal steps, batches and optimizer (AdamW).

full       all weights
kappa_70   all weights, every concentration c_h times 70/64 at the branch: a role's kappa target as a temperature
kappa_50   times 50/64
adapter    W + B A in the products that write to the residual stream and nothing else, B = 0 at the branch,
           `ADAPTER` weights in all (Hu et al. 2021): the roadmap's own finding as a control
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from constellation.data.batches import Batches
from constellation.kernel.loss import linear_cross_entropy
from constellation.kernel.model import KernelLM

ADAPTER = 25_000
WAYS = ("full", "kappa_70", "kappa_50", "adapter")


class LowRank(nn.Module):
    """W -> W + B A of rank r; A random, B zero."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) / math.sqrt(columns))
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def branch(model: KernelLM, way: str, batches: Batches, steps: int, lr: float, seed: int) -> tuple[KernelLM, int]:
    """The trained branch, as a plain kernel, and how many weights were trained."""
    kernel = copy.deepcopy(model).train()
    if way == "adapter":
        adapt(kernel, seed)
    if way.startswith("kappa"):
        with torch.no_grad():
            for block in _blocks(kernel):
                block.attention.log_c += math.log(float(way.partition("_")[2]) / 64)
    weights = [p for p in kernel.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        x, y = (torch.from_numpy(a) for a in batches.at(step))
        linear_cross_entropy(kernel.hidden(x), kernel.unembedding, y, 2048).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    count = sum(p.numel() for p in weights)
    for product in _products(kernel) if way == "adapter" else ():
        parametrize.remove_parametrizations(product, "weight")
    return kernel.eval(), count


def adapt(kernel: KernelLM, seed: int) -> None:
    """Freeze all weights and put low ranks beside the products that write to the residual stream."""
    for p in kernel.parameters():
        p.requires_grad_(False)
    products: list[Any] = _products(kernel)
    rank = max(1, round(ADAPTER / sum(sum(p.weight.shape) for p in products)))
    generator = torch.Generator().manual_seed(seed)
    for product in products:
        parametrize.register_parametrization(product, "weight", LowRank(product.weight, rank, generator))
        product.parametrizations.weight.original.requires_grad_(False)


def _products(kernel: KernelLM) -> list[Any]:
    return [product for block in _blocks(kernel) for product in (block.attention.out, block.mlp.out)]


def _blocks(kernel: KernelLM) -> list[Any]:
    return list(kernel.blocks)
