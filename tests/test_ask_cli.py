"""generate, chat, eval and the others as a user calls them: in this process, and honest about a run half trained."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from constellation.cli import run as cli
from constellation.pipeline.status import newest_step
from constellation.roster import OCEAN, ROLES
from constellation.storage.atomic import SEAL

HALF = ROLES[1]


@pytest.fixture(scope="module")
def half(micro_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which one kernel has lost its last checkpoint."""
    run = tmp_path_factory.mktemp("half") / "run"
    shutil.copytree(micro_run, run)
    checkpoints = sorted((run / HALF / "checkpoints").iterdir())
    assert len(checkpoints) > 1
    shutil.rmtree(checkpoints[-1])
    return run


def left(run: Path) -> dict[str, dict[str, int]]:
    steps = json.loads((run / HALF / "meta.json").read_text())["steps"]
    return {HALF: {"step": newest_step(run / HALF), "steps": steps}}


ASK = ("--max-new-tokens", "8", "--prompt", "The import statement")


WORDS = {
    "generate": (*ASK, "--json"),
    "eval": ("--json",),
    "chat": ("--max-new-tokens", "4"),
    "route": ("--json",),
    "export": ("--kernel", HALF, "--out", "out"),
}


@pytest.mark.parametrize("command", WORDS)
def test_a_run_half_trained_names_the_steps_it_uses(
    half: Path, micro_run: Path, tmp_path: Path, command: str, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = left(half)[HALF]
    for run, unfinished in ((half, left(half)), (micro_run, {})):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"import os\n")))
        status = cli([command, "--run", str(run), *WORDS[command]])
        out, err = capfd.readouterr()
        assert status == 0 or command == "export", err  # this kernel is of a kind that cannot be exported
        line = f"{run} is not trained to its end; used are {HALF} step {expected['step']} of {expected['steps']}; the"
        assert err.count(line) == (run == half) == err.count("not trained to its end"), err
        if command in ("generate", "eval"):
            assert json.loads(out)["unfinished"] == unfinished


def test_a_kernel_that_was_not_begun_is_told_before_anything_is_scored(half: Path, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(half, run)
    shutil.rmtree(run / HALF)
    assert cli(["eval", "--run", str(run)]) == 2
    assert f"{HALF} not trained yet" in capfd.readouterr().err
    assert cli(["generate", "--run", str(run), *ASK, "--mode", "ocean"]) == 0
    assert f"used are {HALF} none; the others" in capfd.readouterr().err


def imported(*words: str, stdin: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What a command says, and which of torch and Ray it imported."""
    code = ("import sys; from constellation.cli import run; status = run(sys.argv[1:]); sys.stdout.flush();"
            "print([m for m in ('torch', 'ray') if m in sys.modules], file=sys.stderr); sys.exit(status)")  # fmt: skip
    found = subprocess.run([sys.executable, "-c", code, *words], input=stdin, capture_output=True, text=True)
    return found, json.loads(found.stderr.splitlines()[-1].replace("'", '"'))


def test_one_prompt_starts_no_ray(micro_run: Path) -> None:
    found, modules = imported("generate", "--run", str(micro_run), *ASK)
    assert found.returncode == 0 and modules == ["torch"], found.stderr


def test_a_pipe_gets_answers_and_no_prompt_marks(micro_run: Path) -> None:
    lines = "import os\n\nand \xff then\n"
    found, modules = imported(
        "chat", "--run", str(micro_run), "--max-new-tokens", "6", "--temperature", "0", stdin=lines
    )
    assert found.returncode == 0 and modules == ["torch"], found.stderr
    assert not re.search(rf"^(you|{OCEAN}|{'|'.join(ROLES)})> ", found.stdout, re.M)
    wanted, _ = imported("generate", "--run", str(micro_run), "--max-new-tokens", "6", "--temperature", "0",
                         "--prompt", "import os\n")  # fmt: skip
    assert found.stdout.startswith(wanted.stdout), "the first answer, and nothing before it"


def test_the_state_of_a_run_is_told_without_torch_and_ray(micro_run: Path) -> None:
    found, modules = imported("status", "--run", str(micro_run), "--json")
    assert json.loads(found.stdout)["state"] == "finished" and modules == []


def test_a_warning_is_one_line(micro_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    newest = sorted((run / OCEAN / "checkpoints").iterdir())[-1]
    (newest / "state.json").write_text("{")
    found, _ = imported("generate", "--run", str(run), *ASK, "--mode", OCEAN)
    said, *others = found.stderr.splitlines()
    assert found.returncode == 0 and said.startswith("constellation: ") and "trying the next older one" in said
    assert len(others) == 2, others  # the route, and what the test prints


def test_a_run_written_before_there_were_seals_still_opens(micro_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    for file in run.rglob("*.json"):
        data = json.loads(file.read_text())
        if isinstance(data, dict) and SEAL in data:
            del data[SEAL]
            if file.name == "segments.json":
                data = {role: of["tokens"] for role, of in data.items()}
            file.write_text(json.dumps(data))
    assert not any(f'"{SEAL}"' in file.read_text() for file in run.rglob("*.json"))
    asked = [imported("generate", "--run", str(r), *ASK)[0] for r in (run, micro_run)]
    assert asked[0].returncode == 0 and asked[0].stdout == asked[1].stdout
    found, _ = imported("train", "--run", str(run), "--resume")
    assert found.returncode == 0 and "trained to its end already" in found.stdout


@pytest.mark.parametrize("change", [('"lr": ', '"lr": 1'), ('"seed": ', '"seed": 1'), ('"prepared"', '"prepare"')])
def test_a_changed_setting_of_a_run_is_noticed(micro_run: Path, tmp_path: Path, change: tuple[str, str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    text = (run / "constellation.json").read_text()
    assert change[0] in text
    (run / "constellation.json").write_text(text.replace(*change, 1))
    for words in (("train", "--resume"), ("generate", *ASK), ("status",)):
        found, modules = imported(words[0], "--run", str(run), *words[1:])
        assert found.returncode == 2 and "damaged (its checksum differs)" in found.stderr
        assert modules == [] and len(found.stderr.splitlines()) == 2, found.stderr


@pytest.mark.parametrize("text", ["[]", '{"schema": 1}', '{"schema": 1, "corpus": 3, "config": {}}',
                                  '{"schema": 1, "corpus": null, "config": 7}',
                                  '{"schema": 1, "corpus": null, "config": {"roles": 3}, "prepared": 4}'])  # fmt: skip
def test_wrong_types_in_a_run_folder_are_one_line(tmp_path: Path, text: str, capfd: Any) -> None:
    (tmp_path / "constellation.json").write_text(text)
    assert cli(["status", "--run", str(tmp_path)]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
