"""Runs on disk: whole or none after a kill at any byte, older versions read, tables from summaries alone, plots."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from constellation.artifacts import experiment, schema, table
from constellation.artifacts.layout import cut, layout_hash, layout_of
from constellation.artifacts.run import CHANNELS, RunFolder, Trace
from constellation.artifacts.saved import open_run
from constellation.artifacts.signal import Signal, read_signals, write_signals
from constellation.cli import run as command
from constellation.config import override
from constellation.errors import ArtifactError, ConfigError
from constellation.plots.panel import curves, panel, scaled
from constellation.plots.recipes import RECIPES
from constellation.presets import tiny
from constellation.telemetry.step import Step

BLOCKS = [
    {"name": "w", "shape": [2, 3], "dtype": "torch.float32"},
    {"name": "b", "shape": [2], "dtype": "torch.float32"},
]


def write(path: Path, states: int = 6, lr: float = 1e-3, offset: float = 0.0) -> Path:
    """A small run, as training writes one."""
    folder = RunFolder(path)
    folder.begin(override(tiny(), {"optim.lr": lr}), "heart", BLOCKS, {"steps": states - 1})
    trace = Trace()
    for i in range(states):
        state = {"step": i, "tokens": 1000 * i, "loss_nats": 3.0 / (i + 1) + offset, "grad_norm": 1.0, "lr": lr}
        trace.append(np.full(8, i, np.float32) * np.arange(8), **state)
    folder.log(
        Step("heart", i, states - 1, 1000 * i, 1.0, 1.0, lr, 60.0, 2.0 / i, measured={"kappa": 0.1 * i})
        for i in range(1, states)
    )
    folder.write_trace(trace.arrays())
    loss = trace.arrays()["loss_nats"]
    folder.summarise(status="done", role="heart", steps=states - 1, last_loss_nats=float(loss[-1]), runtime_s=1.0)
    return path


# -- whole or none --------------------------------------------------------------------------------------------------


def killed(path: Path, limit: int) -> int:
    """Write a longer run into `path` in a process that the kernel kills when a file would pass `limit` bytes."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            write(path, 60)
            write_signals(path / "signals.npz", open_run(path).signals)
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_a_writer_killed_at_any_byte_leaves_a_valid_run_or_none(tmp_path: Path) -> None:
    before, ends = write(tmp_path / "before"), set()
    for limit in [0, 1, *(int(200 * 1.17**i) for i in range(34))]:
        fresh, old = tmp_path / f"fresh{limit}", tmp_path / f"old{limit}"
        shutil.copytree(before, old)
        assert killed(fresh, limit) in (0, signal.SIGXFSZ) and killed(old, limit) in (0, signal.SIGXFSZ)
        run = open_run(old)
        assert len(run.trace["step"]) in (6, 60) and run.signals and run.summary["status"] == "done"
        try:
            run = open_run(fresh)
        except ArtifactError as error:
            assert "no meta.json" in str(error)
            ends.add("none")
            continue
        assert len(run.trace["step"]) in (0, 60) and run.summary["status"] in ("running", "done")
        assert all(step["step"] for step in run.steps) and run.signals
        ends.add(run.summary["status"])
    assert ends == {"none", "running", "done"}


@pytest.mark.parametrize("name", ["trace.npz", "signals.npz"])
def test_a_changed_byte_is_noticed(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "r")
    write_signals(path / "signals.npz", open_run(path).signals)
    whole = (path / name).read_bytes()
    before = {n: s.values.tobytes() for n, s in open_run(path).signals.items()}
    for place in range(0, len(whole), 41):
        (path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            found = open_run(path).signals
        except ArtifactError as error:
            assert name in str(error) and "\n" not in str(error)
        else:  # a byte that means nothing, such as a date
            assert {n: s.values.tobytes() for n, s in found.items()} == before


# -- what is in it --------------------------------------------------------------------------------------------------


def test_a_layout_finds_every_block_of_theta() -> None:
    blocks = layout_of([*BLOCKS, {"name": "t", "shape": [], "dtype": "torch.float32", "unit": "s"}])
    parts = cut(np.arange(18.0).reshape(2, 9), blocks)
    assert parts["w"].shape == (2, 2, 3) and parts["b"][1].tolist() == [15, 16] and parts["t"].tolist() == [8, 17]
    other = layout_of([{**BLOCKS[0], "unit": "m"}, *BLOCKS[1:]])
    assert layout_hash(other) != layout_hash(layout_of(BLOCKS)) and [b["unit"] for b in blocks] == ["1", "1", "s"]
    with pytest.raises(ArtifactError, match="theta has 5 entries, its layout 9"):
        cut(np.zeros(5), blocks)


def test_files_of_the_first_version_are_read_as_the_newest(tmp_path: Path) -> None:
    path = write(tmp_path / "r")
    new = open_run(path)
    meta = {"schema": 1, "run_id": "heart-0", "config": new.meta["config"], "layout": BLOCKS}
    (path / "meta.json").write_text(json.dumps(meta))
    (path / "summary.json").write_text(json.dumps({"schema": 1, "status": "done", "last_loss_nats": 0.5}))
    old = open_run(path)
    assert old.meta["layout"] == new.meta["layout"] and old.meta["layout_hash"] == new.meta["layout_hash"]
    assert old.summary["changes"] == {} and old.summary["schema"] == schema.NEWEST["summary"]
    for version in (0, 99, "2", None):
        (path / "summary.json").write_text(json.dumps({"schema": version}))
        with pytest.raises(ArtifactError, match="this version reads 1 to 2"):
            _ = open_run(path).summary


def test_signals_derive_from_the_trace_and_a_missing_one_is_named(tmp_path: Path) -> None:
    run = open_run(write(tmp_path / "r"))
    assert run.signal("loss_nats").values.tolist() == run.trace["loss_nats"].tolist()
    smooth, loss = run.signal("loss_smooth").values, run.trace["loss_nats"]
    np.testing.assert_allclose(smooth[2], 0.9 * (0.9 * loss[0] + 0.1 * loss[1]) + 0.1 * loss[2])
    assert run.signal("wall_s").values.tolist() == [60, 120, 180, 240, 300] and run.signal("kappa").step[-1] == 5
    np.testing.assert_allclose(run.signal("update").values, np.tile(np.arange(8.0), (5, 1)))
    with pytest.raises(ArtifactError, match=r"has no signal 'phi'; it has dev_bits_per_byte, grad_norm, kappa"):
        run.signal("phi")


def test_signals_come_back_as_they_were(tmp_path: Path) -> None:
    values, step = np.random.default_rng(0).normal(size=(4, 3)), np.arange(4)
    whole = Signal(values, step, "rad", np.abs(values), values[0], "an angle")
    write_signals(tmp_path / "signals.npz", {"a": whole, "b/c d": Signal(values[:, 0], step)})
    found = read_signals(tmp_path / "signals.npz")
    assert list(found) == ["a", "b/c d"] and (found["a"].unit, found["a"].meaning) == ("rad", "an angle")
    for name in ("values", "step", "stderr", "truth"):
        assert np.array_equal(getattr(found["a"], name), getattr(whole, name))
    assert found["b/c d"].truth is None and np.array_equal(found["a"].residual().values, values - values[0])
    with pytest.raises(ConfigError, match="a step a row"):
        Signal(values, step[:3])


# -- tables ---------------------------------------------------------------------------------------------------------


def test_an_experiment_has_one_table_of_its_summaries(tmp_path: Path) -> None:
    own = experiment.begin(tmp_path / "e", "which rate?", seeds=3)
    for i, lr in enumerate((1e-3, 1e-2, 1e-1)):
        write(own.folder(f"lr={lr}"), lr=lr, offset=float(i))
        (own.folder(f"lr={lr}") / "trace.npz").unlink()  # summaries alone
    (own.folder("lr=0.1") / "summary.json").write_text("{")
    again = experiment.begin(tmp_path / "e", "which rate?")
    rows = again.rows()
    assert [row["run"] for row in rows] == ["runs/lr=0.001", "runs/lr=0.01", "runs/lr=0.1"]
    assert rows[1]["optim.lr"] == 1e-2 and rows[2]["status"] == "damaged" and "damaged" in rows[2]["failure"]
    text, columnar = again.write_table()
    found = parquet.read_table(columnar).to_pylist()
    assert [row["last_loss_nats"] for row in found] == [0.5, 1.5, None] and len(text.read_text().splitlines()) == 4
    with pytest.raises(ConfigError, match="asks 'which rate\\?'"):
        experiment.begin(tmp_path / "e", "another?")
    with pytest.raises(ConfigError, match="run id"):
        own.folder("../e")
    with pytest.raises(ArtifactError, match="missing"):
        experiment.open_experiment(tmp_path)


def test_conditions_and_order() -> None:
    rows: list[dict[str, Any]] = [
        {"run": "a", "x": 1, "s": "yes"},
        {"run": "b", "x": 2.5},
        {"run": "c", "s": "no", "x": None},
    ]
    names = {
        ("x>=1",): "ab", ("x>1", "run!=a"): "b", ("s=yes",): "a", ("s~o",): "c", ("x!=1",): "bc", ("x=1.0",): "a",
        (): "abc",
        ("x=yes",): "",
    }  # fmt: skip
    for conditions, wanted in names.items():
        assert "".join(row["run"] for row in table.select(rows, conditions)) == wanted, conditions
    assert [row["run"] for row in table.ordered(rows, "x", reverse=True)] == ["b", "a", "c"]
    for wrong in ("x", "=3", "y=3"):
        with pytest.raises(ConfigError):
            table.select(rows, [wrong])


# -- the commands ---------------------------------------------------------------------------------------------------


def test_runs_are_listed_compared_and_diffed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, lr in enumerate((1e-3, 1e-2)):
        write(tmp_path / f"r{i}", lr=lr, offset=1.0 - i)

    def told(*words: str) -> Any:
        assert command(["runs", str(tmp_path), *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert [row["run"] for row in told("--sort", "last_loss_nats")] == ["r1", "r0"]
    assert [row["run"] for row in told("--filter", "optim.lr>0.005")] == ["r1"]
    assert told("--diff", "r0,r1") == {"optim.lr": [1e-3, 1e-2]}
    assert told("--compare", "r0,r1")["last_loss_nats"] == {"r0": 1.5, "r1": 0.5}
    assert command(["runs", str(tmp_path), "--write"]) == 0 and (tmp_path / "table.parquet").exists()
    for wrong in (
        ["--diff", "r0"],
        ["--diff", "r0,r9"],
        ["--columns", "nope"],
        ["--filter", "status"],
        ["--sort", "x"],
    ):
        assert command(["runs", str(tmp_path), *wrong]) == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert command(["runs", str(tmp_path)]) == 0 and "r1" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_plot_is_a_picture_of_every_panel(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs, out = [str(write(tmp_path / f"r{i}", offset=float(i))) for i in range(2)], tmp_path / f"p.{ending}"
    words = [word for one in ("loss_nats,lr", "theta:hybrid=2", "update") for word in ("--panel", one)]
    assert command(["plot", *runs, *words, "--x", "tokens", "--out", str(out)]) == 0
    head = out.read_bytes()
    assert head.startswith(b"\x89PNG" if ending == "png" else b"<?xml") and len(head) > 10_000
    assert command(["plot", *runs, *words, "--x", "tokens", "--out", str(out)]) == 0 and out.read_bytes() == head
    capsys.readouterr()


@pytest.mark.parametrize("recipe", ["kernels", "constellations", "optimizers"])
def test_a_recipe_draws_what_the_runs_have(tmp_path: Path, recipe: str) -> None:
    drawn = RECIPES[recipe]([write(tmp_path / f"r{i}") for i in range(2)], "step")
    assert drawn[0].title == "loss_smooth" and all(len(axes.curves) >= 2 for axes in drawn)


def test_a_sweep_is_drawn_from_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = [
        {"settings": {"optim.lr": 10.0**-i, "name": "x"}, "metric": None if i == 2 else 3.0 - i} for i in range(4)
    ]
    (tmp_path / "report.json").write_text(json.dumps({"metric": "bits", "mode": "min", "trials": trials}))
    assert command(["plot", str(tmp_path), "--recipe", "sweeps", "--out", str(tmp_path / "s.svg")]) == 0
    (tmp_path / "report.json").write_text('{"trials": 3}')
    assert command(["plot", str(tmp_path), "--recipe", "sweeps", "--out", str(tmp_path / "s.svg")]) == 2
    assert "no list of trials" in capsys.readouterr().err


def test_wrong_plots_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(write(tmp_path / "r"))
    wrong = {
        ("--panel", "phi"): "no signal 'phi'", ("--panel", "theta:residual"): "no truth",
        ("--out", "a.pdf"): ".png or .svg",
        ("--panel", "theta:best"): "one of components", ("--panel", "lr:summary"): "one number a step",
        ("--panel", "lr", "--recipe", "kernels"): "exclude each other", ("--panel", "loss_nats,lr,tokens"): "two units",
    }  # fmt: skip
    for words, says in wrong.items():
        assert command(["plot", run, "--out", str(tmp_path / "x.png"), *words]) == 2
        told = capsys.readouterr().err
        assert says in told and len(told.splitlines()) == 1
    assert command(["plot", str(tmp_path / "none")]) == 2 and not (tmp_path / "x.png").exists()


def test_modes_of_a_vector_and_units(tmp_path: Path) -> None:
    run = open_run(write(tmp_path / "r"))
    theta = run.trace["theta"].astype(float)
    own = run.signals["theta"]
    write_signals(run.path / "signals.npz", {"theta": Signal(own.values, own.step, truth=np.arange(8.0))})
    run = open_run(run.path)
    shown = {mode: curves(run, *panel(f"theta:{mode}")) for mode in ("components", "summary", "hybrid=3", "residual")}
    assert len(shown["components"]) == 8 and [len(c) for c in list(shown.values())[1:]] == [2, 4, 1]
    np.testing.assert_allclose(shown["summary"][1].y, np.linalg.norm(theta, axis=1))
    assert [c.label for c in shown["hybrid=3"]] == ["theta rms", "theta[5]", "theta[6]", "theta[7]"]
    np.testing.assert_allclose(shown["residual"][0].y, np.sqrt(np.square(theta - np.arange(8)).mean(1)))
    for values, unit, wanted in (
        ([7200.0], "s", "h"),
        ([150.0], "s", "min"),
        ([2e6], "tokens", "M tokens"),
        ([1.0], "nats", "nats"),
    ):
        assert scaled(np.array(values), unit)[1] == wanted
    assert curves(run, *panel("loss_nats"), axis="wall_s")[0].x[-1] == 300 and set(CHANNELS) <= set(run.trace)
