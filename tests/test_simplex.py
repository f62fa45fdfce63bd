"""Laws and closed forms of the Fisher-Rao geometry, in float64 unless they are about float32."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.autograd import gradcheck

from constellation.errors import ConfigError
from constellation.geometry import simplex, sphere

D = torch.float64


def dirichlet(*shape: int, seed: int = 0, power: float = 1.0) -> torch.Tensor:
    x = torch.empty(shape, dtype=D).exponential_(generator=torch.Generator().manual_seed(seed)) ** power
    return x / x.sum(-1, keepdim=True)


def fisher_norm(p: torch.Tensor, dp: torch.Tensor) -> torch.Tensor:
    return (dp**2 / p).sum(-1).sqrt()


@st.composite
def distributions(draw: st.DrawFn, rows: int) -> torch.Tensor:
    """`rows` distributions over 2..9 categories, zeros and very uneven ones among them."""
    n = draw(st.integers(2, 9))
    entry = st.one_of(st.just(0.0), st.floats(1e-9, 1), st.floats(0.1, 1))
    x = torch.from_numpy(draw(hnp.arrays(float, (rows, n), elements=entry)))
    assume(bool((x.sum(-1) > 0).all()))
    return x / x.sum(-1, keepdim=True)


# --- distance: oracles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "p, q, expected",
    [
        ([0.5, 0.5], [0.9, 0.1], 0.927295),
        ([1 / 64] * 64, [1.0] + [0.0] * 63, 2.890937),
        ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0], math.pi),
        ([1.0, 0.0], [1.0, 0.0], 0.0),
        ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5], 0.0),
    ],
)
def test_distance_has_its_known_values(p, q, expected, dtype):
    p, q = torch.tensor(p, dtype=dtype), torch.tensor(q, dtype=dtype)
    assert float(simplex.distance(p, q)) == pytest.approx(expected, abs=1e-6)
    assert float(simplex.squared_distance(p, q)) == pytest.approx(expected**2, abs=5e-6)


def test_bernoulli_distance_is_that_of_the_arcsine_transform():
    a, b = dirichlet(100, 2), dirichlet(100, 2, seed=1)
    arcsine = 2 * (torch.arcsin(a[:, 0].sqrt()) - torch.arcsin(b[:, 0].sqrt())).abs()
    torch.testing.assert_close(simplex.distance(a, b), arcsine, atol=1e-13, rtol=0)


@settings(max_examples=150, deadline=None)
@given(distributions(rows=3))
def test_distance_is_a_metric_up_to_pi(rows):
    p, q, r = rows
    pq, qr, pr = simplex.distance(p, q), simplex.distance(q, r), simplex.distance(p, r)
    assert 0 <= float(pq) <= math.pi and float(pq) == float(simplex.distance(q, p))
    assert float(simplex.distance(p, p)) == 0
    assert float(pr) <= float(pq + qr) + 1e-13


@settings(max_examples=100, deadline=None)
@given(distributions(rows=2), st.floats(0, 1), st.integers(0, 8))
def test_splitting_a_category_in_proportion_changes_nothing(rows, part, which):
    i = which % rows.shape[1]
    split = torch.cat([rows, (rows[:, i] * part)[:, None]], 1)
    split[:, i] *= 1 - part
    assert float(simplex.distance(*split)) == pytest.approx(float(simplex.distance(*rows)), abs=2e-8)
    merged = torch.cat([rows[:, 2:], rows[:, :2].sum(1, keepdim=True)], 1)
    assert float(simplex.distance(*merged)) <= float(simplex.distance(*rows)) + 1e-13  # coarser, so never farther


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4])
def test_twice_kl_becomes_the_squared_distance(step):
    p = dirichlet(20, 9)
    direction = torch.rand(20, 9, generator=torch.Generator().manual_seed(1), dtype=D)
    q = p * (1 + step * (direction - (p * direction).sum(-1, keepdim=True)))  # dp / p of the order of the step
    ratio = 2 * simplex.kl(p, q) / simplex.squared_distance(p, q)
    assert float((ratio - 1).abs().max()) < step


def test_half_the_hessian_of_the_squared_distance_is_the_fisher_metric():
    p = dirichlet(6)
    hessian = torch.autograd.functional.hessian(lambda q: simplex.squared_distance(p, q), p)
    along = dirichlet(30, 6, seed=2) - dirichlet(30, 6, seed=3)  # tangent: sums to 0
    torch.testing.assert_close(0.5 * torch.einsum("ni,ij,nj->n", along, hessian, along), fisher_norm(p, along) ** 2)


# --- float32


def test_distance_in_float32_is_good_to_rounding_from_equal_to_disjoint():
    p = dirichlet(300, 64, power=3)
    for step in (0.0, 1e-7, 1e-4, 1e-2, 1.0):
        q = (1 - step) * p + step * dirichlet(300, 64, seed=1, power=3)
        p32, q32 = p.float(), q.float()
        truth = simplex.distance(p32.double() / p32.double().sum(-1, True), q32.double() / q32.double().sum(-1, True))
        assert float((simplex.distance(p32, q32) - truth).abs().max()) < 1e-6
        assert float((simplex.squared_distance(p32, q32) - truth**2).abs().max()) < 5e-6
    tiny = torch.tensor([[1.0, 0.0], [1.0, 1e-30]])  # below eps^2 the chart is a line, off by less than eps
    assert float(simplex.distance(tiny[0], tiny[1])) < 1e-6


def test_chart_is_exact_at_corners_and_inverted_by_squaring():
    corners = torch.eye(5)
    assert torch.equal(simplex.to_sphere(corners), corners)
    p = dirichlet(50, 30).float()
    torch.testing.assert_close(simplex.from_sphere(simplex.to_sphere(p)), p, rtol=4e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_equal_points_and_at_zeros(dtype):
    p = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=dtype)
    for q in (p, torch.tensor([0.25, 0.25, 0.25, 0.25]), torch.tensor([0.0, 0.0, 0.5, 0.5]), torch.eye(4)[0]):
        for law in (simplex.distance, simplex.squared_distance, simplex.log, simplex.kl):
            a, b = p.clone().requires_grad_(), q.to(dtype).clone().requires_grad_()
            value = law(a, b).sum()
            if not torch.isfinite(value):
                continue  # kl to a distribution that lacks a category
            for grad in torch.autograd.grad(value, (a, b)):
                assert torch.isfinite(grad).all(), (law.__name__, q)
    at_minimum = p.clone().requires_grad_()
    (grad,) = torch.autograd.grad(simplex.squared_distance(at_minimum, p), at_minimum)
    assert torch.equal(grad, torch.zeros_like(p))


def test_a_softmax_that_underflowed_still_trains():
    logits = torch.tensor([0.0, -200.0, 1.0], requires_grad=True)
    p = logits.softmax(-1)
    assert float(p.detach()[1]) == 0
    (grad,) = torch.autograd.grad(simplex.squared_distance(p, torch.full((3,), 1 / 3)), logits)
    assert torch.isfinite(grad).all() and float(grad.abs().sum()) > 0.1


# --- exp, log, geodesic


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 30))
def test_log_undoes_exp_and_has_the_length_of_the_distance(seed, n):
    p, q = dirichlet(n, seed=seed), dirichlet(n, seed=seed + 1)
    dp = simplex.log(p, q)
    assert float(dp.sum()) == pytest.approx(0, abs=1e-13)
    assert float(fisher_norm(p, dp)) == pytest.approx(float(simplex.distance(p, q)), rel=1e-7)
    torch.testing.assert_close(simplex.exp(p, dp), q, atol=1e-10, rtol=0)
    step = 0.1 * p.min() * (dirichlet(n, seed=seed + 2) - p)
    torch.testing.assert_close(simplex.log(p, simplex.exp(p, step)), step, atol=1e-13, rtol=1e-7)


def test_exp_stops_at_the_boundary_and_keeps_to_a_face():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=D)
    end = simplex.exp(p, torch.tensor([2.0, 1.0, -3.0], dtype=D))
    assert float(end[2]) == 0 and float(end.min()) >= 0 and float(end.sum()) == pytest.approx(1, abs=1e-14)
    on_face = simplex.exp(torch.tensor([0.5, 0.5, 0.0], dtype=D), torch.tensor([0.1, -0.1, 0.0], dtype=D))
    assert float(on_face[2]) == 0 and float(on_face[0]) > 0.5
    assert torch.equal(simplex.exp(p, torch.zeros(3, dtype=D)), simplex.from_sphere(simplex.to_sphere(p)))


def test_geodesic_between_corners_is_a_turn():
    a, b = torch.eye(3, dtype=D)[:2]
    tau = torch.linspace(0, 1, 7, dtype=D)
    turn = torch.stack([torch.cos(tau * math.pi / 2) ** 2, torch.sin(tau * math.pi / 2) ** 2], -1)
    found = simplex.geodesic(a, b, tau)
    torch.testing.assert_close(found[:, :2], turn, atol=1e-15, rtol=0)
    torch.testing.assert_close(simplex.distance(a, found), tau * math.pi, atol=1e-14, rtol=0)


@settings(max_examples=60, deadline=None)
@given(distributions(rows=2), st.floats(0, 1))
def test_geodesic_divides_the_distance(rows, tau):
    p, q = rows
    m = simplex.geodesic(p, q, tau)
    assert float(m.min()) >= 0 and float(m.sum()) == pytest.approx(1, abs=1e-13)
    whole = float(simplex.distance(p, q))
    assert float(simplex.distance(p, m)) == pytest.approx(tau * whole, abs=5e-7)
    assert float(simplex.distance(m, q)) == pytest.approx((1 - tau) * whole, abs=5e-7)


# --- means


def test_mean_of_all_corners_is_uniform_and_of_copies_is_the_copy():
    uniform = torch.full((5,), 0.2, dtype=D)
    for law in (lambda p: simplex.mean(p).point, simplex.barycenter):
        torch.testing.assert_close(law(torch.eye(5, dtype=D)), uniform, atol=1e-15, rtol=0)
        p = dirichlet(6)
        torch.testing.assert_close(law(p.expand(4, 6)), p, atol=1e-15, rtol=0)


def test_mean_minimises_the_squared_distances_and_barycenter_the_squared_chords():
    p, w = dirichlet(7, 5, power=3), dirichlet(7, seed=1)
    found, bary = simplex.mean(p, w), simplex.barycenter(p, w)
    assert bool(found.converged) and float(simplex.distance(found.point, bary)) > 1e-3
    near = simplex.geodesic(found.point, dirichlet(200, 5, seed=2), 1e-3)
    arcs = [(w * simplex.squared_distance(m, p)).sum(-1) for m in (near.unsqueeze(1), found.point, bary)]
    assert bool((arcs[0] > arcs[1]).all()) and float(arcs[2]) > float(arcs[1])

    def chords(m):
        return (w * ((simplex.to_sphere(m) - simplex.to_sphere(p)) ** 2).sum(-1)).sum(-1)

    near = simplex.geodesic(bary, dirichlet(200, 5, seed=2), 1e-3)
    assert bool((chords(near.unsqueeze(1)) > chords(bary)).all())


def test_weighted_mean_of_two_is_on_their_geodesic():
    p, q = dirichlet(2, 9, power=3)
    for tau in (0.0, 0.2, 0.5, 1.0):
        found = simplex.mean(torch.stack([p, q]), torch.tensor([1 - tau, tau], dtype=D)).point
        torch.testing.assert_close(found, simplex.geodesic(p, q, tau), atol=1e-13, rtol=0)
    torch.testing.assert_close(simplex.barycenter(torch.stack([p, q])), simplex.geodesic(p, q, 0.5))


def test_residual_and_tolerance_of_the_mean_are_in_radians_of_the_distance():
    p = dirichlet(7, 5, power=3)
    start, rough = simplex.mean(p, max_iterations=0), simplex.mean(p, tolerance=1e-2)
    mean_log = fisher_norm(start.point, simplex.log(start.point, p).mean(0))
    assert float(start.residual) == pytest.approx(float(mean_log))
    assert bool(rough.converged) and 1e-9 < float(rough.residual) <= 1e-2


# --- kl


@settings(max_examples=60, deadline=None)
@given(distributions(rows=2))
def test_kl_is_positive_zero_on_itself_and_infinite_off_the_support(rows):
    p, q = rows
    value = float(simplex.kl(p, q))
    assert value >= -1e-15 and float(simplex.kl(p, p)) == 0
    assert math.isinf(value) == bool(((p > 0) & (q == 0)).any())
    if not math.isinf(value):
        naive = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist()) if a > 0)
        assert value == pytest.approx(naive, rel=1e-12, abs=1e-14)


def test_kl_of_a_corner_to_uniform_is_ln_n():
    assert float(simplex.kl(torch.eye(8, dtype=D)[3], torch.full((8,), 1 / 8, dtype=D))) == pytest.approx(math.log(8))


# --- independent oracle


@pytest.fixture(scope="module")
def categorical():
    with pytest.MonkeyPatch.context() as patch:  # geomstats 2.8 imports a name that NumPy 2.4 dropped
        patch.setattr(np, "trapz", np.trapezoid, raising=False)
        from geomstats.information_geometry.categorical import CategoricalDistributions
    return CategoricalDistributions(dim=5).metric


def test_geomstats_agrees(categorical):
    p, q = dirichlet(25, 6), dirichlet(25, 6, seed=1)
    dp = 0.1 * p * (dirichlet(25, 6, seed=2) - 1 / 6)
    dp = dp - p * dp.sum(-1, keepdim=True)
    numpy = [x.numpy() for x in (p, q, dp)]
    half = np.stack([categorical.geodesic(a, b)(0.5).squeeze(0) for a, b in zip(*numpy[:2])])
    pairs = {
        "dist": (simplex.distance(p, q), categorical.dist(numpy[0], numpy[1])),
        "norm": (fisher_norm(p, dp), categorical.norm(numpy[2], numpy[0])),
        "log": (simplex.log(p, q), categorical.log(numpy[1], numpy[0])),
        "exp": (simplex.exp(p, dp), categorical.exp(numpy[2], numpy[0])),
        "geodesic": (simplex.geodesic(p, q, 0.5), half),
    }
    for name, (ours, theirs) in pairs.items():
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-9, err_msg=name)


# --- differentiable, batched, checked


def test_gradients_are_those_of_finite_differences():
    p, q = dirichlet(3, 5), dirichlet(3, 5, seed=1)
    dp = 0.1 * (q - p)
    batch = dirichlet(2, 4, 5)
    laws = [
        (p, lambda p: simplex.distance(p, q)),
        (q, lambda q: simplex.squared_distance(p, q)),
        (p, lambda q: simplex.squared_distance(p, q)),  # at p = q
        (p, lambda p: simplex.log(p, q)),
        (dp, lambda dp: simplex.exp(p, dp)),
        (torch.zeros_like(dp), lambda dp: simplex.exp(p, dp)),
        (p, lambda p: simplex.geodesic(p, q, 0.3)),
        (q, lambda q: simplex.kl(p, q)),
        (p, lambda p: simplex.kl(p, q)),
        (batch, simplex.barycenter),
        (batch, lambda b: simplex.mean(b / b.sum(-1, keepdim=True)).point),
    ]
    for x, law in laws:
        assert gradcheck(law, x.clone().requires_grad_())


def test_a_batch_gives_what_a_loop_gives():
    p, q = dirichlet(4, 6), dirichlet(4, 6, seed=1)
    for law in (simplex.distance, simplex.squared_distance, simplex.log, simplex.exp, simplex.kl):
        second = 0.2 * (q - p) if law is simplex.exp else q
        loop = torch.stack([law(a, b) for a, b in zip(p, second)])
        torch.testing.assert_close(law(p, second), loop, atol=1e-15, rtol=1e-13)
    assert simplex.distance(p[:, None], q[None]).shape == (4, 4)


def test_numpy_arrays_pass_without_a_copy():
    p = np.array([[0.5, 0.5], [0.9, 0.1]])
    found = simplex.distance(torch.from_numpy(p[:1]), torch.from_numpy(p)).numpy()
    np.testing.assert_allclose(found, [0, 0.927295], atol=1e-6)


@pytest.mark.parametrize(
    "p, said",
    [
        (torch.tensor([0.5, 0.6]), "sums to 1.1"),
        (torch.tensor([1.5, -0.5]), "holds -0.5"),
        (torch.tensor([float("nan"), 1.0]), "not finite"),
        (torch.tensor([1, 0]), "int64"),
        (torch.tensor(1.0), r"shape \(\)"),
    ],
)
def test_what_is_not_a_distribution_is_refused_with_its_fault(p, said):
    with pytest.raises(ConfigError, match=f"^prior: .*{said}"):
        simplex.check(p, "prior")


def test_distributions_pass_the_check():
    simplex.check(dirichlet(3, 1000).float())
    simplex.check(torch.eye(4))


def test_docstring_examples_are_true():
    result = doctest.testmod(simplex)
    assert result.attempted > 0 and result.failed == 0


def test_simplex_is_the_sphere_of_radius_two():
    p, q = dirichlet(2, 8)
    assert float(simplex.distance(p, q)) == pytest.approx(2 * float(sphere.angle(p.sqrt(), q.sqrt())), rel=1e-14)
