"""Derivatives written by hand against the formulas they belong to, to every order that somebody may ask for."""

import dataclasses
from typing import Any

import pytest
import torch

from constellation.config import Kernel
from constellation.geometry.fisher import FisherBlock
from constellation.kernel import attention as attention_module
from constellation.kernel import norm as norm_module
from constellation.kernel.attention import ROWS, attention, causal_mask
from constellation.kernel.model import KernelLM
from constellation.kernel.norm import rms_norm
from constellation.kernel.rotary import rotary_table
from constellation.presets import tiny


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def both(length: int, heads: int, unit: bool, dtype: torch.dtype, size: int = 8) -> tuple[Any, Any, tuple[Any, ...]]:
    """attention by hand, by its formula, and what both are functions of; `heads` 1: one factor for all."""
    qkv = drawn(2, length, 3, 3, size, dtype=dtype)
    factor = (drawn(heads, length, seed=1, dtype=dtype).detach().abs() * 5 + 1).requires_grad_()
    cos, sin = (t.to(dtype) for t in rotary_table(Kernel(context=length, width=size, heads=1)))
    mask = causal_mask(length).to(dtype)

    def by_hand(qkv: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return attention(qkv, factor, cos, sin, mask, unit)

    def formula(qkv: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return attention_module._formula(qkv, factor, cos, sin, mask, unit)

    return by_hand, formula, (qkv, factor)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("length", [1, 5, ROWS, ROWS + 1, 2 * ROWS + 7])
def test_attention_by_hand_is_its_formula(
    length: int, heads: int, unit: bool, dtype: torch.dtype, tolerance: float
) -> None:
    by_hand, formula, inputs = both(length, heads, unit, dtype)
    ours, theirs = by_hand(*inputs), formula(*inputs)
    assert type(ours.grad_fn).__name__ == "_ByHandBackward"
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    g = drawn(*ours.shape, seed=2, dtype=dtype).detach()
    for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("unit", [True, False])
def test_attention_by_hand_has_all_derivatives(unit: bool) -> None:
    by_hand, _, inputs = both(6, 3, unit, torch.float64, size=4)
    assert torch.autograd.gradcheck(by_hand, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(by_hand, inputs)


def test_attention_by_hand_holds_where_powers_would_overflow() -> None:
    by_hand, formula, (qkv, factor) = both(ROWS + 5, 1, True, torch.float32)
    large = (factor * 300).detach().requires_grad_()
    torch.testing.assert_close(by_hand(qkv, large), formula(qkv, large), rtol=1e-3, atol=1e-3)


def test_the_norm_by_hand_has_all_derivatives() -> None:
    x, w = drawn(3, 4, 6), drawn(6, seed=1)
    torch.testing.assert_close(rms_norm(x, w, 1e-6), norm_module._formula(x, w, 1e-6))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, w), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, w))


@pytest.mark.parametrize("kind", ["exact", "hessian"])
def test_curvature_of_a_kernel_is_that_of_its_formulas(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(tiny().kernel, width=16, layers=1, hidden=24, vocab_size=272)
    model = KernelLM(config).double()
    tokens = torch.arange(2 * 12).view(2, 12) * 7 % 272
    params = [model.blocks[0].attention.qkv.weight, model.blocks[0].norm_mlp.weight]

    def product() -> torch.Tensor:
        logits = model(tokens).flatten(0, 1)
        block = FisherBlock(logits, params, kind=kind, targets=tokens.roll(-1, 1).flatten())
        return block.matvec(torch.linspace(-1, 1, sum(p.numel() for p in params), dtype=torch.float64))

    ours = product()
    for module in (attention_module, norm_module):
        monkeypatch.setattr(module, "by_hand", lambda t: False)
    torch.testing.assert_close(ours, product(), rtol=1e-9, atol=1e-12)


def test_functions_of_a_kernel_pass_through_torch_func() -> None:
    model, tokens = KernelLM(tiny().kernel), torch.arange(8)[None]
    weight = {"norm.weight": model.norm.weight.detach()}

    def logit(weight: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, weight, (tokens,))[0, -1, 0]

    by_func = torch.func.grad(logit)(weight)["norm.weight"]
    (by_autograd,) = torch.autograd.grad(model(tokens)[0, -1, 0], model.norm.weight)
    torch.testing.assert_close(by_func, by_autograd)
