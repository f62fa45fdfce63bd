"""Cross-entropy of a linear head, in chunks: the logits of the whole batch never exist.

For hidden states h (N, D), head W (V, D) and targets y (N,):

    loss = -(1/N) sum_n log softmax(W h_n)[y_n]                                  nats per token
    d loss / d z_n = (softmax(z_n) - e_{y_n}) / N,   z_n = W h_n

The gradient is a by-product of the same softmax, so the forward pass computes it and forgets the
logits: peak memory is chunk x V instead of N x V, and the backward pass is one scaling (the idea of
Liger Kernel, Hsu et al. 2024). Powers are of 2, which is cheaper. The naive F.cross_entropy is the oracle in the tests.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LOG2_E = 1 / math.log(2)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """hidden and weight arrive in the dtype of the products; sums are fp32, or fp64 for fp64."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        rows = hidden.shape[0]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        for start in range(0, rows, chunk):
            part, target = hidden[start : start + chunk], targets[start : start + chunk, None]
            z = (part @ weight.T).to(wide)
            top = z.amax(-1, keepdim=True)
            total += (top - z.gather(1, target)).sum()
            p = z.sub_(top).mul_(LOG2_E).exp2_()
            sums = p.sum(-1, keepdim=True)  # at least 1: log p(target) is exact where p(target) itself underflows
            total += sums.log().sum()
            p.mul_(sums.reciprocal_().div_(rows))
            p.scatter_add_(1, target, p.new_full((1, 1), -1.0 / rows).expand(len(part), 1))
            p = p.to(hidden.dtype)
            torch.mm(p, weight, out=grad_hidden[start : start + chunk])
            grad_weight.addmm_(p.T, part) if p.dtype == wide else grad_weight.add_(p.T @ part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (scale,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Mean cross-entropy in nats of head `weight` on `hidden` (..., D) against `targets` (...).

    Under autocast the products run in its dtype. Uniform logits give ln V.
    """
    flat = hidden.flatten(0, -2)
    if torch.is_autocast_enabled(flat.device.type):
        dtype = torch.get_autocast_dtype(flat.device.type)
        flat, weight = flat.to(dtype), weight.to(dtype)
    with torch.autocast(flat.device.type, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(flat, weight, targets.flatten(), chunk)
    return loss
