"""Trackers write what their own readers read, change no bit of training, and fail in one line."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from constellation.config import override, values
from constellation.errors import ConfigError
from constellation.presets import tiny
from constellation.telemetry.step import Step
from constellation.trackers.tracker import FOLDER, TRACKERS, named, tracking

SETTINGS = {"optim.lr": 1e-3, "preset": "tiny"}


def steps(role: str, start: int, stop: int) -> Iterator[Step]:
    for i in range(start, stop + 1):
        bits = 2.0 if i % 5 == 0 else None
        yield Step(
            role, i, 20, 8 * i, 3.0 / i, 1.0, 0.1, 0.01, bits, "a text" if bits else None, None, {"norm": 0.5 * i}
        )


def told(names: tuple[str, ...], folder: Path, *sittings: tuple[int, int]) -> list[str]:
    said: list[str] = []
    for start, stop in sittings:
        with tracking(names, folder, SETTINGS, said.append) as track:
            for pair in zip(steps("ocean", start, stop), steps("heart", start, stop), strict=True):
                for step in pair:
                    track(step)
    return said


def test_tensorboard_reads_every_number_once_also_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert told(("tensorboard",), tmp_path, (1, 12), (8, 20)) == []  # killed at 12, its checkpoint is of 7
    for role in ("ocean", "heart"):
        found = accumulator.EventAccumulator(str(tmp_path / FOLDER / "tensorboard" / role), {"scalars": 0})
        found.Reload()
        assert set(found.Tags()["scalars"]) == {*next(steps(role, 5, 5)).numbers()}
        events = found.Scalars("loss_nats")
        assert [e.step for e in events] == list(range(1, 21))
        np.testing.assert_allclose([e.value for e in events], [3.0 / i for i in range(1, 21)], rtol=1e-6)
        assert [e.step for e in found.Scalars("dev_bits_per_byte")] == [5, 10, 15, 20]
        assert any("sample" in tag for tag in found.Tags()["tensors"])


def test_mlflow_reads_every_number_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking_module = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert told(("mlflow",), tmp_path, (1, 12), (8, 20)) == []
    client = tracking_module.MlflowClient((tmp_path / FOLDER / "mlflow" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("constellation").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params == {"optim.lr": "0.001", "preset": "tiny"}
    history = client.get_metric_history(run.info.run_id, "heart/loss_nats")
    assert {(m.step, m.value) for m in history} == {(i, 3.0 / i) for i in range(1, 21)}


@pytest.mark.slow
def test_wandb_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert told(("wandb",), tmp_path, (1, 3)) == []
    (file,) = (tmp_path / FOLDER / "wandb").rglob("run-*.wandb")
    kept = file.read_bytes()
    assert b"heart/loss_nats" in kept and b"ocean/dev_bits_per_byte" not in kept


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_tracker_that_cannot_write_is_one_line_and_the_others_go_on(tmp_path: Path, name: str) -> None:
    pytest.importorskip(TRACKERS[name].needs)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / name).write_text("in the way")
    other = "tensorboard" if name == "mlflow" else "mlflow"
    said = told((name, other), tmp_path, (1, 9))
    assert len(said) == 1 and said[0].startswith(f"tracker {name} failed") and "\n" not in said[0]
    assert any((tmp_path / FOLDER / other).rglob("*"))


def test_a_training_that_fails_is_closed_as_failed_and_its_error_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), tracking(("tensorboard",), tmp_path, {}, print) as track:
        track(next(steps("ocean", 1, 1)))
        raise ZeroDivisionError
    assert list((tmp_path / FOLDER / "tensorboard" / "ocean").iterdir())


def test_nothing_is_written_before_the_first_step(tmp_path: Path) -> None:
    with tracking(tuple(TRACKERS), tmp_path, {}, print):
        pass
    assert list(tmp_path.iterdir()) == []


def test_names() -> None:
    assert named("none") == () and named("tensorboard, tensorboard") == ("tensorboard",) and named(None)
    with pytest.raises(ConfigError, match=r"'aim' is no tracker; choose of tensorboard, mlflow, wandb"):
        named("tensorboard,aim")


def test_settings_are_written_by_their_dotted_names() -> None:
    found = values(override(tiny(), {"heart.optim.lr": 1e-4}))
    assert found["heart.optim.lr"] == 1e-4 and found["kernel.width"] == 32
    assert all(not isinstance(v, float) or math.isfinite(v) for v in found.values())
