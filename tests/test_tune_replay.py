"""A recorded sweep played again: what is exhaustive regrets nothing, what stops early costs less. No Ray here."""

from pathlib import Path

import pytest

from constellation.errors import ConfigError
from tests.recorded import record
from tune.history import read_history
from tune.replay import FIELDS, SweepReplay, main_text, replay


def laws(found: SweepReplay) -> None:
    for row in found.rows:
        for played in row.repeats:
            assert 0 <= played.utilisation <= 1 and 0 <= played.imputed <= 1
            assert played.makespan_s * row.workers >= played.utilisation * played.makespan_s * row.workers - 1e-6
            assert played.evaluations >= 1 and played.flops > 0
        for field in FIELDS:
            middle, low, high = row.mean(field)
            assert low <= middle <= high


def test_visiting_every_trial_regrets_nothing(tmp_path: Path) -> None:
    record(tmp_path, trials=20)
    found = replay(tmp_path, seeds=4)
    laws(found)
    recorded, asked, _ = found.rows
    assert recorded.mean("regret") == asked.mean("regret") == (0, 0, 0)
    assert asked.mean("flops")[0] == recorded.mean("flops")[0] == 20e12
    assert asked.mean("imputed")[0] == 0


@pytest.mark.parametrize("workers", [1, 3, 64])
def test_makespan_is_between_work_over_workers_and_work(tmp_path: Path, workers: int) -> None:
    record(tmp_path, trials=20)
    row = replay(tmp_path, seeds=1, workers=workers).rows[1]
    played, work = row.repeats[0], 20 * 90.0
    assert work / workers - 1e-6 <= played.makespan_s <= work + 1e-6
    assert played.makespan_s == pytest.approx(90 * -(-20 // workers))
    assert played.utilisation == pytest.approx(work / (workers * played.makespan_s))


def test_asha_costs_less_than_the_full_budget_and_finds_the_same(tmp_path: Path) -> None:
    record(tmp_path, trials=54, scheduler="asha", workers=4)
    asha, full = (replay(tmp_path, scheduler=name, seeds=3) for name in ("asha", "none"))
    laws(asha)
    assert asha.rows[1].mean("flops")[2] < 0.6 * full.rows[1].mean("flops")[1]
    assert asha.rows[1].mean("regret")[0] == pytest.approx(0, abs=0.01)


def test_random_search_is_not_flattered_by_the_few_that_went_on(tmp_path: Path) -> None:
    record(tmp_path, trials=54, scheduler="asha", workers=4)
    random = replay(tmp_path, seeds=10).rows[2]
    assert random.mean("imputed")[0] > 0.5  # it draws among all trials, stopped ones too
    assert random.mean("regret")[0] > 0


def test_replaying_the_same_workers_and_order_of_one_worker_is_the_recorded_sweep(tmp_path: Path) -> None:
    record(tmp_path, trials=12, workers=1)
    recorded, asked, _ = replay(tmp_path, seeds=2).rows
    assert {p.chosen for p in asked.repeats} == {recorded.repeats[0].chosen}
    assert asked.mean("makespan_s")[0] == pytest.approx(recorded.mean("makespan_s")[0])


def test_tpe_chooses_each_recorded_trial_once(tmp_path: Path) -> None:
    record(tmp_path, trials=24)
    found = replay(tmp_path, search="tpe", trials=12, seeds=2)
    laws(found)
    assert all(played.evaluations == 12 for played in found.rows[1].repeats)
    assert all(played.chosen in read_history(tmp_path).trials for played in found.rows[1].repeats)


def test_the_same_seeds_give_the_same_replay(tmp_path: Path) -> None:
    record(tmp_path, trials=18, scheduler="asha")
    assert replay(tmp_path, seeds=2) == replay(tmp_path, seeds=2)
    assert '"rows"' in main_text(tmp_path, seeds=1, as_json=True)
    assert "regret" in main_text(tmp_path, seeds=1)


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"scheduler": "asha"}, "needs runs of 0.111 of the budget, recorded are 1;"),
        ({"scheduler": "pbt"}, "pbt cannot be replayed"),
        ({"trials": 99}, "trials=99: the record holds 12"),
        ({"trials": 0}, "trials=0"),
        ({"search": "annealing"}, "--search annealing"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(tmp_path: Path, asked: dict, says: str) -> None:
    record(tmp_path, trials=12)
    with pytest.raises(ConfigError, match=says):
        replay(tmp_path, seeds=1, **asked)


def test_a_sweep_without_results_cannot_be_replayed(tmp_path: Path) -> None:
    record(tmp_path, trials=5, fails=lambda settings: True)
    with pytest.raises(ConfigError, match="fewer than two trials"):
        replay(tmp_path, seeds=1)
