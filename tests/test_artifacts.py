"""Files are whole or absent; the trace and the diagnostics survive a torn writer."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from constellation.artifacts.run import CHANNELS, RunFolder, Trace, read_trace
from constellation.errors import ArtifactError, RunError
from constellation.presets import tiny
from constellation.storage.atomic import read_json, write_bytes, write_folder, write_json
from constellation.telemetry.step import Step


def step(i: int) -> Step:
    return Step("heart", i, 9, i * 10, 1.0, 1.0, 0.1, 0.0)


def test_writing_replaces_whole_and_leaves_no_other_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
    assert read_json(tmp_path / "a.json") == {"x": 2} and os.listdir(tmp_path) == ["a.json"]


def test_the_umask_says_who_reads_and_secrets_are_the_owners(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "open.json", {})
        write_json(tmp_path / "secret.json", {}, private=True)
        write_folder(tmp_path / "folder", lambda folder: write_bytes(folder / "x", b""))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"open.json": 0o640, "secret.json": 0o600, "folder": 0o750}


def test_a_failing_writer_leaves_the_old_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", lambda p: (p / "x").write_text("old"))  # type: ignore[func-returns-value,arg-type]

    def torn(folder: Path) -> None:
        (folder / "x").write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "f", torn)
    assert (tmp_path / "f" / "x").read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_a_full_disk_is_one_line_with_a_way_out() -> None:
    with pytest.raises(RunError, match="free the disk"):
        write_bytes(Path("/dev/full/x"), b"x")


def test_json_refuses_nan_and_damage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    (tmp_path / "b.json").write_text('{"x":')
    with pytest.raises(ArtifactError, match=r"b\.json"):
        read_json(tmp_path / "b.json")


def test_a_sealed_file_is_what_was_sealed(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    data = {"b": [1, 2.5, {"é": None}], "a": {"10": 1, "9": 2}, "nested": {"x": True}}
    write_json(file, data, sealed=True)
    whole = file.read_bytes()
    assert read_json(file) == data
    for bit in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            found = read_json(file)
        except ArtifactError as error:
            assert "damaged" in str(error)
        else:  # space for space, or another name for the seal itself: nothing else passes
            assert {name: found[name] for name in data} == data


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "\\xff", '{"seal": 3}', '{"a": 1, "seal": "0"}'])
def test_whatever_a_json_file_holds_there_is_one_line_about_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArtifactError, match="damaged") as told:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(told.value)


def test_a_damaged_summary_is_written_anew_and_meta_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(tiny(), "heart", [], {"steps": 9})
    whole = read_json(tmp_path / "meta.json")
    (tmp_path / "meta.json").write_text((tmp_path / "meta.json").read_text().replace('"steps": 9', '"steps": 7'))
    with pytest.raises(ArtifactError, match="damaged"):
        read_json(tmp_path / "meta.json")
    folder.begin(tiny(), "heart", [], {"steps": 9})
    assert {**read_json(tmp_path / "meta.json"), "created": whole["created"]} == whole
    for text in ("{", "3", '{"runtime_s": "long"}'):
        (tmp_path / "summary.json").write_text(text)
        assert not folder.is_done() and folder.summarise(status="done", runtime_s=1.0)["runtime_s"] == 1.0


def test_the_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "dear").write_text("all of it")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diag_steps.jsonl").symlink_to(tmp_path / "dear")
    with pytest.raises(OSError, match="symbolic"):
        RunFolder(tmp_path / "run").log([step(1)])
    assert (tmp_path / "dear").read_text() == "all of it"


def test_the_log_forgets_what_came_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log(step(i) for i in range(1, 6))
    with (tmp_path / "diag_steps.jsonl").open("a") as file:
        file.write('{"role": "hea')
    folder.truncate(3)
    assert [json.loads(x)["step"] for x in (tmp_path / "diag_steps.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_trace_round_trip(tmp_path: Path) -> None:
    trace = Trace()
    for i in range(3):
        trace.append(np.full(2, i), **dict.fromkeys(CHANNELS, i))
    RunFolder(tmp_path).write_trace(trace.arrays())
    again = Trace(read_trace(tmp_path)).arrays()
    assert again["theta"].shape == (3, 2) and again["loss_nats"].tolist() == [0, 1, 2]
    assert {n: again[n].dtype for n in CHANNELS} == {n: np.dtype(t) for n, t in CHANNELS.items()}


def test_runtimes_of_several_sittings_add_up(tmp_path: Path) -> None:
    RunFolder(tmp_path).summarise(status="failed", runtime_s=1.5)
    assert RunFolder(tmp_path).summarise(status="done", runtime_s=2.0)["runtime_s"] == 3.5
