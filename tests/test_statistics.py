"""The interval and the corrections, against closed forms and planted effects."""

import numpy as np
import pytest
import scipy.stats

from constellation.experiments.statistics import difference, holm

BYTES = np.random.default_rng(0).integers(500, 8000, 60)


def arms(effect: float, noise: float = 0.02, seeds: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    b = BYTES * (1.9 + generator.normal(0, 0.3, len(BYTES))) * np.ones((seeds, 1))
    return b + BYTES * (effect + generator.normal(0, noise, (seeds, len(BYTES)))), b


def test_equal_arms_differ_by_exactly_nothing() -> None:
    a, _ = arms(0.0)
    d = difference(a, a, BYTES)
    assert (d.mean, d.low, d.high, d.verdict) == (0, 0, 0, "no difference shown") and d.p_value != d.p_value


def test_a_planted_effect_is_found_and_lies_in_its_interval() -> None:
    d = difference(*arms(-0.08), BYTES)
    assert d.low < -0.08 < d.high < -0.01 and d.verdict == "better" and d.p_value < 0.01
    assert difference(*arms(0.08), BYTES).verdict == "worse"


def test_an_effect_within_the_margin_is_not_declared() -> None:
    assert difference(*arms(-0.005), BYTES).verdict == "no difference shown"


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator, inside = np.random.default_rng(2), 0
    size = np.full(40, 1000)
    for trial in range(60):
        gap = generator.normal(-0.03, 0.05, (8, 40)) + generator.normal(0, 0.01, (8, 1))
        d = difference(gap * size, np.zeros((8, 40)), size, seed=trial)
        inside += d.low <= -0.03 <= d.high
    assert inside >= 50


def test_the_p_value_is_the_paired_t_test_over_seeds() -> None:
    a, b = arms(-0.01, noise=0.1)
    per_seed = [a.sum(1) / BYTES.sum(), b.sum(1) / BYTES.sum()]
    assert difference(a, b, BYTES).p_value == pytest.approx(scipy.stats.ttest_rel(*per_seed, alternative="less").pvalue)


def test_holm_against_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.01, float("nan")])
    assert adjusted[0] == pytest.approx(0.02) and adjusted[1] != adjusted[1]
