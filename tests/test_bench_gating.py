"""`bench gating`: arms differ by their gates alone, effects are paired, and the command writes what it prints."""

import json
import math

import pytest
from click.testing import CliRunner

from constellation.commands.bench import command as bench_command
from constellation.errors import ConfigError
from constellation.experiments import bench_gating as bench
from constellation.experiments.optim_tasks import TASKS, prepare


def test_an_effect_is_paired_and_a_control_against_itself_is_nothing() -> None:
    control = [1.0, 10.0, 100.0]
    found = bench.effect([0.9, 9.0, 90.0], control)
    assert found["mean"] == pytest.approx(math.log(0.9)), "the spread between seeds is not the effect's"
    assert bench.verdict(bench.effect([0.90, 9.01, 89.9], control)).endswith("better")
    assert bench.verdict(bench.effect([1.2, 9.0, 99.0], control)).endswith("no difference shown")
    assert bench.verdict(bench.effect([1.21, 12.0, 120.5], control)).endswith("worse")
    assert "no interval" in bench.verdict(bench.effect([2.0], [1.0]))


@pytest.mark.parametrize("arm", bench.ARMS)
def test_an_arm_opens_when_its_name_says(arm: str, tmp_path) -> None:
    data = tmp_path / "data"
    prepare(None, None, data)
    optimizer = bench.optimizer_of(bench.GatedRun("digits", arm, 1, 1e-3, 0.1, 1.0), TASKS["digits"].build(data, 1))
    opened = [bool(optimizer.should_apply_ng({"progress": p / 10, "kappa_eff": 1.0}, step=p + 1)) for p in range(10)]
    expected = {
        "pays": [True] * 10,
        "always": [True] * 10,
        "front": [True] * 4 + [False] * 6,
        "back": [False] * 7 + [True] * 3,
    }
    assert opened == expected.get(arm, [False] * 10)


def test_the_command_writes_what_it_prints(tmp_path) -> None:
    out = tmp_path / "gating.json"
    command = ["gating", "--seconds", "1", "--seeds", "2", "--arms", "always", "--workers", "1"]
    done = CliRunner().invoke(bench_command, [*command, "--work", str(tmp_path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert set(result["problems"]) == {"basin", "digits", "poisson"}
    for part in result["problems"].values():
        arms = part["arms"]
        assert arms["never"]["natural_rate"] == 0.0 and arms["always"]["natural_rate"] == 1.0
        assert arms["always"]["verdict"] in done.output
    with pytest.raises(ConfigError, match="--arms sometimes: choose from never"):
        bench.run(seconds=1, arms=("sometimes",), work=tmp_path)
