"""The command line: help is fast, every wrong request is one line with status 2 and touches nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from constellation.cli import COMMANDS, run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


HEAVY = ("torch", "ray", "numpy", "scipy", "rich", "tokenizers", "msgpack")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_everywhere_imports_nothing_heavy(command: str) -> None:
    """What keeps --help under half a second: an import of torch alone takes longer."""
    words = [command, "--help"] if command else ["--help"]
    code = (
        f"import sys; from constellation.cli import run; run({words}); print([m for m in {HEAVY} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("Usage: constellation") and not out.stderr
    assert out.stdout.splitlines()[-1] == "[]"


WRONG = [
    ["tain"],
    ["--nope"],
    ["train"],
    ["train", "--run"],
    ["train", "--run", "new", "--corpus", "missing"],
    ["train", "--run", "new", "--corpus", "empty"],
    ["train", "--run", "new", "--corpus", "text", "--preset", "huge"],
    ["train", "--run", "new", "--corpus", "text", "optim.lr"],
    ["train", "--run", "new", "--corpus", "text", "optm.lr=1"],
    ["train", "--run", "new", "--corpus", "text", "optim.lr=fast"],
    ["train", "--run", "new", "--corpus", "text", "optim.lr=1", "optim.lr=2"],
    ["train", "--run", "new", "--corpus", "text", "hart.optim.lr=1"],
    ["train", "--run", "new", "--corpus", "text", "train.ocean_share=1"],
    ["train", "--run", "text", "--corpus", "text"],
    ["train", "--run", "text/a.txt", "--corpus", "text"],
    ["train", "--run", "new", "--resume"],
    ["train", "--run", "new", "--corpus", "text", "--nope"],
    ["train", "--run", "new", "--corpus", "broken"],
    ["eval", "--run", "missing"],
    ["eval", "--run", "text"],
    ["eval", "--run", "foreign"],
    ["eval", "--run", "missing", "--top-k", "0"],
    ["route", "--run", "missing"],
    ["generate", "--run", "missing", "--prompt", "x"],
    ["generate", "--run", "missing"],
    ["generate", "--run", "missing", "--prompt", "x", "--max-new-tokens", "0"],
    ["generate", "--run", "missing", "--prompt", "x", "--temperature", "-1"],
    ["generate", "--run", "missing", "--prompt", "x", "--temperature", "hot"],
    ["generate", "--run", "missing", "--prompt", "x", "--mode", "poseidon"],
    ["chat", "--run", "missing"],
    ["up", "--run", "missing"],
    ["status"],
    ["status", "--run", "missing"],
    ["down", "--run", "missing"],
    ["bench"],
    ["bench", "nope"],
    ["bench", "dense", "--corpus", "text"],
    ["bench", "dense", "--corpus", "missing", "--work", "new"],
    ["bench", "dense", "--corpus", "text", "--work", "new", "--arms", "dense,nope"],
    ["bench", "route", "--centres", "241"],
    ["bench", "serve"],
    ["bench", "serve", "--url", "nonsense"],
    ["bench", "modes", "--run", "missing"],
    ["bench", "decode", "--repeats", "0"],
    ["bench", "optim", "--tasks", "nope"],
    ["bench", "optim", "--optimizers", "nope"],
    ["bench", "optim", "--corpus", "missing"],
    ["keys"],
    ["keys", "add"],
    ["keys", "add", "--file", "text", "--name", "ada"],
    ["serve"],
    ["serve", "--run", "missing"],
    ["serve", "--run", "text", "--port", "70000"],
    ["export", "--run", "missing", "--kernel", "heart", "--out", "new"],
    ["route", "--run", "missing", "--verify", "missing"],
    ["train", "--run", "new", "--corpus", "text", "--log", "nope"],
    ["train", "--run", "new", "--corpus", "text", "optim.name=adam"],
    ["train", "--run", "new", "--corpus", "text", "optim.phase=dusk"],
    ["train", "--run", "new", "--corpus", "text", "optim.gate.max_overhead=-1"],
    ["train", "--run", "new", "--corpus", "text", "decode.precision=int4"],
    ["train", "--run", "new", "--corpus", "text", "heart.decode.slots=3"],
]


@pytest.mark.parametrize("argv", WRONG, ids=lambda a: " ".join(a))
def test_a_wrong_request_is_one_line_status_2_and_touches_nothing(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jsonl").write_text('{"text": 3}\n{"no": "text"}\n{\n')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "constellation.json").write_text('{"schema": 99}')
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    status = run(argv)
    err = capfd.readouterr().err
    assert (status, len(err.strip().splitlines())) == (2, 1), err
    assert err.startswith("constellation") and "Traceback" not in err
    assert snapshot(tmp_path) == before


BY_CONTENT = ("empty", "broken", "--arms", "--tasks", "--optimizers")  # a corpus that is read, names of a heavy table


def test_wrong_paths_and_settings_are_told_before_torch_and_ray_are_imported(tmp_path: Path) -> None:
    """In less than half a second, for an import of torch alone takes longer."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some text")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "constellation.json").write_text('{"schema": 99}')
    asked = [argv for argv in WRONG if not set(argv) & set(BY_CONTENT)]
    asked += [["train", "--run", "new", "foo.bar=1"], ["eval", "--run", "text", "--corpus", "missing"],
              ["up", "--run", "text", "foo.bar=1"], ["route", "--run", "text", "--verify", "missing"]]  # fmt: skip
    code = (
        "import json, sys; from constellation.cli import run\n"
        "for argv in json.loads(sys.argv[1]):\n"
        "    status = run(argv); heavy = [m for m in ('torch', 'ray') if m in sys.modules]\n"
        "    if status != 2 or heavy: sys.exit(f'{argv}: status {status}, imported {heavy}')\n"
    )
    command = [sys.executable, "-c", code, json.dumps(asked)]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0 and len(found.stderr.splitlines()) == len(asked), found.stderr


def test_the_program_exits_with_the_status(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "constellation", "eval", "--run", str(tmp_path / "missing")]
    found = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert found.returncode == 2 and found.stdout == "" and len(found.stderr.splitlines()) == 1
