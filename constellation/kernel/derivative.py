"""When a formula's derivative is written by hand, and what stands in where one derivative is not enough.

A formula of many small operations reads and writes memory many times, its derivative by autograd more often still.
On a CPU attention.py and norm.py therefore do both in few passes, and keep the formula as plain operations: as
their oracle, for other devices, and for every derivative but the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def by_hand(t: Tensor) -> bool:
    """Whether `t` is float32 or wider on a CPU, and torch.func not at work, which differentiates operations alone."""
    transformed = torch._C._are_functorch_transforms_active()  # as torch.autograd.Function asks
    return t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) and not transformed


def first_alone(grad: Tensor) -> bool:
    """In a backward pass: whether nobody wants a graph of it, nor several gradients at once (is_grads_batched)."""
    several = torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad)
    return not torch.is_grad_enabled() and not several


def pulled_back(formula: Callable[..., Tensor], inputs: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """`grad` times d formula / d input for each input that wants it, by autograd: has derivatives of its own."""
    wanted = [isinstance(t, Tensor) and t.requires_grad for t in inputs]
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        sought = [t for t, w in zip(inputs, wanted, strict=True) if w]
        found = iter(torch.autograd.grad(formula(*inputs), sought, grad, create_graph=keep))
    return tuple(next(found) if w else None for w in wanted)
