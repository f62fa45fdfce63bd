"""The commands a user types, one after another, on the tiny preset and the embedded corpus."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from constellation.roster import OCEAN, ROLES

pytestmark = pytest.mark.ray


def constellation(*argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "160", "RAY_DEDUP_LOGS": "0"}
    command = [sys.executable, "-m", "constellation", *argv]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment)


def printed(found: subprocess.CompletedProcess[str]) -> Any:
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "run"


@pytest.fixture(scope="module")
def demo(run: Path) -> str:
    found = constellation("demo", "--preset", "tiny", "--run", str(run))
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_demo_shows_every_model_samples_and_the_table(demo: str, run: Path) -> None:
    for name in (OCEAN, *ROLES, "routed", "uniform", "permuted", "oracle"):
        assert name in demo
    assert demo.count("done") == 9
    assert (run / "heart" / "summary.json").exists()


@pytest.mark.slow
def test_the_demo_again_trains_nothing_and_says_so(demo: str, run: Path) -> None:
    found = constellation("demo", "--preset", "tiny", "--run", str(run))
    assert found.returncode == 0 and "trained to its end already" in found.stdout


def test_train_refuses_an_existing_run_and_resume_of_a_finished_one_is_a_no_op(demo: str, run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}
    refused = constellation("train", "--run", str(run), "--preset", "tiny")
    assert refused.returncode == 2 and "--resume" in refused.stderr
    other = constellation("train", "--run", str(run), "--preset", "tiny", "--resume", "optim.lr=1")
    assert other.returncode == 2 and "optim.lr" in other.stderr
    resumed = constellation("train", "--run", str(run), "--resume")
    assert resumed.returncode == 0 and "already" in resumed.stdout
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}


def test_eval_reports_every_way_to_answer_and_never_scores_text_that_was_trained_on(
    demo: str, run: Path, tmp_path: Path
) -> None:
    from constellation.config import Data
    from constellation.data.corpus import Document, read_corpus

    def write(documents: list[Document]) -> None:
        rows = [{"text": d.text, "metadata": {"domain": d.domain}} for d in documents]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    train, dev = read_corpus(None, Data()).split(Data().dev_fraction)
    each = list({d.domain: d for d in sorted(dev, key=lambda d: -d.num_bytes)}.values())  # the shortest of each domain
    write([*train[:3], *each])
    found = printed(constellation("eval", "--run", str(run), "--corpus", str(tmp_path), "--json"))
    assert (found["excluded_documents"], found["documents"]) == (3, len(each))
    answers = found["answers"]
    wanted = {"routed", "mixture_3", "ocean", "uniform", "permuted", "bayes", "oracle"} | {f"alone:{r}" for r in ROLES}
    assert set(answers) == wanted
    assert all(0 < row["bits_per_byte"] < 8 for row in answers.values())
    best_alone = min(answers[f"alone:{r}"]["bits_per_byte"] for r in ROLES)
    assert answers["oracle"]["bits_per_byte"] <= best_alone
    assert set(answers["routed"]["domains"]) == {d.domain for d in each} and len(each) >= 8
    write(train[:3])
    refused = constellation("eval", "--run", str(run), "--corpus", str(tmp_path), "--json")
    assert refused.returncode == 2 and "training text" in refused.stderr


def test_route_explains_each_line(demo: str, run: Path) -> None:
    lines = ["def read(path):\n    return open(path).read()".replace("\n", " "), "the reference of the language", ""]
    found = constellation("route", "--run", str(run), "--json", stdin="\n".join(lines) + "\n")
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(rows) == 3 and {r["kernel"] for r in rows} <= {OCEAN, *ROLES}
    assert rows[0]["counts_used"] == len(lines[0]) - 2 and len(rows[0]["z"]) == 64
    assert sum(rows[0]["posterior"].values()) == pytest.approx(1, abs=1e-4)
    assert rows[2]["kernel"] == OCEAN and rows[2]["abstained"]


def test_this_process_answers_when_nothing_is_up(demo: str, run: Path) -> None:
    argv = (
        "generate",
        "--run",
        str(run),
        "--prompt",
        "class Basin:\n    def ",
        "--max-new-tokens",
        "60",
        "--seed",
        "3",
    )
    local = printed(constellation(*argv, "--local", "--json"))
    default = printed(constellation(*argv, "--json"))
    for key in ("text", "token_ids", "finish_reason", "kernels", "hand_offs"):
        assert local[key] == default[key], key
    assert local["completion_tokens"] == 60 or local["finish_reason"] == "eos"


@pytest.mark.parametrize("mode", [OCEAN, "memory"])
def test_a_named_kernel_answers_alone(demo: str, run: Path, mode: str) -> None:
    argv = ("generate", "--run", str(run), "--prompt", "x = ", "--max-new-tokens", "20", "--mode", mode, "--local")
    assert printed(constellation(*argv, "--json"))["kernels"] == [mode]


def test_streamed_text_is_the_answer(demo: str, run: Path) -> None:
    argv = ("generate", "--run", str(run), "--prompt", "import ", "--max-new-tokens", "40", "--local")
    streamed, whole = constellation(*argv), printed(constellation(*argv, "--json"))
    assert streamed.stdout == whole["text"] + "\n" and "tokens" in streamed.stderr


def test_chat_goes_on_with_what_was_said(demo: str, run: Path) -> None:
    found = constellation(
        "chat", "--run", str(run), "--local", "--max-new-tokens", "8", stdin="import os\nand then\n\n"
    )
    assert found.returncode == 0 and found.stdout.count("\n") >= 2 and "new text" in found.stderr
    assert "you>" not in found.stdout and not any(f"{name}>" in found.stdout for name in (OCEAN, *ROLES))


@pytest.mark.parametrize("file", ["router/router.json", "tokenizer.json", "constellation.json"])
def test_a_damaged_file_is_refused_by_name(demo: str, run: Path, tmp_path: Path, file: str) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    text = (copy / file).read_text()
    (copy / file).write_text(text[: len(text) // 2])
    found = constellation("generate", "--run", str(copy), "--prompt", "x", "--local")
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1
    assert Path(file).name.split(".")[0] in found.stderr
