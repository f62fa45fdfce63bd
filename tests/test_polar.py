"""polar against the singular value decomposition, and its fast ways against the slow one, on any instruction set."""

import pytest
import torch

from constellation.optim import polar as module
from constellation.optim.polar import NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, polar, polar_single, polars

SHAPES = [(2, 5, 5), (1, 7, 3), (3, 3, 7), (2, 16, 4), (2, 24, 90), (1, 90, 24), (1, 1, 9), (4, 1, 1)]
PRECISIONS = ["fp32", "bf16"]


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_singular_values(g: torch.Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> torch.Tensor:
    """The oracle, float64: the polynomial of each singular value, no product of matrices iterated."""
    u, s, vt = torch.linalg.svd(g.double(), full_matrices=False)
    a, b, c = NEWTON_SCHULZ
    s = s / s.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    for _ in range(steps):
        s = s * (a + b * s**2 + c * s**4)
    return u @ torch.diag_embed(s) @ vt


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_polar_keeps_the_singular_vectors_and_brings_the_values_near_one(
    shape: tuple[int, ...], precision: str
) -> None:
    g = matrix(*shape)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    turned = u.mT @ polar(g, precision=precision).float() @ vt.mT
    values = torch.diagonal(turned, dim1=-2, dim2=-1)
    well = s / s.norm(dim=-1, keepdim=True) > 0.02  # five steps lift what is not too small
    assert ((values > 0.6) & (values < 1.3))[well].all()
    assert (turned - torch.diag_embed(values)).abs().max() < 0.05


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 12])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_it_is_the_polynomial_of_the_singular_values(shape: tuple[int, ...], steps: int) -> None:
    g = matrix(*shape)
    torch.testing.assert_close(
        polar(g, steps=steps), by_singular_values(g, steps).float(), atol=2e-5 * 4 ** max(0, steps - 5), rtol=0
    )


@pytest.mark.parametrize("shape", [(2, 24, 90), (1, 90, 24)])
def test_the_gram_side_is_the_plain_iteration(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    g = matrix(*shape)
    fast = polar(g)
    monkeypatch.setattr(module, "GRAM_ASPECT", float("inf"))
    slow = polar(g)
    assert not torch.equal(fast, slow), "the Gram side was not taken"
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_float32_within_its_rounding(shape: tuple[int, ...]) -> None:
    g = matrix(*shape)
    torch.testing.assert_close(polar(g, precision="bf16").float(), polar(g), atol=0.05, rtol=0)
    assert polar(g, precision="bf16").dtype == torch.bfloat16


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("tail", [1e-3, 1e-6, 1e-9])
def test_singular_values_below_the_rounding_of_the_gram_matrix_do_no_harm(tail: float, steps: int) -> None:
    u, _, vt = torch.linalg.svd(matrix(24, 90), full_matrices=False)
    values = torch.where(torch.arange(24) < 12, 1.0, tail)
    g = (u @ torch.diag(values) @ vt)[None]
    found = polar(g, steps=steps)
    assert torch.linalg.svdvals(found).max() < 1.3
    if steps == NEWTON_SCHULZ_STEPS:
        torch.testing.assert_close(found.double(), by_singular_values(g), atol=2e-3, rtol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 6, 6), (1, 4, 20), (1, 20, 4)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_rank_one_matrices_of_any_size_become_of_length_one(
    shape: tuple[int, ...], size: float, precision: str
) -> None:
    found = polar(torch.full(shape, size), precision=precision).float()
    values = torch.linalg.svdvals(found)[0]
    assert 0.6 < values[0] < 1.3 and values[1] < 0.02


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(2, 6, 6), (2, 4, 20), (2, 20, 4)])
def test_zero_matrices_stay_zero_and_harm_no_neighbour(shape: tuple[int, ...], precision: str) -> None:
    g = matrix(*shape)
    g[0] = 0
    found = polar(g, precision=precision)
    assert not found[0].any()
    torch.testing.assert_close(found[1:].float(), polar(g[1:], precision=precision).float(), atol=1e-2, rtol=0)


def test_stacks_that_share_a_short_side_are_each_by_themselves() -> None:
    stacks = [matrix(2, 8, 30, seed=1), matrix(1, 40, 8, seed=2), matrix(3, 8, 8, seed=3), matrix(2, 9, 30, seed=4)]
    for together, stack in zip(polars(stacks), stacks, strict=True):
        torch.testing.assert_close(together, polar(stack), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (6, 6)])
def test_one_matrix_rounds_as_torchs_own_function(shape: tuple[int, int]) -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    g = matrix(*shape)
    assert torch.equal(polar_single(g), _zeropower_via_newtonschulz(g, NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, 1e-7))
    torch.testing.assert_close(polar_single(g, precision="fp32"), polar(g[None])[0], atol=1e-5, rtol=0)
