"""`constellation status --watch` as a program and on a terminal: lines of what moved, and an end by Ctrl-C."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from constellation.cli import main


@pytest.fixture
def run(micro_run: Path, tmp_path: Path) -> Path:
    """A run in which one kernel has not been trained to its end."""
    copy = tmp_path / "run"
    shutil.copytree(micro_run, copy)
    for checkpoint in sorted((copy / "heart" / "checkpoints").iterdir())[1:]:
        shutil.move(checkpoint, tmp_path / checkpoint.name)
    return copy


def watch(run: Path, **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "constellation", "status", "--watch", "--run", str(run)]
    return subprocess.Popen(command, **options)  # type: ignore[call-overload, no-any-return]


def test_elsewhere_than_on_a_terminal_what_moved_is_a_line_and_ctrl_c_ends_it(run: Path) -> None:
    process = watch(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    first = [process.stdout.readline().decode() for _ in range(10)]
    assert first[0].startswith("run: stopped") and sum(" done " in line for line in first) == 8
    (back,) = [line for line in first if line.startswith("heart")]
    for checkpoint in run.parent.glob("step-*"):
        shutil.move(checkpoint, run / "heart" / "checkpoints" / checkpoint.name)
    later = [process.stdout.readline().decode()]
    while not later[-1].startswith("heart"):
        later.append(process.stdout.readline().decode())
    assert " done " in later[-1] and later[-1] != back and len(later) <= 2, "the others did not move"
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0 and process.stderr.read() == b""


def test_on_a_terminal_it_is_one_page_and_ctrl_c_gives_the_terminal_back(run: Path) -> None:
    ours, theirs = pty.openpty()
    process = watch(
        run, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(theirs)
    seen = b""
    while b"integration" not in seen:
        seen += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    try:
        while piece := os.read(ours, 4096):
            seen += piece
    except OSError:  # Linux: everybody else has closed it
        pass
    os.close(ours)
    assert b"E8 root" in seen and b"Traceback" not in seen
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l"), "the cursor is back"


def test_watching_and_json_are_not_both(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["status", "--watch", "--json", "--run", str(run)])
    assert end.value.code == 2 and "leave one out" in capsys.readouterr().err
