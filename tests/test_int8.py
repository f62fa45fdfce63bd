"""Products in int8: exact sums, rows that do not know each other, errors no larger than the rounding."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Kernel
from constellation.decoding.int8 import EXACT, LEVELS, Int8Product, quantise
from constellation.decoding.packed import Packed
from constellation.decoding.slots import Run, Slots
from constellation.errors import ConfigError
from constellation.kernel.model import KernelLM

CONFIG = Kernel(vocab_size=400, width=64, layers=3, heads=4, hidden=96, context=64)


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 1000), st.sampled_from([1e-6, 1.0, 1e6]))
@settings(deadline=None, max_examples=40)
def test_levels_are_within_half_a_step_and_the_largest_is_exact(rows, width, seed, scale):
    x = random(rows, width, seed=seed, scale=scale)
    levels, step = quantise(x)
    back = levels.double() * step.double()
    assert ((back - x.double()).abs() <= step.double() * 0.5001).all()
    assert (levels == levels.to(torch.int8)).all() and (levels.abs().amax(-1) == LEVELS).all()


def test_a_row_of_zeros_stays_zero():
    assert Int8Product(random(5, 8))(torch.zeros(3, 8)).abs().max() == 0


@given(st.integers(1, 70), st.sampled_from([(24, 72), (96, 64), (384, 40), (33, 7), (1500, 9)]), st.integers(0, 100))
@settings(deadline=None, max_examples=25)
def test_a_product_is_the_integer_one_scaled(rows, shape, seed):
    inner, outer = shape
    x, weight, bias = random(rows, inner, seed=seed), random(outer, inner, seed=seed + 1), random(outer, seed=seed + 2)
    (xq, xs), (wq, ws) = quantise(x), quantise(weight)
    exact = xq.double() @ wq.double().T * xs.double() * ws.double().T + bias.double()
    product = Int8Product(weight, bias)
    torch.testing.assert_close(product(x).double(), exact, rtol=1e-5, atol=1e-5)
    residual = random(rows, outer, seed=seed + 3)
    torch.testing.assert_close(
        Int8Product(weight).onto(x, residual).double(), exact - bias + residual, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(24, 72), (384, 1152), (1024, 384), (128, 2048)])
def test_rows_do_not_depend_on_how_many_there_are(shape):
    product, x = Int8Product(random(shape[1], shape[0]), torch.zeros(shape[1])), random(70, shape[0], seed=1)
    whole = product(x)
    for count in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 33, 64):
        assert torch.equal(product(x[:count].contiguous()), whole[:count])
        assert torch.equal(product(x[-count:].contiguous()), whole[-count:])


def test_sums_of_the_largest_numbers_are_exact():
    """Where products of bytes are added in 16 bits they saturate: 127 x 127 twice."""
    levels = torch.full((1, EXACT), float(LEVELS))
    product = Int8Product(torch.cat((levels, -levels)))
    assert torch.equal(product(levels), torch.tensor([[1.0, -1.0]]) * LEVELS**2 * EXACT)


def test_the_error_of_a_product_is_that_of_two_roundings():
    x, weight = random(64, 512), random(300, 512, seed=1)
    error = (Int8Product(weight)(x) - x @ weight.T).std() / (x @ weight.T).std()
    assert 0.002 < error < 0.02  # both roundings: 3 sigma / 127 / sqrt(12) each, times sqrt(2)


@pytest.mark.parametrize("changes", [{}, {"metric": "dot", "coupling": "off", "look_back": 0}])
def test_a_kernel_in_int8_says_nearly_what_it_says_in_fp32(changes):
    model, tokens = KernelLM(dataclasses.replace(CONFIG, **changes), seed=1), list(range(20, 70))
    found = {}
    for precision in ("fp32", "int8"):
        slots = Slots(Packed(model, precision), 4)
        runs = [Run(0, 50, 2, False, 64)]
        found[precision] = slots.logits(slots.read(tokens, [400, *tokens[:-1]], range(50), [2] * 50, runs))
    exact = model(torch.tensor([tokens]))[0].detach()
    torch.testing.assert_close(found["fp32"], exact, rtol=1e-4, atol=1e-4)
    lost = torch.log_softmax(exact, -1) - torch.log_softmax(found["int8"], -1)
    divergence = (exact.softmax(-1) * lost).sum(-1).mean()  # bits lost if the kernel were right
    assert 0 < divergence < 0.002


def test_another_precision_is_refused():
    with pytest.raises(ConfigError, match=r"precision='fp8'.*fp32, int8"):
        Packed(KernelLM(CONFIG), "fp8")
