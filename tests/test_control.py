"""Controllers on plants, programs and losses whose answers are known."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from constellation.control.dual import PrimalDual
from constellation.control.governor import RateGovernor
from constellation.control.gradients import GradientBalance
from constellation.control.load import LossFreeBalance
from constellation.control.precision import LearnedPrecisions
from constellation.control.update import copied, update_ratio
from constellation.control.velocity import VelocityPI
from constellation.errors import ConfigError

# -- velocity-form PI --------------------------------------------------------------------------------------------------


def plant(pi, target: float, steps: int, parts: int = 1, gain: float = 0.8, keep: float = 0.9, start: float = 0.0):
    """A first-order plant y' = keep y + (1 - keep) gain u, in `parts` batches a step; the outputs y and u."""
    y, ys, us = start, [], []
    for _ in range(steps):
        for _ in range(parts):
            share = keep ** (1 / parts)
            y = share * y + (1 - share) * gain * pi.value
            pi.update(target - y, 1 / parts)
        ys.append(y)
        us.append(pi.value)
    return np.array(ys), np.array(us)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.floats(0, 0.95), st.floats(0, 3))
def test_without_bounds_the_increments_add_up_to_the_position_form(errors, nu, kp) -> None:
    """Oracle: u = u0 + K_I sum e + K_P (xi_T - xi_0), with xi by its definition."""
    pi = VelocityPI(1.0, 0.3, kp, nu, low=-math.inf, high=math.inf)
    for e in errors:
        pi.update(e)
    xi = errors[0]
    for e in errors[1:]:
        xi = nu * xi + (1 - nu) * e
    assert pi.value == pytest.approx(1.0 + 0.3 * sum(errors) + kp * (xi - errors[0]), abs=1e-9)


@pytest.mark.parametrize("target", [0.2, 1.0, 3.0])
def test_a_known_plant_settles_and_is_never_at_a_bound(target: float) -> None:
    pi = VelocityPI(1.0, 0.1, 0.5, high=10.0)
    y, u = plant(pi, target, 300)
    assert abs(y[-1] - target) < 1e-3 and abs(u[-1] - target / 0.8) < 1e-2
    assert ((u > 0) & (u < 10)).all()
    settled = np.abs(y - target) < 0.02 * target
    assert settled[150:].all()


def test_a_sum_of_errors_added_to_the_output_saturates_where_this_one_settles() -> None:
    """The original's lambda += kp e + ki sum(e): a double integrator."""
    y, total, u, outputs, ys = 0.0, 0.0, 1.0, [], []
    for _ in range(1000):
        y = 0.9 * y + 0.1 * 0.8 * u
        total += 1.0 - y
        u = min(10.0, max(0.0, u + 0.5 * (1.0 - y) + 0.1 * total))
        outputs.append(u)
        ys.append(y)
    bad = np.array(outputs)
    assert ((bad == 0) | (bad == 10)).mean() > 0.25 and np.ptp(ys[-300:]) > 1, "it swings from bound to bound for good"
    _, good = plant(VelocityPI(1.0, 0.1, 0.5, high=10.0), 1.0, 300)
    assert not ((good == 0) | (good == 10)).any()


@pytest.mark.parametrize("nu", [0.0, 0.9])
def test_the_number_of_batches_does_not_matter(nu: float) -> None:
    """Per step of time the same trajectory, up to the discretisation of the plant's loop."""
    runs = [plant(VelocityPI(1.0, 0.05, 0.1, nu, high=10.0), 1.0, 200, parts)[0] for parts in (4, 16, 64)]
    assert np.abs(runs[1] - runs[2]).max() < 0.02 and np.abs(runs[0] - runs[2]).max() < 0.1
    assert abs(runs[0][-1] - runs[2][-1]) < 1e-3


@pytest.mark.parametrize("stuck", [30, 1000, 100_000])
def test_it_leaves_its_bound_at_the_first_error_of_the_other_sign_however_long_it_was_there(stuck: int) -> None:
    pi = VelocityPI(1.0, 0.1, 0.5, high=5.0)
    for _ in range(stuck):
        pi.update(2.0)
    assert pi.value == 5.0 and pi.at_bound
    assert pi.update(-0.1) < 5.0
    steps = next(n for n in range(1, 100) if pi.update(-1.0) < 2.5)
    assert steps <= 25


def test_it_goes_on_from_its_state_as_json() -> None:
    a = VelocityPI(1.0, 0.1, 0.5, 0.7)
    for e in (1.0, -0.4):
        a.update(e)
    b = VelocityPI(1.0, 0.1, 0.5, 0.7)
    b.load_state(json.loads(json.dumps(a.state())))
    assert [a.update(e) for e in (0.3, 0.2)] == [b.update(e) for e in (0.3, 0.2)]


@pytest.mark.parametrize("bad", [{"value": 2.0, "high": 1.0}, {"value": 0.0, "smoothing": 1.0},
                                 {"value": 0.0, "integral": -1.0}])  # fmt: skip
def test_a_controller_that_cannot_be_is_refused(bad) -> None:
    with pytest.raises(ConfigError, match="VelocityPI"):
        VelocityPI(**bad)
    with pytest.raises(ConfigError, match="the error is nan"):
        VelocityPI(0.0).update(math.nan)


# -- primal-dual -------------------------------------------------------------------------------------------------------


def quadratic_program(limits, steps: int, most: float = 1e4, proportional: float = 0.0):
    """min |x - (2, 1)|^2 / 2 with x0 <= limits[0], x0 + x1 <= limits[1]."""
    x, goal = np.zeros(2), np.array([2.0, 1.0])
    rows = np.array([[1.0, 0.0], [1.0, 1.0]])
    dual = PrimalDual({"a": limits[0], "b": limits[1]}, rate=0.05, most=most, proportional=proportional)
    for _ in range(steps):
        lam = np.array([dual.multipliers["a"], dual.multipliers["b"]])
        x = x - 0.1 * (x - goal + lam @ rows)
        dual.update(dict(zip("ab", rows @ x)))
    lam = np.array([dual.multipliers["a"], dual.multipliers["b"]])
    return x, dual, float(np.linalg.norm(x - goal + lam @ rows))


@pytest.mark.parametrize("proportional", [0.0, 5.0])
@pytest.mark.parametrize(
    ("limits", "kkt"),
    [((1.0, 1.5), (0.5, 0.5)), ((5.0, 2.0), (0.0, 0.5)), ((1.5, 9.0), (0.5, 0.0)), ((5.0, 9.0), (0.0, 0.0))],
)
def test_on_a_convex_program_the_duals_reach_the_kkt_multipliers(limits, kkt, proportional: float) -> None:
    """Worked by hand: x = goal - lambda^T A on the active rows."""
    _, dual, gradient = quadratic_program(limits, 4000, proportional=proportional)
    assert dual.multipliers["a"] == pytest.approx(kkt[0], abs=1e-3)
    assert dual.multipliers["b"] == pytest.approx(kkt[1], abs=1e-3)
    report = dual.report(gradient)
    assert report.residual < 1e-3 and report.infeasible == ()


def test_what_cannot_be_met_is_reported_with_its_multiplier_at_the_bound() -> None:
    dual = PrimalDual({"x squared": -1.0, "x": 5.0}, rate=0.1, most=3.0)
    x = 1.0
    for _ in range(500):
        lam = dual.multipliers
        x -= 0.1 * (2 * lam["x squared"] * x + lam["x"])
        dual.update({"x squared": x * x, "x": x})
    report = dual.report()
    assert report.infeasible == ("x squared",) and report.held["x squared"].multiplier == 3.0
    assert "INFEASIBLE" in str(report) and "KKT residual" in str(report) and report.residual >= 1.0
    with pytest.raises(ConfigError, match="'x squared' was measured as None"):
        dual.update({"x": 0.0})


# -- learned precisions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [0.01, 0.3, 2.0])
def test_a_learned_variance_is_the_mean_square(variance: float) -> None:
    precisions = LearnedPrecisions(("a",)).double()
    optimizer = torch.optim.LBFGS(precisions.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def loss():
        optimizer.zero_grad()
        found = precisions({"a": torch.tensor(50 * variance, dtype=torch.float64)}, {"a": 50.0})
        found.backward()
        return found

    optimizer.step(loss)
    assert float(precisions.log_variance("a").detach().exp()) == pytest.approx(variance, rel=1e-4)


def test_a_loss_of_zero_leaves_the_objective_and_the_weight_bounded() -> None:
    """exp(-s) L + s goes to minus infinity there."""
    precisions = LearnedPrecisions(("a",), low=-4.0, high=4.0)
    optimizer = torch.optim.Adam(precisions.parameters(), 0.5)
    for _ in range(500):
        optimizer.zero_grad()
        loss = precisions({"a": torch.zeros(())}, {"a": 10.0})
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) >= 10 * -4.0 / 2 and precisions.weights()["a"] <= 0.5 * math.exp(4.0) * (1 + 1e-6)
    assert LearnedPrecisions(("a",), start=0.25).log_variance("a").exp().item() == pytest.approx(0.25, rel=1e-5)


# -- gradient balance, update ratio ------------------------------------------------------------------------------------


def test_balanced_gradients_have_the_wanted_share_whatever_their_scale() -> None:
    for scale in (1e-2, 1.0, 30.0):
        balance = GradientBalance(share=0.25, memory=0.5)
        for _ in range(50):
            weight = balance.update(2.0, 3.0 * scale)
        assert weight * 3.0 * scale == pytest.approx(0.25 * 2.0)
    assert GradientBalance().update(1.0, 0.0) == 1.0, "a term without gradient changes nothing"
    assert GradientBalance(high=10.0).update(1.0, 1e-9) == 10.0


def test_the_true_ratio_binds_where_a_gradient_step_s_does_not() -> None:
    """Adam moves by about its rate whatever the gradient's scale."""
    layer = torch.nn.Linear(20, 20, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    (layer(torch.randn(8, 20, generator=torch.Generator().manual_seed(0))).square().mean() * 1e-6).backward()
    before = copied(list(layer.parameters()))
    optimizer.step()
    found = update_ratio(before, list(layer.parameters()))
    weight = layer.weight.detach()
    assert found == pytest.approx(float((weight - before[0]).norm() / before[0].norm()), rel=1e-6)
    assert layer.weight.grad is not None
    assert found > 0.1 and float(0.1 * layer.weight.grad.norm() / before[0].norm()) < 1e-6


# -- governor ----------------------------------------------------------------------------------------------------------


def descend(rate, steps: int = 2000, seed: int = 0, governor: RateGovernor | None = None, noise: float = 0.3):
    """SGD on 0.5 x^T diag(h) x in 20 dimensions with noisy gradients; the mean of the last losses' fall, and rates."""
    rng = np.random.default_rng(seed)
    h, x = np.geomspace(0.05, 1.0, 20), np.ones(20)
    losses, rates = [], []
    for step in range(steps):
        loss = 0.5 * float(h @ (x * x)) + 0.01 * rng.standard_normal()
        lr = rate if governor is None else governor.rate(step, rate)
        losses.append(0.5 * float(h @ (x * x)))
        x = x - lr * (h * x + noise * rng.standard_normal(20) * np.sqrt(h))
        if governor is not None:
            governor.observe({"loss_nats": loss})
        rates.append(lr)
    return np.array(losses), np.array(rates)


def test_on_a_noisy_quadratic_it_loses_at_most_a_tenth_to_the_tuned_constant() -> None:
    grid = np.geomspace(0.01, 1.0, 15)
    means = [np.mean([descend(r, seed=s)[0].mean() for s in range(5)]) for r in grid]
    tuned = grid[int(np.argmin(means))]
    governed = np.mean(
        [descend(tuned, seed=s, governor=RateGovernor(patience=20, plateau=400))[0].mean() for s in range(5)]
    )
    assert governed <= 1.1 * min(means)


def test_a_rate_that_diverges_is_brought_back() -> None:
    wild = descend(2.5, 400)[0]
    losses, rates = descend(2.5, 400, governor=RateGovernor(patience=5))
    assert not wild[-1] < 1e3 and losses[-100:].mean() < 10 and rates[-1] < 2.0


@given(st.floats(-1000, 1000))
def test_a_constant_added_to_the_loss_changes_no_rate(constant: float) -> None:
    rng = np.random.default_rng(1)
    losses = np.round(2 + np.exp(-np.arange(200) / 50) + 0.1 * rng.standard_normal(200), 6)
    losses[120] += 5
    found = []
    for shift in (0.0, round(constant)):
        governor = RateGovernor(plateau=30, patience=3)
        rates = []
        for loss in losses:
            governor.observe({"loss_nats": float(loss + shift)})
            rates.append(governor.factor)
        found.append(rates)
    assert found[0] == pytest.approx(found[1], rel=1e-9) and min(found[0]) < 1


def test_a_weighted_term_that_a_controller_moves_is_not_its_signal() -> None:
    """What was read as a spike in the original: lambda H grows while the task's loss falls."""
    calm = 1 + np.exp(-np.arange(300) / 100)
    rng = np.random.default_rng(0)
    governor = RateGovernor(plateau=0)
    for t, loss in enumerate(calm + 0.01 * rng.standard_normal(300)):
        governor.observe({"loss_nats": loss, "routing_entropy": 2.3, "total": loss + 0.05 * t * 2.3})
    assert governor.memory["cuts"] == 0 and governor.factor == 1.0


def test_each_rule_cuts_and_says_why() -> None:
    def run(governor: RateGovernor, seen):
        for one in seen:
            governor.observe(one)
        return governor

    rng = np.random.default_rng(0)
    calm = [{"loss_nats": 1 - 0.01 * t + 0.01 * z, "i": 1.0} for t, z in enumerate(rng.standard_normal(60))]
    assert run(RateGovernor(), calm).memory["cuts"] == 0
    spiked = run(RateGovernor(), [*calm, {"loss_nats": 9.0, "i": 1.0}])
    assert spiked.memory["why"].startswith("spike") and spiked.factor == 0.5
    assert run(RateGovernor(), [*calm, {"loss_nats": math.nan}]).memory["why"] == "spike: the loss is nan"
    apart = run(RateGovernor(window=("i", 0.5, 2.0)), [*calm, {"loss_nats": 0.39, "i": 0.1}])
    assert apart.memory["why"] == "coupling: i=0.1" and apart.memory["cuts"] == 1
    capped = run(RateGovernor(cap=0.01), [*calm, {"loss_nats": 0.39, "i": 1.0, "update_ratio": 0.04}])
    assert capped.factor == pytest.approx(0.25) and capped.memory["cuts"] == 0
    flat = [{"loss_nats": 1.0 + 0.01 * z} for z in np.random.default_rng(0).standard_normal(200)]
    assert run(RateGovernor(plateau=50), flat).memory["why"] == "plateau"
    assert run(RateGovernor(grounding=10), calm[:5]).factor == pytest.approx(0.1 + 0.9 * 0.5)


def test_after_a_cut_it_rests_and_then_recovers() -> None:
    governor = RateGovernor(patience=10)
    rng = np.random.default_rng(0)
    for t in range(100):
        governor.observe({"loss_nats": (8.0 if t == 40 else 1.0) + 0.01 * rng.standard_normal()})
        if t == 45:
            assert governor.factor == 0.5
    assert governor.factor == pytest.approx(0.5**0.5 * 1.001**50, rel=0.01), "just below what failed, rising slowly"
    again = RateGovernor(patience=10)
    again.load_state(json.loads(json.dumps(governor.state())))
    for one in (governor, again):
        one.observe({"loss_nats": 1.0})
    assert again.state() == governor.state()
    with pytest.raises(ConfigError, match="'loss_nats' is not seen"):
        governor.observe({"loss": 1.0})
    with pytest.raises(ConfigError, match="RateGovernor"):
        RateGovernor(shrink=1.5)


# -- loss-free balance -------------------------------------------------------------------------------------------------


def test_a_bias_in_the_selection_evens_the_loads() -> None:
    rng = np.random.default_rng(0)
    lean = np.array([1.0, 0.0, 0.0, -1.0])
    balance = LossFreeBalance(4, rate=0.05, decay=0.02)
    for _ in range(400):
        score = rng.standard_normal((512, 4)) + lean
        balance.update(np.bincount((score + balance.bias).argmax(1), minlength=4))
    score = rng.standard_normal((20_000, 4)) + lean
    before, after = (np.bincount((score + b).argmax(1), minlength=4) / 20_000 for b in (np.zeros(4), balance.bias))
    assert np.abs(before - 0.25).max() > 0.2 and np.abs(after - 0.25).max() < 0.02
    assert abs(balance.bias.mean()) < 1e-12


def test_a_target_and_a_state_are_kept() -> None:
    balance = LossFreeBalance(2, target=[3, 1])
    assert balance.update([3, 1]).tolist() == [0, 0]
    other = LossFreeBalance(2, target=[3, 1])
    balance.update([1, 1])
    other.load_state(json.loads(json.dumps(balance.state())))
    assert other.update([1, 1]).tolist() == balance.update([1, 1]).tolist()
    assert LossFreeBalance(2).update([0, 0]).tolist() == [0, 0]
    with pytest.raises(ConfigError, match="LossFreeBalance"):
        LossFreeBalance(0)


def test_the_configuration_s_governor_is_the_one_that_would_be_given(tmp_path) -> None:
    from constellation.config import Config, override

    settings = override(Config(), {"control.rate": "governor", "control.spike": 3.0})
    assert settings.control.spike == 3.0 and Config().control.rate == "schedule"
    with pytest.raises(ConfigError, match="shrink"):
        override(Config(), {"control.shrink": 1.0})
