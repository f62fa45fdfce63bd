"""Laws of the unit sphere, in float64 unless they are about float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from constellation.errors import ConfigError
from constellation.geometry import sphere

DIMS = [2, 3, 8, 64]


def points(*shape: int, seed: int = 0, orthant: bool = False) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return sphere.normalise(x.abs() if orthant else x)


def tangents(s: torch.Tensor, length: float, seed: int = 1) -> torch.Tensor:
    v = sphere.normalise(sphere.project(s, points(*s.shape, seed=seed)))
    return length * sphere.normalise(sphere.project(s, v))  # again: the first rounds where the draw was nearly parallel


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """s and a tangent vector of length 1e-12 .. 3 at it."""
    seed, dim = draw(st.integers(0, 2**31)), draw(st.sampled_from(DIMS))
    s = points(dim, seed=seed)
    return s, tangents(s, 10 ** draw(st.floats(-12, math.log10(3))), seed=seed + 1)


# --- angle


@pytest.mark.parametrize("theta", [0.0, 1e-12, 1e-6, 0.3, math.pi / 2, 3.0, math.pi - 1e-9, math.pi])
def test_angle_of_two_points_of_a_circle_is_what_was_turned(theta):
    s = torch.tensor([1.0, 0.0], dtype=torch.float64)
    t = torch.tensor([math.cos(theta), math.sin(theta)], dtype=torch.float64)
    assert float(sphere.angle(s, t)) == pytest.approx(theta, abs=1e-15)
    assert float(sphere.squared_angle(s, t)) == pytest.approx(theta**2, rel=1e-14, abs=1e-30)


@pytest.mark.parametrize("theta", [0.0, 1e-7, 1e-5, 1e-4, 1e-2, 1.0, 3.0, 3.1415])
def test_angle_in_float32_is_good_to_rounding_where_arccos_is_lost(theta):
    s = points(200, 64)
    t = sphere.exp(s, tangents(s, theta))
    s32, t32 = s.float(), t.float()
    truth = sphere.angle(sphere.normalise(s32.double()), sphere.normalise(t32.double()))  # of what float32 can hold
    assert float((sphere.angle(s32, t32) - truth).abs().max()) < 4e-7
    assert float((sphere.squared_angle(s32, t32).sqrt() - truth).abs().max()) < 6e-7
    if 0 < theta <= 1e-4:
        arccos = torch.arccos((s32 * t32).sum(-1).clamp(-1, 1))
        assert float((arccos - truth).abs().max()) > 1e-4


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(DIMS))
def test_angle_is_a_metric(seed, dim):
    a, b, c = points(3, dim, seed=seed)
    ab, bc, ac = sphere.angle(a, b), sphere.angle(b, c), sphere.angle(a, c)
    assert float(ab) == float(sphere.angle(b, a)) and float(sphere.angle(a, a)) == 0
    assert float(ac) <= float(ab + bc) + 1e-14
    assert 0 <= float(ab) <= math.pi


def test_gradients_are_finite_where_points_meet_and_where_they_oppose():
    for t in (points(8), -points(8)):
        for law in (sphere.angle, sphere.squared_angle):
            s = points(8).requires_grad_()
            (grad,) = torch.autograd.grad(law(s, t), s)
            assert torch.isfinite(grad).all()


# --- exp, log, geodesic, transport


@settings(max_examples=100, deadline=None)
@given(pairs())
def test_log_undoes_exp(pair):
    s, v = pair
    t = sphere.exp(s, v)
    assert float(torch.linalg.vector_norm(t)) == pytest.approx(1, abs=1e-14)
    assert float(sphere.angle(s, t)) == pytest.approx(float(v.norm()), rel=1e-12, abs=1e-15)
    torch.testing.assert_close(sphere.log(s, t), v, rtol=1e-12, atol=5e-14)  # rounding grows near the antipode


def test_exp_and_log_keep_float32_digits_of_small_steps():
    s = points(100, 64)
    for length in (1e-6, 1e-3, 1.0):
        v = tangents(s, length).float()
        back = sphere.log(s.float(), sphere.exp(s.float(), v))
        assert float((back - v).abs().max()) < 3e-7


def test_exp_of_zero_is_the_point_and_log_of_itself_is_zero():
    s = points(5, 8)
    assert torch.equal(sphere.exp(s, torch.zeros_like(s)), s)
    assert torch.equal(sphere.log(s, s), torch.zeros_like(s))


@settings(max_examples=60, deadline=None)
@given(pairs(), st.floats(0, 1), st.floats(0, 1))
def test_geodesic_runs_at_constant_speed(pair, a, b):
    s, v = pair
    t = sphere.exp(s, v)
    theta = float(v.norm())
    at = sphere.geodesic(s, t, torch.tensor([a, b], dtype=torch.float64))
    assert float(sphere.angle(at[0], at[1])) == pytest.approx(abs(a - b) * theta, abs=2e-13)
    torch.testing.assert_close(at[0], sphere.exp(s, a * v), rtol=0, atol=1e-12)


def test_geodesic_ends_at_its_ends_and_stands_still_between_equal_points():
    s, t = points(2, 6, 8)
    torch.testing.assert_close(sphere.geodesic(s, t, 0.0), s, rtol=0, atol=1e-15)
    torch.testing.assert_close(sphere.geodesic(s, t, 1.0), t, rtol=0, atol=1e-15)
    torch.testing.assert_close(sphere.geodesic(s, s, 0.7), s, rtol=0, atol=1e-15)


def test_transport_keeps_lengths_and_carries_the_velocity_along():
    s, t = points(2, 20, 8)
    v, w = tangents(s, 0.7, seed=5), tangents(s, 1.3, seed=6)
    moved_v, moved_w = sphere.transport(s, t, v), sphere.transport(s, t, w)
    torch.testing.assert_close((moved_v * moved_w).sum(-1), (v * w).sum(-1))
    torch.testing.assert_close((moved_v * t).sum(-1), torch.zeros(20, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(sphere.transport(s, t, sphere.log(s, t)), -sphere.log(t, s), atol=1e-12, rtol=0)
    torch.testing.assert_close(sphere.transport(t, s, moved_v), v)


def test_geomstats_agrees_on_the_hypersphere(hypersphere):
    s, t = points(2, 30, 5)
    v = tangents(s, 0.8)
    metric = hypersphere(4).metric
    same = {
        "dist": (sphere.angle(s, t), metric.dist(s.numpy(), t.numpy())),
        "exp": (sphere.exp(s, v), metric.exp(v.numpy(), s.numpy())),
        "log": (sphere.log(s, t), metric.log(t.numpy(), s.numpy())),
        "transport": (
            sphere.transport(s, t, v),
            metric.parallel_transport(v.numpy(), s.numpy(), end_point=t.numpy()),
        ),
    }
    for name, (ours, theirs) in same.items():
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-10, err_msg=name)


@pytest.fixture(scope="module")
def hypersphere():
    with pytest.MonkeyPatch.context() as patch:  # geomstats 2.8 imports a name that NumPy 2.4 dropped
        patch.setattr(np, "trapz", np.trapezoid, raising=False)
        from geomstats.geometry.hypersphere import Hypersphere
    return Hypersphere


# --- the orthant


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(DIMS), st.floats(-6, 1), st.booleans())
def test_orthant_exp_never_leaves_and_equals_exp_until_the_first_zero(seed, dim, log_length, with_zeros):
    s = points(dim, seed=seed, orthant=True)
    if with_zeros:
        s = sphere.normalise(s * (torch.arange(dim) % 2 == 0))
    v = tangents(s, 10**log_length, seed=seed + 1)
    end = sphere.exp_in_orthant(s, v)
    assert float(end.min()) >= 0 and float(end.norm()) == pytest.approx(1, abs=1e-13)
    went = float(sphere.angle(s, end))
    # oracle: walk the same geodesic and look where a coordinate turns negative
    walk = torch.linspace(0, min(float(v.norm()), math.pi), 2001, dtype=torch.float64).unsqueeze(-1)
    inside = (sphere.exp(s, walk * v / v.norm()) > -1e-12).all(-1)
    last = float(walk[int((~inside).double().argmax()) - 1] if not bool(inside.all()) else walk[-1])
    assert went == pytest.approx(last, abs=1.1 * math.pi / 2000)
    if bool(inside.all()):
        torch.testing.assert_close(end, sphere.exp(s, v), atol=1e-12, rtol=0)
    else:
        assert bool(((end == 0) & ((s > 0) | (v < 0))).any())


def test_orthant_exp_stops_at_once_where_a_zero_would_turn_negative():
    corner = torch.eye(3, dtype=torch.float64)[0]
    outward = torch.tensor([0.0, 0.5, -0.1], dtype=torch.float64)
    assert torch.equal(sphere.exp_in_orthant(corner, outward), corner)
    inward = torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(sphere.exp_in_orthant(corner, inward), sphere.exp(corner, inward))
    across = torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64)
    assert torch.equal(sphere.exp_in_orthant(corner, across).round(decimals=12), torch.eye(3, dtype=torch.float64)[1])


# --- mean


def test_mean_of_two_points_lies_on_their_geodesic_by_weight():
    s, t = points(2, 10, 8, orthant=True)
    weights = torch.rand(10, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = sphere.mean(torch.stack([s, t], -2), weights)
    part = weights[:, 1] / weights.sum(-1)
    torch.testing.assert_close(found.point, sphere.geodesic(s, t, part), atol=1e-13, rtol=0)
    assert bool(found.converged.all()) and float(found.residual.max()) < 2e-14


@pytest.mark.parametrize("n, dim", [(1, 8), (5, 3), (40, 16), (10, 300)])
def test_mean_has_no_lower_neighbour_and_zero_mean_log(n, dim):
    x = points(n, dim, orthant=True)
    found = sphere.mean(x)

    def spread(m):
        return (sphere.squared_angle(m, x)).sum(-1)

    around = sphere.exp(found.point, tangents(found.point.expand(50, dim).clone(), 1e-4))
    assert bool((spread(around[:, None]) > spread(found.point)).all())
    assert float(sphere.log(found.point, x).mean(0).norm()) < 1e-13


def test_mean_is_not_its_start_value():
    x = sphere.normalise(torch.tensor([[1.0, 0.01, 0.01], [1.0, 0.02, 0.0], [0.0, 0.1, 1.0]], dtype=torch.float64))
    start = sphere.mean(x, max_iterations=0)
    assert not bool(start.converged) and float(start.residual) > 0.01  # said, not hidden
    found = sphere.mean(x)
    assert bool(found.converged) and float(sphere.angle(start.point, found.point)) > 0.01


def test_mean_follows_rotations_and_weights_count_copies():
    x = points(6, 8, orthant=True)
    turn = torch.linalg.qr(points(8, 8, seed=9)).Q
    torch.testing.assert_close(sphere.mean(x @ turn).point, sphere.mean(x).point @ turn, atol=1e-13, rtol=0)
    copies = torch.tensor([1, 3, 0, 2, 1, 1])
    repeated = sphere.mean(x.repeat_interleave(copies, 0)).point
    torch.testing.assert_close(sphere.mean(x, copies.double()).point, repeated, atol=1e-13, rtol=0)


def test_mean_converges_in_float32_on_points_as_sparse_as_texts():
    x = points(300, 4096, orthant=True) * (points(300, 4096, seed=4) > 0.02)
    x = sphere.normalise(x)
    found = sphere.mean(x.float())
    assert bool(found.converged) and found.iterations <= 6
    assert float(sphere.angle(found.point.double(), sphere.mean(x).point)) < 1e-5


def test_geomstats_agrees_on_the_mean(hypersphere):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "trapz", np.trapezoid, raising=False)
        from geomstats.learning.frechet_mean import FrechetMean
    x, w = points(12, 5, orthant=True), torch.arange(1.0, 13.0, dtype=torch.float64)
    theirs = FrechetMean(hypersphere(4)).set(epsilon=1e-16, max_iter=200).fit(x.numpy(), weights=w.numpy()).estimate_
    np.testing.assert_allclose(sphere.mean(x, w).point.numpy(), theirs, atol=1e-8)


def test_mean_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="0 points"):
        sphere.mean(torch.zeros(0, 4))


# --- principal directions


@pytest.mark.parametrize("n_points, dim", [(200, 12), (9, 40)])
def test_principal_directions_are_the_right_singular_vectors(n_points, dim):
    v = points(n_points, dim) * torch.linspace(1, 0.1, dim)
    found = sphere.principal_directions(v, 5)
    _, stretch, right = torch.linalg.svd(v / math.sqrt(n_points), full_matrices=False)
    torch.testing.assert_close(found.variance, stretch[:5] ** 2, rtol=1e-10, atol=0)
    torch.testing.assert_close((found.directions @ right[:5].T).abs(), torch.eye(5).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(found.directions @ found.directions.T, torch.eye(5).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(((v @ found.directions.T) ** 2).mean(0), found.variance)
    torch.testing.assert_close(found.total, (v**2).sum(-1).mean())


def test_principal_directions_have_one_sign_whatever_the_order_of_the_data():
    v = points(50, 12)
    found = sphere.principal_directions(v, 6).directions
    assert bool((found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all())
    for other in (-v, v.flip(0)):
        torch.testing.assert_close(sphere.principal_directions(other, 6).directions, found, atol=1e-9, rtol=0)


def test_principal_directions_beyond_the_rank_are_zero():
    flat = points(3, 10)
    for v in (flat[torch.arange(30) % 3], flat):  # rank 3 from many points and from few
        found = sphere.principal_directions(v, 20)
        assert found.directions.shape == (20, 10) and int((found.variance > 0).sum()) == 3
        assert torch.equal(found.directions[3:], torch.zeros(17, 10, dtype=torch.float64))
    nothing = sphere.principal_directions(torch.zeros(4, 10), 2)
    assert torch.equal(nothing.directions, torch.zeros(2, 10)) and float(nothing.total) == 0


def test_weights_of_principal_directions_count_copies():
    v, copies = points(20, 6), torch.arange(20) % 4
    repeated = sphere.principal_directions(v.repeat_interleave(copies, 0), 3)
    weighted = sphere.principal_directions(v, 3, copies.double())
    torch.testing.assert_close(weighted.directions, repeated.directions, atol=1e-9, rtol=0)
    torch.testing.assert_close(weighted.variance, repeated.variance)


# --- differentiable, batched


def differentiable(x: torch.Tensor, law) -> None:
    assert gradcheck(law, x.clone().requires_grad_())


def test_gradients_are_those_of_finite_differences():
    s, t, x = points(3, 4, 5)
    v = tangents(s, 0.9)
    differentiable(s, lambda s: sphere.angle(s, t))
    differentiable(s, lambda s: sphere.squared_angle(s, t))
    differentiable(s, lambda s: sphere.log(s, t))
    differentiable(t, lambda t: sphere.log(s, t))
    differentiable(s, lambda s: sphere.exp(s, v))
    differentiable(v, lambda v: sphere.exp(s, v))
    differentiable(t, lambda t: sphere.geodesic(s, t, 0.3))
    differentiable(t, lambda t: sphere.transport(s, t, v))
    differentiable(x, sphere.normalise)
    positive = s.abs()
    for length in (0.05, 3.0):  # stays inside; is stopped
        step = tangents(positive, length)
        differentiable(step, lambda v: sphere.exp_in_orthant(positive, v))
        differentiable(positive, lambda s, v=step: sphere.exp_in_orthant(s, v))


def test_gradients_exist_at_the_points_where_formulas_divide_by_zero():
    s = points(4, 5)
    zero = torch.zeros_like(s)
    differentiable(s, lambda t: sphere.squared_angle(s, t))
    differentiable(s, lambda t: sphere.log(s, t))
    differentiable(s, lambda t: sphere.geodesic(s, t, 0.3))
    differentiable(zero, lambda v: sphere.exp(s, v))
    differentiable(zero, lambda v: sphere.exp_in_orthant(s.abs(), v))
    assert gradgradcheck(lambda t: sphere.squared_angle(s, t), s.clone().requires_grad_())


def test_mean_has_the_gradient_of_the_exact_mean():
    w = torch.tensor([0.2, 0.5, 0.1, 0.4], dtype=torch.float64)
    cross = sphere.normalise(torch.tensor([[1, 0.5, 0], [1, -0.5, 0], [1, 0, 0.8], [1, 0, -0.8]], dtype=torch.float64))
    for x in (points(2, 4, 5, orthant=True), cross):  # on the cross the start value is exact, but its gradient is not
        differentiable(x, lambda x: sphere.mean(sphere.normalise(x)).point)
        differentiable(w, lambda w, x=x: sphere.mean(x, w).point)
    one = points(1, 5)
    differentiable(one, lambda x: sphere.mean(sphere.normalise(x)).point)


def test_a_batch_gives_what_a_loop_gives():
    s, t = points(2, 3, 7, 8, orthant=True)
    v = tangents(s, 0.6)
    laws = {
        "angle": lambda s, t, v: sphere.angle(s, t),
        "squared_angle": lambda s, t, v: sphere.squared_angle(s, t),
        "log": lambda s, t, v: sphere.log(s, t),
        "exp": lambda s, t, v: sphere.exp(s, v),
        "exp_in_orthant": lambda s, t, v: sphere.exp_in_orthant(s, v),
        "geodesic": lambda s, t, v: sphere.geodesic(s, t, 0.4),
        "transport": lambda s, t, v: sphere.transport(s, t, v),
    }
    for name, law in laws.items():
        loop = torch.stack([torch.stack([law(*row) for row in zip(*rows)]) for rows in zip(s, t, v)])
        torch.testing.assert_close(law(s, t, v), loop, atol=1e-15, rtol=1e-14, msg=name)
    whole = sphere.mean(s, torch.ones(7))
    alone = [sphere.mean(x) for x in s]
    torch.testing.assert_close(whole.point, torch.stack([m.point for m in alone]), atol=1e-15, rtol=0)
    assert whole.iterations == max(m.iterations for m in alone)
    pairwise = sphere.angle(s[0][:, None], t[0][None])
    assert pairwise.shape == (7, 7) and float(pairwise[2, 5]) == pytest.approx(float(sphere.angle(s[0, 2], t[0, 5])))
