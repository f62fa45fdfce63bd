"""Curvature diagonals against dense Hessians and Jacobians; errors that mean what they say; units that do not mix."""

import math

import pytest
import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.optim import curvature
from constellation.optim.curvature import (
    Curvature,
    blend,
    ema_grad2,
    empirical_fisher_diagonal,
    from_likelihood,
    gauss_newton_diagonal,
    hutchinson_diagonal,
)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(dimension: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric indefinite H and a point."""
    a = rand(dimension, dimension, seed=seed)
    return a + a.T, rand(dimension, seed=seed + 1).requires_grad_()


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(rand(*s, seed=i)) for i, s in enumerate([(5, 4), (4, 3)]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first) @ self.second


def net() -> tuple[Net, list[Tensor], Tensor, Tensor]:
    model = Net()
    return model, list(model.parameters()), rand(7, 5, seed=9), torch.arange(7) % 3


def jacobian(outputs: Tensor, params: list[Tensor]) -> Tensor:
    rows = [torch.autograd.grad(o, params, retain_graph=True, materialize_grads=True) for o in outputs.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def z_mean_square(estimate: Curvature, truth: Tensor) -> float:
    """Mean of ((estimate - truth) / stderr)^2 where there is noise; near 1 when the errors are honest."""
    error, stderr = flat(estimate.diagonal) - truth, flat(estimate.stderr)
    assert (error[stderr == 0].abs() < 1e-12).all()
    return float((error / stderr)[stderr > 0].square().mean())


@pytest.mark.parametrize("seed", range(3))
def test_hutchinson_is_the_hessian_diagonal_within_its_standard_error(seed: int) -> None:
    h, x = quadratic(40, seed)
    estimate = hutchinson_diagonal(0.5 * x @ h @ x, [x], probes=256, seed=seed)
    assert 0.4 < z_mean_square(estimate, h.diag()) < 2.0
    assert (h.diag() < 0).any() and (estimate.diagonal[0][h.diag() < -3] < 0).all()  # it may be negative
    expected = ((h.square().sum(1) - h.diag().square()) / 256).sqrt()
    assert torch.allclose(estimate.stderr[0], expected, rtol=0.3)


def test_hutchinson_is_exact_for_a_diagonal_hessian_and_zero_for_a_linear_loss() -> None:
    x = rand(5).requires_grad_()
    scales = torch.tensor([1e-4, 1.0, 3.0, 1e5, -2.0], dtype=torch.float64)
    estimate = hutchinson_diagonal(0.5 * (scales * x * x).sum(), [x], probes=2)
    assert torch.allclose(estimate.diagonal[0], scales, rtol=1e-12)
    assert estimate.stderr[0].abs().max() < 1e-9
    linear = hutchinson_diagonal((scales * x).sum(), [x], probes=2)
    assert torch.equal(linear.diagonal[0], torch.zeros(5, dtype=torch.float64))


def test_the_hessian_of_a_network_is_not_its_gauss_newton_matrix() -> None:
    model, params, x, y = net()
    logits = model(x)
    loss = torch.nn.functional.cross_entropy(logits, y)
    gn = flat(gauss_newton_diagonal(logits, params, probes=None).diagonal)
    hessian = flat(hutchinson_diagonal(loss, params, probes=500).diagonal)
    assert (hessian - gn).norm() > 0.1 * gn.norm()


def test_exact_gauss_newton_equals_the_dense_matrix_for_softmax() -> None:
    model, params, x, _ = net()
    logits = model(x)
    j = jacobian(logits, params).view(7, 3, -1)
    p = torch.softmax(logits.detach(), -1)
    dense = torch.einsum("ncd,nce,neh->dh", j, torch.diag_embed(p) - p[:, :, None] * p[:, None, :], j) / 7
    exact = gauss_newton_diagonal(logits, params, probes=None)
    assert torch.allclose(flat(exact.diagonal), dense.diag(), rtol=1e-12, atol=1e-15)
    assert (flat(exact.stderr) == 0).all() and exact.probes == 21
    sampled = gauss_newton_diagonal(logits, params, probes=400, seed=1)
    assert 0.3 < z_mean_square(sampled, dense.diag()) < 3.0 and (flat(sampled.diagonal) >= 0).all()


def test_exact_gauss_newton_equals_the_dense_matrix_for_weighted_squares() -> None:
    model, params, x, _ = net()
    residuals, weights = model(x) - 1.0, rand(7, 3, seed=4).square()
    dense = (weights.flatten()[:, None] * jacobian(residuals, params).square()).sum(0)
    exact = gauss_newton_diagonal(residuals, params, likelihood="squares", weights=weights, probes=None)
    assert torch.allclose(flat(exact.diagonal), dense, rtol=1e-12)
    sampled = gauss_newton_diagonal(residuals, params, likelihood="squares", weights=weights, probes=400)
    assert 0.3 < z_mean_square(sampled, dense) < 3.0


def test_gauss_newton_is_the_hessian_of_linear_softmax() -> None:
    w = rand(4, 3).requires_grad_()
    logits = rand(6, 4, seed=2) @ w
    hessian = torch.autograd.functional.hessian(
        lambda v: torch.nn.functional.cross_entropy(rand(6, 4, seed=2) @ v, torch.arange(6) % 3), w.detach()
    )
    exact = gauss_newton_diagonal(logits, [w], probes=None).diagonal[0]
    assert torch.allclose(exact.flatten(), hessian.reshape(12, 12).diag(), rtol=1e-10)


@pytest.mark.parametrize("elements", [1, 100, 10**6])
def test_the_empirical_fisher_is_the_mean_square_of_row_gradients(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curvature, "CHUNK_ELEMENTS", elements)
    model, params, x, y = net()
    losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    squares = jacobian(losses, params).square()
    fisher = empirical_fisher_diagonal(losses, params)
    assert torch.allclose(flat(fisher.diagonal), squares.mean(0), rtol=1e-12)
    assert torch.allclose(flat(fisher.stderr), squares.std(0) / math.sqrt(7), rtol=1e-9, atol=1e-16)
    assert fisher.probes == 7


def test_the_average_of_squares_is_unbiased_with_an_honest_error() -> None:
    decay, steps, scale = 0.9, 40, torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64).repeat(200)
    second, fourth = (torch.zeros(600, dtype=torch.float64) for _ in range(2))
    for t in range(steps):
        g = scale * rand(600, seed=t)
        second.mul_(decay).add_(g**2, alpha=1 - decay)
        fourth.mul_(decay).add_(g**4, alpha=1 - decay)
    estimate = ema_grad2([second], [fourth], steps, decay)
    z = (estimate.diagonal[0] - scale**2) / estimate.stderr[0]
    assert abs(float((estimate.diagonal[0] / scale**2).mean()) - 1) < 0.05
    assert 0.7 < float(z.square().median()) / 0.455 < 2.0  # chi-square of one degree has median .455; tails are heavy


def test_one_step_has_no_error_and_none_is_refused() -> None:
    one = torch.ones(2)
    assert torch.isinf(ema_grad2([0.1 * one], [0.1 * one], 1, 0.9).stderr[0]).all()
    assert torch.allclose(ema_grad2([0.1 * one], [0.1 * one], 1, 0.9).diagonal[0], one)
    with pytest.raises(ConfigError, match="steps=0"):
        ema_grad2([one], [one], 0, 0.9)


@pytest.mark.parametrize("kind", ["hutchinson_hessian", "gauss_newton"])
def test_probes_come_from_the_seed_alone(kind: str) -> None:
    model, params, x, y = net()
    torch.manual_seed(5)
    first = from_likelihood(kind, model(x), y, params, probes=3, seed=11)
    torch.manual_seed(6)
    again = from_likelihood(kind, model(x), y, params, probes=3, seed=11)
    other = from_likelihood(kind, model(x), y, params, probes=3, seed=12)
    assert torch.equal(flat(first.diagonal), flat(again.diagonal))
    assert not torch.equal(flat(first.diagonal), flat(other.diagonal)) and first.seed == 11 and first.probes == 3


@pytest.mark.parametrize("kind", ["hutchinson_hessian", "gauss_newton", "empirical_fisher"])
def test_a_diagonal_carries_its_kind_and_unit_and_float32_under_bfloat16(kind: str) -> None:
    model, _, x, y = net()
    model = model.to(torch.bfloat16)
    found = from_likelihood(kind, model(x.bfloat16()), y, list(model.parameters()), probes=4, seed=0)
    assert found.kind == kind and found.units == curvature.UNITS[kind]
    assert {t.dtype for t in found.diagonal + found.stderr} == {torch.float32}


def test_likes_blend_and_unlikes_do_not() -> None:
    model, params, x, y = net()
    made = {k: from_likelihood(k, model(x), y, params, probes=4, seed=0) for k in curvature.UNITS if k != "ema_grad2"}
    both = blend(made["hutchinson_hessian"], made["gauss_newton"], 0.25)
    expected = 0.25 * flat(made["hutchinson_hessian"].diagonal) + 0.75 * flat(made["gauss_newton"].diagonal)
    assert torch.allclose(flat(both.diagonal), expected) and "0.25 hutchinson_hessian" in both.kind
    assert torch.equal(flat(blend(both, made["gauss_newton"], 1.0).stderr), flat(both.stderr))
    with pytest.raises(ConfigError, match="loss\\^2 / theta\\^2"):
        blend(made["hutchinson_hessian"], made["empirical_fisher"], 0.5)
    with pytest.raises(ConfigError, match="weight=2"):
        blend(both, both, 2.0)


def test_impossible_requests_are_named() -> None:
    model, params, x, _ = net()
    with pytest.raises(ConfigError, match="at least 2"):
        hutchinson_diagonal(model(x).sum(), params, probes=1)
    with pytest.raises(ConfigError, match="poisson"):
        gauss_newton_diagonal(model(x), params, likelihood="poisson")
    with pytest.raises(ConfigError, match="targets"):
        from_likelihood("empirical_fisher", model(x), None, params, probes=2, seed=0)
