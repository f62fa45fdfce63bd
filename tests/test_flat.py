"""Descent on a flat theta: replayed from its trace, second order where it says so, worth gradients to a sampler."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from constellation.errors import ConfigError
from constellation.optim.flat import curvature, descend, inverse_mass, log_prob


def quadratic(condition: float = 1e4, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(A, minimum) of 1/2 |A (theta - minimum)|^2."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    widths = torch.logspace(0, math.log10(condition) / 2, size, dtype=torch.float64)
    return widths[:, None] * turn, torch.randn(size, generator=generator, dtype=torch.float64)


def rosenbrock_residuals(theta: Tensor) -> Tensor:
    return torch.stack([10 * (theta[1] - theta[0] ** 2), 1 - theta[0]])


def rosenbrock(theta: Tensor) -> Tensor:
    return rosenbrock_residuals(theta).square().sum() / 2


START = torch.tensor([-1.2, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("tier", ["simple", "advanced"])
def test_the_trace_replays_the_descent(tier: str) -> None:
    found = descend(rosenbrock, START, tier=tier, steps=12, lr=0.05)
    trace = found.trace()
    assert len(trace["thetas"]) == len(trace["losses"]) == len(trace["steps"]) + 1
    for theta, loss, grad in zip(trace["thetas"], trace["losses"], trace["grads"], strict=True):
        own = theta.clone().requires_grad_()
        value = rosenbrock(own)
        value.backward()
        assert torch.equal(value.detach(), loss) and own.grad is not None and torch.equal(own.grad, grad)
    step = -trace["scales"] * trace["grads"][:-1] if tier == "simple" else trace["steps"]
    assert torch.equal(trace["thetas"][:-1] + step, trace["thetas"][1:]) and torch.equal(
        found.theta, trace["thetas"][-1]
    )


def test_the_first_simple_step_is_the_sign_of_the_gradient_times_the_rate() -> None:
    found = descend(rosenbrock, START, lr=0.1, steps=1)
    torch.testing.assert_close(found.steps[0], -0.1 * found.grads[0].sign(), rtol=1e-6, atol=0)


@given(st.floats(0.0, 8.0), st.integers(0, 20))
def test_the_advanced_tier_does_not_see_the_condition_of_a_quadratic(power: float, seed: int) -> None:
    a, minimum = quadratic(10**power, seed=seed)

    def residuals(theta: Tensor) -> Tensor:
        return a @ (theta - minimum)

    found = descend(
        lambda t: residuals(t).square().sum() / 2, torch.zeros_like(minimum), tier="advanced", residuals=residuals,
        steps=40, damping=1e-6, tolerance=1e-6,
    )  # fmt: skip
    assert found.outcome == "converged" and len(found.steps) <= 12
    torch.testing.assert_close(found.theta, minimum, rtol=0, atol=1e-5)


@pytest.mark.parametrize("residuals", [None, rosenbrock_residuals])
def test_the_advanced_tier_walks_the_curved_valley_downhill_all_the_way(residuals: object) -> None:
    found = descend(rosenbrock, START, tier="advanced", residuals=residuals, steps=100)  # type: ignore[arg-type]
    assert found.outcome == "converged" and bool((found.losses.diff() <= 0).all())
    torch.testing.assert_close(found.theta, torch.ones(2, dtype=torch.float64))


def test_negative_curvature_is_left_downhill() -> None:
    def saddle(theta: Tensor) -> Tensor:
        return theta[0] ** 2 - theta[1] ** 2 + theta[1] ** 4

    found = descend(saddle, torch.tensor([1.0, 1e-3], dtype=torch.float64), tier="advanced")
    assert found.outcome == "converged" and float(found.losses[-1]) == pytest.approx(-0.25)


def test_a_low_rank_takes_the_stiff_directions_first() -> None:
    a, minimum = quadratic(1e6)
    few = descend(lambda t: (a @ (t - minimum)).square().sum() / 2, torch.zeros_like(minimum), tier="advanced",
                  residuals=lambda t: a @ (t - minimum), rank=2, steps=5, damping=1e2)  # fmt: skip
    stiff = a.mT @ a
    vectors = torch.linalg.eigh(stiff).eigenvectors[:, -2:]
    assert float((vectors.mT @ (few.theta - minimum)).norm()) < 1e-2 * float((vectors.mT @ minimum).norm())


def test_curvature_is_the_closed_form() -> None:
    a, minimum = quadratic(100.0)
    at = torch.zeros_like(minimum)
    exact = a.mT @ a
    torch.testing.assert_close(curvature(lambda t: (a @ (t - minimum)).square().sum() / 2, at), exact)
    torch.testing.assert_close(curvature(lambda t: t.sum(), at, lambda t: a @ (t - minimum)), exact)
    torch.testing.assert_close(inverse_mass(exact, damping=1e-12) @ exact, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(log_prob(lambda t: t.sum(), 2.0)(torch.ones(4)), torch.tensor(-2.0))


@pytest.mark.parametrize(("wrong", "says"), [
    ({"tier": "best"}, "simple or advanced"), ({"steps": 0}, "steps=0"), ({"lr": 0.0}, "lr=0.0"),
    ({"rank": 1}, "rank=1"),
    ({"rank": 3, "tier": "advanced"}, "from 1 to 2"), ({"damping": -1.0}, r"damping=-1\.0"),
])  # fmt: skip
def test_wrong_settings_are_named(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        descend(rosenbrock, START, **wrong)  # type: ignore[arg-type]


def test_a_loss_that_cannot_be_descended_is_told() -> None:
    with pytest.raises(ConfigError, match="not finite"):
        descend(lambda t: t.sum() / 0, START)
    with pytest.raises(ConfigError, match="one number"):
        descend(lambda t: t, START)
    with pytest.raises(ConfigError, match="flat vector"):
        descend(rosenbrock, START[None])
    with pytest.raises(ConfigError, match="temperature"):
        log_prob(rosenbrock, 0.0)


def test_the_curvature_is_worth_gradients_to_a_sampler_and_its_moments_are_unbiased() -> None:
    pytest.importorskip("pyro", reason="needs the extra sample")
    from constellation.experiments.sample_gaussian import effective, sample, target

    residuals, mean, covariance = target(size=4, condition=100.0)
    density = log_prob(lambda t: residuals(t).square().sum() / 2)
    mass = inverse_mass(curvature(lambda t: -density(t), mean, residuals), damping=1e-12)
    torch.testing.assert_close(mass, covariance)
    worth = {}
    for name, own in (("identity", None), ("gauss_newton", mass)):
        draws, taken = sample(density, mean, own, samples=300, warmup=50, seed=1)
        worth[name] = effective(draws) / taken
        if own is not None:
            count = effective(draws)
            assert float(((draws.mean(0) - mean).abs() / (covariance.diagonal() / count).sqrt()).max()) < 4
            assert float((draws.var(0) / covariance.diagonal() - 1).abs().max()) < 4 * math.sqrt(2 / count)
    assert worth["gauss_newton"] > 2 * worth["identity"]
