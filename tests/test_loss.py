"""The chunked cross-entropy of a linear head against F.cross_entropy on whole logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.kernel.loss import linear_cross_entropy


def problem(rows, width, vocabulary, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = (scale * torch.randn(vocabulary, width, generator=generator, dtype=dtype)).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


def value_and_gradients(loss, hidden, weight):
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
def test_value_and_both_gradients_equal_the_naive_ones(dtype, tolerance, chunk):
    hidden, weight, targets = problem(45, 16, 97, dtype)
    fast = value_and_gradients(linear_cross_entropy(hidden, weight, targets, chunk), hidden, weight)
    naive = value_and_gradients(F.cross_entropy(hidden @ weight.T, targets), hidden, weight)
    for a, b in zip(fast, naive):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@given(st.integers(1, 20), st.integers(1, 6), st.integers(2, 30), st.integers(1, 25), st.floats(0.1, 30))
@settings(deadline=None, max_examples=60)
def test_any_shape_any_chunk_any_scale(rows, width, vocabulary, chunk, scale):
    hidden, weight, targets = problem(rows, width, vocabulary, torch.float64, scale)
    fast = value_and_gradients(linear_cross_entropy(hidden, weight, targets, chunk), hidden, weight)
    naive = value_and_gradients(F.cross_entropy(hidden @ weight.T, targets), hidden, weight)
    for a, b in zip(fast, naive):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradients_scale_with_what_comes_after_the_loss():
    hidden, weight, targets = problem(9, 4, 11, torch.float64)
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, 4), (hidden, weight))
    thrice = torch.autograd.grad(3 * linear_cross_entropy(hidden, weight, targets, 4), (hidden, weight))
    for a, b in zip(once, thrice):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_target_whose_probability_underflows_costs_its_logit_gap(dtype):
    hidden = torch.ones(2, 1, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[0.0], [2000.0]], dtype=dtype, requires_grad=True)
    loss, grad_hidden, grad_weight = value_and_gradients(
        linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), 8), hidden, weight
    )
    assert loss == 1000  # (2000 + 0) / 2
    assert grad_hidden[:, 0].tolist() == [1000, 0]
    assert grad_weight[:, 0].tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("vocabulary", [2, 272, 4096])
def test_uniform_logits_cost_ln_v(vocabulary):
    loss = linear_cross_entropy(
        torch.randn(3, 5, 8), torch.zeros(vocabulary, 8), torch.zeros(3, 5, dtype=torch.int64), 4
    )
    assert loss.item() == pytest.approx(math.log(vocabulary), rel=1e-6)


def test_under_autocast_the_products_are_bf16_and_the_gradients_keep_their_dtype():
    hidden, weight, targets = problem(64, 32, 100, torch.float32, scale=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, 16)
    exact = F.cross_entropy(hidden @ weight.T, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    assert loss.item() != exact.item()
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight))):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.01 * b.abs().max().item())
