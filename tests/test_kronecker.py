"""KroneckerNG against the singular value decomposition, Shampoo's formula and torch's Muon."""

import dataclasses

import pytest
import torch

from constellation.errors import ConfigError
from constellation.optim import build
from constellation.optim.kronecker import KroneckerNG, polar
from constellation.presets import tiny


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (2, 16, 4)])
def test_polar_keeps_the_singular_vectors_and_brings_the_values_near_one(shape: tuple[int, ...]) -> None:
    g = matrix(*shape)
    g = g if g.dim() == 3 else g[None]
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    values = torch.diagonal(u.mT @ polar(g).float() @ vt.mT, dim1=-2, dim2=-1)
    well = s / s.norm(dim=-1, keepdim=True) > 0.02  # five steps lift what is not too small
    assert ((values > 0.6) & (values < 1.3))[well].all()
    rest = u.mT @ polar(g).float() @ vt.mT - torch.diag_embed(values)
    assert rest.abs().max() < 0.05


def test_the_exact_polar_factor_is_the_natural_gradient_of_shampoos_fisher() -> None:
    g = matrix(4, 6).double()
    left, right = g @ g.T, g.T @ g

    def power(m: torch.Tensor, p: float) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(m)
        return vectors @ torch.diag(torch.where(values > 1e-9, values.clamp(min=1e-9) ** p, 0)) @ vectors.T

    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    assert torch.allclose(power(left, -0.25) @ g @ power(right, -0.25), u @ vt, atol=1e-8)


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_it_is_torchs_muon(shape: tuple[int, int]) -> None:
    ours, theirs = matrix(*shape).requires_grad_(), matrix(*shape).requires_grad_()
    a = KroneckerNG([ours], lr=0.05, momentum=0.9, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.05, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for i in range(10):
        ours.grad, theirs.grad = matrix(*shape, seed=i + 1), matrix(*shape, seed=i + 1)
        a.step()
        b.step()
    assert torch.allclose(ours, theirs, atol=5e-3)  # bf16 products in another order


def test_matrices_of_one_shape_do_not_mix() -> None:
    together, apart = (
        [matrix(4, 3, seed=i).requires_grad_() for i in range(3)],
        [matrix(4, 3, seed=i).requires_grad_() for i in range(3)],
    )
    for i, (a, b) in enumerate(zip(together, apart, strict=True)):
        a.grad, b.grad = matrix(4, 3, seed=9 + i), matrix(4, 3, seed=9 + i)
        KroneckerNG([b], lr=0.1).step()
    KroneckerNG(together, lr=0.1).step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(together, apart, strict=True))


def test_a_step_is_as_long_as_one_of_adam() -> None:
    w = torch.zeros(64, 32, requires_grad=True)
    w.grad = matrix(64, 32)
    KroneckerNG([w], lr=1.0, momentum=0.0).step()
    assert 0.1 < float(w.detach().square().mean().sqrt()) < 0.35  # 0.2 by design


@pytest.mark.parametrize(
    "grad", [torch.zeros(4, 3), torch.full((4, 3), 1e-30), torch.full((4, 3), 1e30), torch.ones(4, 3)]
)
def test_zero_tiny_huge_and_rank_one_gradients_leave_finite_weights(grad: torch.Tensor) -> None:
    w = torch.ones(4, 3, requires_grad=True)
    optimizer = KroneckerNG([w], lr=0.1)
    w.grad = grad
    optimizer.step()
    assert torch.isfinite(w).all()
    assert torch.equal(w, torch.ones(4, 3)) == bool((grad == 0).all())


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"params": [torch.zeros(3, requires_grad=True)]}, "method=diagonal"),
        ({"params": [torch.zeros(4, 3, requires_grad=True)], "method": "kfac"}, "kfac"),
    ],
)
def test_impossible_groups_are_named(group: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        KroneckerNG([group])


def test_build_gives_every_parameter_to_one_group_and_embeddings_to_the_diagonal() -> None:
    from constellation.kernel.model import KernelLM

    model = KernelLM(tiny().kernel)
    kronecker, diagonal = build(dataclasses.replace(tiny().optim, name="kronecker_ng"), model).param_groups
    seen = [id(p) for g in (kronecker, diagonal) for p in g["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    assert len(kronecker["params"]) == 4 * len(model.blocks)
    assert id(model.embedding.weight) in {id(p) for p in diagonal["params"]}
