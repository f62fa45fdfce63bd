"""Comparisons, importance and the rate across sizes against oracles and sweeps of known truth. No Ray here."""

import math

import numpy as np
import optuna
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tests.recorded import METRIC, RATE
from tune.analysis import Standings, best_so_far, differences, rung_correlations, spent
from tune.history import Cost, Evaluation, History, Outcome, Trial
from tune.importance import importances, searched
from tune.transfer import transfer

SPACE = [
    {"name": "lr", "prior": "log", "low": 1e-4, "high": 1.0, "default": 1e-2},
    {"name": "unused", "prior": "uniform", "low": 0.0, "high": 1.0, "default": 0.5},
    {"name": "layers", "prior": "int", "low": 1, "high": 8, "default": 2},
    {"name": "kind", "prior": "choice", "values": ["a", "b", "c"], "default": "a"},
]


def history_of(loss_TRS: np.ndarray, **request: object) -> History:
    """NaN: no evaluation; infinity: a failed one. Each takes 1 s, 2 CPU-seconds and 10 FLOPs, one after another."""
    history, clock = History({"rungs": [1.0] * loss_TRS.shape[1], **request}), 0.0
    for t, r, s in np.argwhere(~np.isnan(loss_TRS)):
        history.trials.setdefault(int(t), Trial(int(t), {}, "random" if t else "default"))
        value = float(loss_TRS[t, r, s])
        done = math.isfinite(value)
        history.outcomes[Evaluation(int(t), int(r), int(s))] = Outcome(
            "done" if done else "failed", value if done else None, "", Cost(1.0, 10.0, 2.0, 1.0), 1, clock, clock + 1
        )
        clock += 1
    return history


def draw(n: int, seed: int) -> tuple[list[dict], np.ndarray]:
    rng = np.random.default_rng(seed)
    settings = [
        {
            "lr": float(10 ** rng.uniform(-4, 0)), "unused": float(rng.random()), "layers": int(rng.integers(1, 9)),
            "kind": str(rng.choice(["a", "b", "c"])),
        }
        for _ in range(n)
    ]  # fmt: skip
    loss = [(math.log10(s["lr"]) + 2) ** 2 + 0.1 * (s["layers"] - 4) ** 2 + 0.5 * (s["kind"] == "b") for s in settings]
    return settings, np.argsort(np.argsort(np.array(loss) + rng.normal(0, 0.05, n))).astype(float)


@given(st.integers(0, 1000), st.integers(2, 6), st.integers(2, 8))
def test_paired_differences_are_scipys_t_test_with_holm(seed: int, seeds: int, trials: int) -> None:
    rng = np.random.default_rng(seed)
    loss = rng.normal(0, 1, (trials, 1, 1)) + rng.normal(0, 5, (1, 1, seeds)) + rng.normal(0, 0.3, (trials, 1, seeds))
    found = differences(Standings.of(history_of(loss)), 0)
    tests = {t: scipy.stats.ttest_rel(loss[t, 0], loss[0, 0]) for t in range(1, trials)}
    for t, test in tests.items():
        interval = test.confidence_interval(0.95)
        assert found[t].p == pytest.approx(test.pvalue)
        assert (found[t].low, found[t].high) == (pytest.approx(interval.low), pytest.approx(interval.high))
        assert found[t].p_holm >= found[t].p
        assert found[t].p_holm <= min(1.0, (trials - 1) * found[t].p) * (1 + 1e-12)
    smallest = min(found, key=lambda t: found[t].p)
    assert found[smallest].p_holm == pytest.approx(min(1.0, (trials - 1) * found[smallest].p))


def test_pairing_sees_what_the_noise_of_seeds_hides() -> None:
    rng = np.random.default_rng(0)
    shift = rng.normal(0, 1, 5)
    loss = np.stack([shift, shift + 0.1 + rng.normal(0, 0.005, 5)])[:, None]
    assert differences(Standings.of(history_of(loss)), 0)[1].verdict == "different"
    assert scipy.stats.ttest_ind(loss[1, 0], loss[0, 0]).pvalue > 0.5


def test_only_seeds_that_both_have_are_compared() -> None:
    loss = np.array([[[1.0, 5.0, 9.0]], [[np.nan, 5.5, 9.4]], [[np.nan, np.nan, 8.0]]])
    found = differences(Standings.of(history_of(loss)), 0)
    assert found[1].seeds == 2 and found[1].mean == pytest.approx(0.45)
    assert found[2].mean == -1.0 and found[2].low is None and found[2].verdict == "one seed: no interval"


def test_equal_trials_differ_by_exactly_nothing() -> None:
    found = differences(Standings.of(history_of(np.array([[[1.0, 2.0]], [[1.0, 2.0]]]))), 0)[1]
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert found.verdict == "no difference at this budget"


def test_the_best_is_sought_among_the_trials_with_most_seeds() -> None:
    standings = Standings.of(history_of(np.array([[[1.0, 1.2]], [[0.5, np.nan]], [[1.1, 1.3]]])))
    assert standings.best() == 0


def test_a_higher_rung_comes_before_a_better_loss_at_a_lower_one() -> None:
    loss = np.array([[[1.0], [np.nan]], [[2.0], [1.9]], [[3.0], [1.5]], [[np.inf], [np.nan]]])
    assert Standings.of(history_of(loss)).order_T().tolist()[:3] == [2, 1, 0]
    assert np.isnan(Standings.of(history_of(loss)).order_T()[3])


@pytest.mark.slow
def test_intervals_of_paired_differences_cover_the_truth_as_often_as_they_say() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(1000):
        shift = rng.normal(0, 1, 3)
        loss = np.stack([shift + rng.normal(0, 0.1, 3), shift + 0.2 + rng.normal(0, 0.1, 3)])[:, None]
        found = differences(Standings.of(history_of(loss)), 0)[1]
        hits += found.low <= 0.2 <= found.high
    assert scipy.stats.binomtest(hits, 1000, 0.95).pvalue > 0.001


def test_rungs_that_correlate_and_rungs_that_do_not() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, 60)
    loss = np.stack([truth, truth + rng.normal(0, 0.1, 60), rng.normal(0, 1, 60)], 1)[:, :, None]
    near, far, _ = rung_correlations(Standings.of(history_of(loss)))
    assert near.rho == pytest.approx(scipy.stats.spearmanr(loss[:, 0, 0], loss[:, 1, 0]).statistic)
    assert near.low < near.rho < near.high and near.verdict == "correlated"
    assert "not shown to correlate" in far.verdict
    few = rung_correlations(Standings.of(history_of(loss[:5])))[0]
    assert few.verdict.startswith("too few pairs (5")


def test_failed_and_stopped_evaluations_are_charged() -> None:
    loss = np.array([[[1.0], [0.9]], [[2.0], [np.nan]], [[np.inf], [np.nan]], [[1.1], [0.5]]])
    history = history_of(loss)
    standings = Standings.of(history)
    total = spent(history, standings)
    assert [total[fate]["evaluations"] for fate in ("full", "lower", "failed", "all")] == [2, 3, 1, 6]
    assert total["all"]["flops"] == 60
    curve = best_so_far(history, standings)
    assert curve.flops_N.tolist() == [10, 20, 30, 40, 50, 60] and curve.cpu_s_N[-1] == 12
    assert curve.metric_N[1:].tolist() == [0.9, 0.9, 0.9, 0.9, 0.5] and np.isnan(curve.metric_N[0])


@pytest.mark.parametrize("n", [60, 300])
def test_importance_is_optunas_ped_anova(n: int) -> None:
    settings, order = draw(n, 0)
    kinds = optuna.distributions
    distributions = {
        "lr": kinds.FloatDistribution(1e-4, 1, log=True), "unused": kinds.FloatDistribution(0, 1),
        "layers": kinds.IntDistribution(1, 8), "kind": kinds.CategoricalDistribution(["a", "b", "c"]),
    }  # fmt: skip
    study = optuna.create_study()
    study.add_trials([
        optuna.trial.create_trial(params=s, distributions=distributions, value=float(v))
        for s, v in zip(settings, order)
    ])  # fmt: skip
    theirs = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25).evaluate(study)
    ours = {i.name: i.value for i in importances(searched({"space": SPACE}), settings, order)}
    scale = 0.25**2  # Optuna's is times the quantile squared
    assert {name: value * scale for name, value in ours.items()} == pytest.approx(theirs, rel=1e-6)


def test_what_matters_comes_first_and_what_does_not_is_noise() -> None:
    settings, order = draw(600, 3)
    found = importances(searched({"space": SPACE}), settings, order)
    assert [i.name for i in found][:2] == ["lr", "layers"]
    assert {i.name: i.verdict for i in found}["unused"] == "not distinguishable from noise"
    assert all(i.low <= i.value <= i.high for i in found)
    assert [i.verdict for i in found][:3] == ["matters"] * 3


def test_shuffled_metrics_make_nothing_important() -> None:
    settings, _ = draw(60, 0)
    false = 0
    for seed in range(12):
        order = np.random.default_rng(seed).permutation(60).astype(float)
        false += sum(i.verdict == "matters" for i in importances(searched({"space": SPACE}), settings, order))
    assert false <= 3  # of 48; 2.5 % are expected at most


def test_nine_trials_have_no_importance() -> None:
    settings, order = draw(9, 0)
    assert importances(searched({"space": SPACE}), settings, order) == []


def sizes(widths: tuple[int, ...], depths: tuple[int, ...], power: float, names: tuple[str, ...] = ("",)) -> History:
    """lr* = .01 (width / 64)^power (depth / 2)^-1/4, two seeds, a parabola in ln(lr) and noise."""
    rng = np.random.default_rng(0)
    entries = [
        {"name": "optim.lr", "prior": "log", "low": 1e-4, "high": 1e-1, "default": 1e-2},
        {"name": "kernel.width", "prior": "choice", "values": list(widths), "default": 64},
        {"name": "kernel.layers", "prior": "choice", "values": list(depths), "default": 2},
        {"name": "optim.variant", "prior": "choice", "values": list(names), "default": names[0]},
    ]
    history = History({"space": {"dimensions": entries}})
    for name in names:
        for width in widths:
            for depth in depths:
                for rate in np.geomspace(1e-4, 1e-1, 13).tolist():
                    number = len(history.trials)
                    settings = {"optim.lr": rate, "kernel.width": width, "kernel.layers": depth, "optim.variant": name}
                    history.trials[number] = Trial(number, settings, "grid")
                    bend = power if name != "flat" else 0.0
                    best = 0.01 * (width / 64) ** bend * (depth / 2) ** -0.25
                    for seed in range(2):
                        loss = 2 + 0.05 * math.log(rate / best) ** 2 + rng.normal(0, 0.003)
                        history.outcomes[Evaluation(number, 0, seed)] = Outcome("done", float(loss))
    return history


def test_the_exponents_of_a_known_law_are_recovered() -> None:
    history = sizes((64, 128, 256, 384), (2, 4, 8), -0.5)
    (rule,) = transfer(history, Standings.of(history))
    assert rule.exponents == {"width": pytest.approx(-0.5, abs=0.03), "depth": pytest.approx(-0.25, abs=0.05)}
    assert rule.intervals["width"][0] < -0.5 < rule.intervals["width"][1]
    last = rule.optima[-1]
    regret = 0.05 * math.log(6**0.5 * 4**0.25) ** 2
    assert last.regret == pytest.approx(regret, rel=0.15) and rule.optima[0].regret == 0


def test_every_scaling_of_the_update_has_a_rule_of_its_own() -> None:
    history = sizes((64, 128, 256), (2,), -0.5, ("match", "flat"))
    match, flat = transfer(history, Standings.of(history))
    assert match.group == {"optim.variant": "match"} and set(match.exponents) == {"width"}
    assert match.exponents["width"] == pytest.approx(-0.5, abs=0.05)
    assert flat.exponents["width"] == pytest.approx(0, abs=0.05)


def test_an_optimum_outside_the_rates_tried_is_not_invented() -> None:
    history = sizes((64, 128, 65536), (2,), -0.9)
    (rule,) = transfer(history, Standings.of(history))
    assert rule.optima[-1].rate is None and "try lower ones" in rule.optima[-1].note


def test_a_space_without_sizes_has_no_transfer() -> None:
    history = history_of(np.ones((3, 1, 1)), space=[vars(RATE), vars(METRIC)])
    assert transfer(history, Standings.of(history)) == []
