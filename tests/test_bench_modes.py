"""bench modes: what it reports of a run, and how it chooses."""

import json
from pathlib import Path

import pytest

from constellation.cli import run as command
from constellation.experiments.bench_modes import MODES, WORTH, cost, held_out, winner


def test_the_winner_is_the_better_one_at_equal_speed_and_the_faster_one_of_equals() -> None:
    rows = {
        "slow": {"bits_per_byte": 2.0, "tokens_per_s": 10.0},
        "fast": {"bits_per_byte": 2.0, "tokens_per_s": 20.0},
        "good": {"bits_per_byte": 1.9, "tokens_per_s": 10.0},
    }
    assert cost(rows["slow"]) - cost(rows["fast"]) == pytest.approx(WORTH)
    assert winner(rows) == "good"
    assert winner({name: rows[name] for name in ("slow", "fast")}) == "fast"
    dear = {"dear": {"bits_per_byte": 2.0 - 0.9 * WORTH, "tokens_per_s": 10.0}, "fast": rows["fast"]}
    assert winner(dear) == "fast", "not worth a doubling of the time"


def test_text_that_was_trained_on_is_not_measured(micro_run: Path, micro_corpus: Path) -> None:
    texts = held_out(micro_run, micro_corpus, 5000)
    own = held_out(micro_run, None, 10**9)
    assert 0 < sum(map(len, texts)) <= 5000
    assert all(any(whole.startswith(text) for whole in own) for text in texts), "of this corpus the rest was trained on"


def test_every_mode_is_measured_in_quality_and_cost(
    micro_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["bench", "modes", "--run", str(micro_run), "--bytes", "600", "--answers", "1", "--tokens", "24", "--local"]
    assert command([*words, "--out", str(tmp_path / "modes.json")]) == 0
    shown, result = capsys.readouterr().out, json.loads((tmp_path / "modes.json").read_text())
    assert set(result["modes"]) == {mode.name for mode in MODES} == set(shown.split()) & {m.name for m in MODES}
    for name, row in result["modes"].items():
        assert 0 < row["bits_per_byte"] < 8 and row["tokens_per_s"] > 0
        assert (row["readings_per_token"] > 0) == (name[-1] in "23")
    assert result["wins"] in result["modes"] and f"wins for its cost: {result['wins']}" in shown
    assert set(result["overhead"]) == {"process", "http"} and result["overhead"]["process"]["more_us_per_token"] == 0
