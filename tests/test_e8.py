"""The root system E8: what makes it E8, the O(8) lookup, roles, addresses of fitted centres."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from constellation.errors import ConfigError
from constellation.geometry import e8

CARTAN = 2 * np.eye(8, dtype=int)  # of the diagram 1 - 3 - 4 - 5 - 6 - 7 - 8, 2 on 4
for a, b in [(1, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (2, 4)]:
    CARTAN[a - 1, b - 1] = CARTAN[b - 1, a - 1] = -1


def rotation(seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((8, 8)))[0]


# --- the roots


def test_240_distinct_roots_of_squared_length_2():
    r = e8.roots()
    assert r.shape == (240, 8) and len(np.unique(r, axis=0)) == 240
    assert np.array_equal((r**2).sum(1), np.full(240, 2.0))
    assert np.array_equal(r.T @ r, 60 * np.eye(8))
    doubled = (2 * r).astype(int)  # in the lattice: all integers or all halves, even sum
    assert (np.ptp(doubled % 2, axis=1) == 0).all() and (doubled.sum(1) % 4 == 0).all()


def test_every_root_sees_the_same_inner_products():
    for row in e8.roots() @ e8.roots().T:
        values, counts = np.unique(row, return_counts=True)
        assert dict(zip(values, counts)) == {2: 1, 1: 56, 0: 126, -1: 56, -2: 1}


def test_simple_roots_have_the_cartan_matrix_and_generate_all_roots_with_one_sign():
    simple = e8.simple_roots()
    assert np.array_equal(simple @ simple.T, CARTAN)
    assert np.linalg.det(simple @ simple.T) == pytest.approx(1)
    assert np.array_equal(e8.roots()[e8.simple_indices()], simple)
    coefficients = e8.roots() @ np.linalg.inv(simple)
    assert np.abs(coefficients - coefficients.round()).max() < 1e-12
    coefficients = coefficients.round()
    assert ((coefficients >= 0).all(1) ^ (coefficients <= 0).all(1)).all()
    assert coefficients.sum(1).max() == 29  # height of the highest root, Coxeter number 30 less 1


def test_reflections_permute_the_roots_and_undo_themselves():
    table, r = e8.reflections(), e8.roots()
    assert table.shape == (240, 240)
    for j in range(240):
        assert np.array_equal(np.sort(table[:, j]), np.arange(240))
        assert np.array_equal(table[table[:, j], j], np.arange(240))
        assert np.array_equal(r[table[:, j]], r - np.outer(r @ r[j], r[j]))
    assert np.array_equal(r[np.diag(table)], -r)


def test_neighbours_are_the_56_roots_at_60_degrees_both_ways():
    near, r = e8.neighbours(), e8.roots()
    assert near.shape == (240, 56)
    assert (np.einsum("nd,nkd->nk", r, r[near]) == 1).all()
    assert (np.diff(near, axis=1) > 0).all()
    assert all(i in near[j] for i in range(0, 240, 7) for j in near[i])
    # a split: reflecting a root in the mirror of a neighbour lands on a neighbour
    assert all(e8.reflections()[i, j] in near[i] for i in range(0, 240, 7) for j in near[i])


def test_tables_are_made_once_and_cannot_be_changed():
    for table in (e8.roots, e8.simple_roots, e8.simple_indices, e8.neighbours, e8.reflections):
        assert table() is table()
        with pytest.raises(ValueError):
            table()[0] = 0


# --- nearest root


def brute(x: torch.Tensor) -> torch.Tensor:
    return (x @ torch.from_numpy(e8.roots().copy()).to(x.dtype).T).argmax(-1)


def test_nearest_root_is_that_of_brute_force_on_twenty_thousand_points():
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(e8.nearest_root(x), brute(x))
    near = torch.from_numpy(e8.roots().copy()) + 0.3 * x[:240]  # the two forms compete hardest close to roots
    assert torch.equal(e8.nearest_root(near), brute(near))


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float64, 8, elements=st.one_of(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), st.floats(-3, 3))))
def test_no_root_is_nearer_even_on_ties_and_zeros(x):
    r = e8.roots()
    index = int(e8.nearest_root(torch.from_numpy(x)))
    assert 0 <= index < 240
    assert x @ r[index] >= (r @ x).max() - 1e-12


def test_a_root_is_nearest_to_itself_at_any_scale_and_in_float32():
    r = torch.from_numpy(e8.roots().copy())
    for scale in (1e-6, 1.0, 1e6):
        assert torch.equal(e8.nearest_root(scale * r), torch.arange(240))
        assert torch.equal(e8.nearest_root(scale * r.float()), torch.arange(240))


def test_nearest_root_commutes_with_the_weyl_group():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    table = torch.from_numpy(e8.reflections().copy())
    for j in range(0, 240, 11):
        mirrored = e8.reflect(x, torch.from_numpy(e8.roots()[j].copy()))
        assert torch.equal(e8.nearest_root(mirrored), table[e8.nearest_root(x), j])
        torch.testing.assert_close(mirrored.norm(dim=-1), x.norm(dim=-1))


def test_a_batch_gives_what_a_loop_gives():
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
    found = e8.nearest_root(x)
    assert found.shape == (3, 5) and found.dtype == torch.int64
    assert found.tolist() == [[int(e8.nearest_root(point)) for point in row] for row in x]


# --- addresses


@pytest.mark.parametrize("k, seed", [(8, 0), (8, 1), (16, 2), (60, 3), (240, 4)])
def test_turned_roots_are_recognised(k, seed):
    chosen = np.random.default_rng(seed).choice(240, k, replace=False)
    centres = e8.roots()[chosen] @ rotation(seed) * 0.3  # length does not matter
    match = e8.match_roots(centres)
    assert match.residual_rad < 1e-7
    found = e8.roots()[match.roots]
    np.testing.assert_allclose(
        found @ found.T, e8.roots()[chosen] @ e8.roots()[chosen].T, atol=1e-9
    )  # same arrangement
    np.testing.assert_allclose(found, np.sqrt(2) * _unit(centres) @ match.rotation.T, atol=1e-6)


def test_roots_that_moved_a_little_keep_their_addresses():
    shaken = e8.roots()[::4] + 0.1 * np.random.default_rng(0).standard_normal((60, 8))
    match = e8.match_roots(shaken)
    assert np.array_equal(match.roots, np.arange(0, 240, 4)) and match.residual_rad < 0.25


@pytest.mark.parametrize("k", [1, 8, 100, 240])
def test_any_centres_get_distinct_roots_and_an_isometry(k):
    centres = np.random.default_rng(k).standard_normal((k, 8))
    match = e8.match_roots(centres, starts=8)
    assert len(set(match.roots.tolist())) == k
    np.testing.assert_allclose(match.rotation @ match.rotation.T, np.eye(8), atol=1e-12)
    cos = (_unit(centres) @ match.rotation.T * e8.roots()[match.roots]).sum(1) / np.sqrt(2)
    np.testing.assert_allclose(match.angles_rad, np.arccos(np.clip(cos, -1, 1)), atol=1e-7)
    again = e8.match_roots(centres, starts=8)
    assert np.array_equal(again.roots, match.roots) and np.array_equal(again.rotation, match.rotation)


def test_the_null_of_the_residual_is_as_documented():
    draw = np.random.default_rng(5)
    for k, low, high in ((8, 12, 17), (64, 25, 30)):
        degrees = [np.degrees(e8.match_roots(draw.standard_normal((k, 8))).residual_rad) for _ in range(2)]
        assert low < np.mean(degrees) < high


def test_more_starts_never_fit_worse():
    centres = np.random.default_rng(7).standard_normal((8, 8))
    residuals = [e8.match_roots(centres, starts=n).residual_rad for n in (1, 10, 100)]
    assert residuals == sorted(residuals, reverse=True) and residuals[0] > residuals[-1]


def test_eight_centres_can_be_matched_to_the_eight_roles():
    order = np.random.default_rng(3).permutation(8)
    match = e8.match_roots(e8.simple_roots()[order] @ rotation(3), among=e8.simple_indices())
    assert sorted(match.roots.tolist()) == sorted(e8.simple_indices().tolist())
    assert match.residual_rad < 1e-7


@pytest.mark.parametrize(
    "centres, among, said",
    [
        (np.ones((3, 7)), None, r"\(3, 7\).*rows of 8"),
        (np.ones((241, 8)), None, r"\(241, 8\): 1 to 240"),
        (np.ones((0, 8)), None, r"\(0, 8\)"),
        (np.ones((9, 8)), np.arange(8), "1 to 8"),
        (np.eye(8) * [1, 1, 1, 0, 1, 1, 1, 1], None, "centre 3"),
        (np.full((2, 8), np.nan), None, "centre 0"),
    ],
)
def test_centres_that_cannot_be_matched_are_refused(centres, among, said):
    with pytest.raises(ConfigError, match=said):
        e8.match_roots(centres, among)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)
