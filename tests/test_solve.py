"""cg, sample space and dense answer one question; what they cannot answer is an outcome. float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from constellation.errors import ConfigError
from constellation.geometry.fisher import FisherBlock, flatten
from constellation.geometry.solve import OUTCOMES, Solution, cg, choose, dense, krylov, sample_space, solve


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def product(f: Tensor):  # type: ignore[no-untyped-def]
    return lambda v: f @ v


@given(
    damping=st.floats(1e-3, 1e3),
    rows=st.integers(1, 40),
    size=st.integers(1, 30),
    rank=st.integers(1, 30),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=100, deadline=None)
def test_dense_cg_woodbury_and_push_through_agree(damping: float, rows: int, size: int, rank: int, seed: int) -> None:
    rank = min(rank, rows, size)
    a = matrix(rows, rank, seed=seed) @ matrix(rank, size, seed=seed + 1)
    a = a / torch.linalg.matrix_norm(a, 2)  # condition at most 1 + 1 / damping
    f, r, b = a.mT @ a, matrix(rows, seed=seed + 2), matrix(size, seed=seed + 3)
    oracle = torch.linalg.solve(f + damping * torch.eye(size, dtype=torch.float64), b)
    limit = 1e-15 * (20 + 20 / damping)  # eps times condition
    krylov = cg(product(f), b, damping=damping, tolerance=1e-15, max_steps=4 * size + 20)
    for solution in (dense(f, b, damping=damping), sample_space(a, b, damping=damping), krylov):
        assert far(solution.x, oracle) < limit
        assert solution.residual < limit
        assert far(solution.product + damping * solution.x, b) < limit
    pushed = sample_space(a, damping=damping, residual=r)
    assert (pushed.x - dense(f, a.mT @ r, damping=damping).x).norm() < limit * r.norm()  # A^T r may cancel
    both = sample_space(a, b + a.mT @ r, damping=damping, residual=r)
    assert (both.x - dense(f, b + a.mT @ r, damping=damping).x).norm() < limit * (r.norm() + oracle.norm())


def test_at_damping_of_one_they_agree_to_rounding() -> None:
    a, b = matrix(20, 30) / 10, matrix(30)
    answers = [
        dense(a.mT @ a, b, damping=1.0).x,
        sample_space(a, b, damping=1.0).x,
        cg(product(a.mT @ a), b, damping=1.0, tolerance=1e-16, max_steps=60).x,
    ]
    assert max(far(x, answers[0]) for x in answers) < 2e-15


def test_push_through_is_exact_as_damping_vanishes() -> None:
    a, r = matrix(5, 30), matrix(5)
    assert far(sample_space(a, damping=1e-18, residual=r).x, torch.linalg.pinv(a) @ r) < 1e-13


def test_refinement_on_the_residual_keeps_the_accuracy_of_least_squares() -> None:
    u, v = (torch.linalg.qr(matrix(n, 8)).Q for n in (40, 8))
    a, r = u @ torch.diag(torch.logspace(0, -5.5, 8, dtype=torch.float64)) @ v.mT, matrix(40)
    oracle = torch.linalg.lstsq(a, r[:, None], driver="gelsd").solution[:, 0]
    plain = dense(a.mT @ a, a.mT @ r)
    refined = dense(a.mT @ a, a.mT @ r, factor_RP=a, residual=r)
    assert far(a @ refined.x, a @ oracle) < 1e-10 < 1e-7 < far(a @ plain.x, a @ oracle)


def test_the_spring_right_hand_side_is_the_proximal_problem() -> None:
    a, r, previous, damping, mu = matrix(5, 12), matrix(5), matrix(12, seed=1), 0.3, 0.9
    stacked = torch.cat([a, damping**0.5 * torch.eye(12, dtype=torch.float64)])
    oracle = torch.linalg.lstsq(stacked, torch.cat([r, damping**0.5 * mu * previous])[:, None]).solution[:, 0]
    b = a.mT @ r + damping * mu * previous
    assert far(dense(a.mT @ a, b, damping=damping).x, oracle) < 1e-12
    assert far(sample_space(a, b, damping=damping).x, oracle) < 1e-12
    assert far(sample_space(a, b, damping=damping, residual=r, around=mu * previous).x, oracle) < 1e-12
    assert far(sample_space(a, b, damping=damping, around=mu * previous, within=True).x, oracle) < 1e-11


def test_within_stays_in_the_row_space_and_is_the_projected_answer() -> None:
    a, b, damping = matrix(4, 10), matrix(10), 1e-6
    span = torch.linalg.qr(a.mT).Q
    x = sample_space(a, b, damping=damping, within=True).x
    assert far(span @ (span.mT @ x), x) < 1e-10
    assert far(x, dense(a.mT @ a, span @ (span.mT @ b), damping=damping).x) < 1e-8
    assert sample_space(a, b, damping=damping).x.norm() > 1e4 * x.norm()  # what `within` is there to prevent


def test_cg_needs_as_many_steps_as_there_are_distinct_eigenvalues() -> None:
    q = torch.linalg.qr(matrix(20, 20)).Q
    f = q @ torch.diag(torch.tensor([1.0, 3.0, 9.0, 27.0], dtype=torch.float64).repeat(5)) @ q.mT
    solution = cg(product(f), matrix(20), tolerance=1e-12, max_steps=50)
    assert solution.outcome == "converged" and solution.steps == 4
    assert solution.spectrum == pytest.approx((1.0, 27.0), rel=1e-9)
    assert solution.condition_number == pytest.approx(27.0, rel=1e-9)


def test_spectrum_is_found_from_inside() -> None:
    a, b = matrix(40, 25), matrix(25)
    f, damping = a.mT @ a, 0.1
    values = torch.linalg.eigvalsh(f) + damping
    for solution in (
        cg(product(f), b, damping=damping, max_steps=8), dense(f, b, damping=damping),
        sample_space(a, b, damping=damping), sample_space(a[:9], b, damping=damping),
    ):  # fmt: skip
        low, high = solution.spectrum
        assert high <= values[-1] * (1 + 1e-12)
        assert low >= (damping if len(a[:9]) < 25 and solution.method == "sample_space" else values[0]) * (1 - 1e-12)


def test_a_warm_start_at_the_answer_takes_no_step() -> None:
    a = matrix(30, 10)
    f, b = a.mT @ a, matrix(10)
    x = dense(f, b, damping=0.1).x
    solution = cg(product(f), b, damping=0.1, start=x, tolerance=1e-10)
    assert solution.outcome == "converged" and solution.steps == 0 and torch.equal(solution.x, x)
    closer = cg(product(f), b, damping=0.1, start=0.9 * x, max_steps=3, tolerance=1e-14)
    assert closer.residual < cg(product(f), b, damping=0.1, max_steps=3, tolerance=1e-14).residual


def test_the_jacobi_preconditioner_solves_a_diagonal_in_one_step() -> None:
    d = torch.logspace(-3, 3, 20, dtype=torch.float64)
    solution = cg(lambda v: d * v, matrix(20), damping=0.5, preconditioner=d + 0.5, tolerance=1e-12)
    assert solution.outcome == "converged" and solution.steps == 1
    assert cg(lambda v: d * v, matrix(20), damping=0.5, tolerance=1e-12).steps > 10


def test_truncated_cg_reports_max_steps_and_the_residual_it_has() -> None:
    a = matrix(40, 30)
    f, b = a.mT @ a, matrix(30)
    solution = cg(product(f), b, damping=1e-3, max_steps=4)
    assert solution.outcome == "max_steps" and solution.steps == 4
    assert solution.residual == pytest.approx(
        float((b - f @ solution.x - 1e-3 * solution.x).norm() / b.norm()), rel=1e-9
    )


def test_stops_at_negative_curvature_instead_of_following_it() -> None:
    d = torch.tensor([4.0, 2.0, 1.0, -0.5], dtype=torch.float64)
    b = torch.tensor([1.0, 1.0, 1.0, 0.2], dtype=torch.float64)
    solution = cg(lambda v: d * v, b, max_steps=10)
    assert solution.outcome == "negative_curvature" and solution.steps >= 1
    assert float(solution.x @ (d * solution.x)) > 0 and float(b @ solution.x) > 0
    at_once = cg(lambda v: -v, b)
    assert at_once.outcome == "negative_curvature" and at_once.steps == 0 and not at_once.x.any()
    assert dense(torch.diag(d), b).outcome == "negative_curvature"
    assert dense(torch.diag(d), b, damping=1.0).outcome == "converged"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_factors_are_an_outcome(dtype: torch.dtype) -> None:
    g, b = matrix(8).to(dtype), matrix(8, seed=1).to(dtype)
    for solution in (dense(torch.outer(g, g), b), dense(torch.zeros(8, 8, dtype=dtype), b),
                     sample_space(g[None], b, damping=0.0)):  # fmt: skip
        assert solution.outcome == "singular" and not solution.x.any()
    assert dense(torch.outer(g, g), b, damping=0.1).outcome == "converged"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_an_outcome(bad: float) -> None:
    a = matrix(6, 4)
    f, b = a.mT @ a, matrix(4)
    broken = f.clone()
    broken[1, 1] = bad
    for solution in (
        cg(product(broken), b), dense(broken, b), cg(product(f), b * bad), dense(f, b * bad),
        sample_space(a * bad, b, damping=1.0), sample_space(a, b * bad, damping=1.0),
    ):  # fmt: skip
        assert solution.outcome == "non_finite" and not solution.x.any()


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30])
def test_huge_and_tiny_gradients_are_solved_all_the_same(scale: float) -> None:
    a = matrix(6, 4)
    f, b = a.mT @ a, matrix(4)
    for solution, unit in (
        (cg(product(f), scale * b, damping=0.1, tolerance=1e-13), cg(product(f), b, damping=0.1, tolerance=1e-13)),
        (dense(f, scale * b, damping=0.1), dense(f, b, damping=0.1)),
        (sample_space(a, scale * b, damping=0.1), sample_space(a, b, damping=0.1)),
    ):
        assert solution.outcome == unit.outcome == "converged"
        assert far(solution.x / scale, unit.x) < 1e-12


def test_nothing_to_solve_is_solved_by_zero() -> None:
    a, zero = matrix(6, 4), torch.zeros(4, dtype=torch.float64)
    for solution in (cg(product(a.mT @ a), zero), dense(a.mT @ a, zero), sample_space(a, zero, damping=1.0)):
        assert solution.outcome == "converged" and not solution.x.any() and solution.residual == 0


def test_krylov_answers_later_gradients_from_the_products_of_an_earlier_solve() -> None:
    a, damping = matrix(40, 20), 0.1
    f, b, later = a.mT @ a, matrix(20), matrix(20, seed=5)
    solution = cg(product(f), b, damping=damping, max_steps=6, keep=True)
    assert solution.directions_KP is not None and solution.products_KP is not None
    p, fp = solution.directions_KP, solution.products_KP
    assert far(p @ (fp + damping * p).mT, torch.eye(6, dtype=torch.float64)) < 1e-10  # conjugate and normalised
    assert far(krylov(p, fp, b, damping=damping).x, solution.x) < 1e-12
    again = krylov(p, fp, later, damping=damping)
    galerkin = p.mT @ torch.linalg.solve(p @ (f @ p.mT) + damping * p @ p.mT, p @ later)
    assert far(again.x, galerkin) < 1e-10 and far(again.product, f @ galerkin) < 1e-10
    assert again.steps == 0 and again.residual == pytest.approx(
        float((later - f @ galerkin - damping * galerkin).norm() / later.norm()), rel=1e-9
    )


def small_block(rows: int, width: int) -> tuple[FisherBlock, Tensor]:
    torch.manual_seed(0)
    net, x, y = nn.Linear(width, 3).double(), matrix(rows, width), torch.randint(0, 3, (rows,))
    f = net(x)
    gradient = flatten(
        torch.autograd.grad(nn.functional.cross_entropy(f, y), list(net.parameters()), retain_graph=True)
    )
    return FisherBlock(f, list(net.parameters()), targets=y), gradient


@pytest.mark.parametrize(("rows", "width", "expected"), [(50, 4, "dense"), (3, 40, "sample_space"), (300, 200, "cg")])
def test_auto_says_what_it_took_and_all_methods_agree(rows: int, width: int, expected: str) -> None:
    block, b = small_block(rows, width)
    assert choose(block, 0.01) == expected
    answers: dict[str, Solution] = {
        method: solve(block, b, damping=0.01, method=method, tolerance=1e-13, max_steps=200)
        for method in ("auto", "cg", "dense", "sample_space")
    }
    assert answers["auto"].method == expected
    assert all(s.outcome == "converged" for s in answers.values())
    assert all(far(s.x, answers["dense"].x) < 1e-10 for s in answers.values())
    assert {s.method for s in answers.values()} == {"cg", "dense", "sample_space"}
    assert all(s.outcome in OUTCOMES for s in answers.values())


def test_an_unknown_method_is_named() -> None:
    block, b = small_block(5, 2)
    with pytest.raises(ConfigError, match="method='lu': choose one of auto"):
        solve(block, b, damping=0.1, method="lu")
    with pytest.raises(ConfigError, match="give b, residual"):
        sample_space(matrix(2, 3), damping=0.1)
