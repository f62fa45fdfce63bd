"""The report of a sweep from its log alone: whole, torn, under way, failed. No Ray here."""

import json
from pathlib import Path

import pytest

from constellation.errors import ArtifactError
from tests.recorded import record
from tune.events import LOG
from tune.report import report


def read(out: Path) -> tuple[str, dict]:
    return (out / "report.md").read_text(), json.loads((out / "report.json").read_text())


def test_says_what_won_by_how_much_and_what_it_cost(tmp_path: Path) -> None:
    record(tmp_path, trials=60, seeds=5)
    report(tmp_path)
    text, data = read(tmp_path)
    assert data["best"]["settings"]["kernel.metric"] == "fidelity"
    assert data["best"]["settings"]["optim.lr"] == pytest.approx(1e-2, rel=1)
    assert "Against the default: -" in text and "paired seeds" in text and "Holm" in text
    assert data["importance"][0]["name"] == "optim.lr" and data["importance"][0]["verdict"] == "matters"
    warmup = next(i for i in data["importance"] if i["name"] == "train.warmup")
    assert warmup["verdict"] == "not distinguishable from noise"
    assert len(data["trials"]) == 60 and data["finished"]
    assert sum(t["cost"]["flops"] for t in data["trials"]) == pytest.approx(data["spent"]["all"]["flops"])
    for sentence in data["words"]:
        assert sentence in text


def test_noise_is_not_sold_as_a_win(tmp_path: Path) -> None:
    record(tmp_path, trials=20, seeds=3, noise=0.1, loss=lambda settings: 2.0)
    found = report(tmp_path)
    assert found.best == found.default or found.beats_default is not None
    gap = found.beats_default
    assert gap is None or gap.p_holm is None or gap.p_holm > 0.05
    assert all(d.verdict != "different" for d in found.to_best.values())


def test_with_one_seed_no_interval_is_invented(tmp_path: Path) -> None:
    record(tmp_path, trials=20)
    report(tmp_path)
    text, data = read(tmp_path)
    assert "No interval can be given" in text
    assert all(t["to_best"] is None or t["to_best"]["low"] is None for t in data["trials"])


def test_rungs_are_held_against_each_other(tmp_path: Path) -> None:
    record(tmp_path, trials=40, scheduler="asha")
    report(tmp_path)
    text, data = read(tmp_path)
    assert [(r["lower"], r["higher"]) for r in data["rungs"]] == [(0, 1), (0, 2), (1, 2)]
    assert data["rungs"][0]["verdict"] == "correlated" and "## Rungs" in text
    assert {t["status"] for t in data["trials"]} == {"done", "stopped"}


def test_everything_failed(tmp_path: Path) -> None:
    record(tmp_path, trials=12, seeds=3, fails=lambda settings: True)
    report(tmp_path)
    text, data = read(tmp_path)
    assert data["best"] is None and "No evaluation has succeeded" in text
    assert "Failed 12 times: diverged at step 12." in text
    assert {t["status"] for t in data["trials"]} == {"failed"}
    assert data["spent"]["failed"]["cpu_s"] == 12 * 80


def test_one_trial(tmp_path: Path) -> None:
    record(tmp_path, trials=1)
    report(tmp_path)
    assert "That is the default configuration: the sweep found nothing better." in read(tmp_path)[0]


def test_any_beginning_of_a_log_has_a_report(tmp_path: Path) -> None:
    record(tmp_path / "whole", trials=12, seeds=2, scheduler="asha", fails=lambda settings: settings["optim.lr"] > 0.2)
    lines = (tmp_path / "whole" / LOG).read_bytes().splitlines(keepends=True)
    out = tmp_path / "part"
    out.mkdir()
    for number in range(1, len(lines), 5):
        (out / LOG).write_bytes(b"".join(lines[:number]) + lines[number][:7])  # and a torn line
        found = report(out)
        assert found.history.finished is False
        assert "has not finished" in read(out)[0]


def test_a_damaged_log_is_one_line(tmp_path: Path) -> None:
    record(tmp_path, trials=3)
    lines = (tmp_path / LOG).read_text().splitlines(keepends=True)
    (tmp_path / LOG).write_text("".join([*lines[:2], "{}\n", *lines[2:]]))
    with pytest.raises(ArtifactError, match=rf"{LOG}:3 is damaged"):
        report(tmp_path)
    with pytest.raises(ArtifactError, match="constellation tune writes it"):
        report(tmp_path / "nowhere")


def test_every_plot_of_a_sweep_with_failures(tmp_path: Path) -> None:
    record(tmp_path, trials=30, seeds=3, scheduler="asha", fails=lambda settings: settings["optim.lr"] > 0.2)
    report(tmp_path, plots=True)
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    for name in ("ranking", "importance", "best_so_far", "parallel", "slices", "contour"):
        assert {f"{name}.png", f"{name}.svg"} <= names
        assert f"plots/{name}.png" in read(tmp_path)[0]


def test_plots_of_nothing_are_none(tmp_path: Path) -> None:
    record(tmp_path, trials=2, fails=lambda settings: True)
    report(tmp_path, plots=True)
    assert list((tmp_path / "plots").iterdir()) == []
