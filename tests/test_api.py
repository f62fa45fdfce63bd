"""The front door: what `import constellation` gives, and that it answers as the command line does."""

import asyncio
import doctest
import inspect
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import constellation
from constellation.cli import run as cli
from constellation.config import override
from constellation.errors import ConfigError, DataError
from constellation.roster import OCEAN
from tests.asking import untimed

NAMES = [
    "Answer", "Config", "Constellation", "ConstellationError", "Piece", "RouteChoice", "Step", "Stream",
    "__version__", "load_kernel", "open", "preset", "train",
]  # fmt: skip
HOW: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.9, "seed": 3}


def silent(text: str) -> None:
    pass


def test_the_package_gives_these_names_and_no_others() -> None:
    assert constellation.__all__ == dir(constellation) == NAMES
    for name in NAMES:
        found = getattr(constellation, name)
        assert inspect.getdoc(found), name
    with pytest.raises(AttributeError, match="there is Answer, "):
        _ = constellation.opne  # type: ignore[attr-defined]


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = (
        "import constellation, sys; dir(constellation); constellation.Config; constellation.preset('tiny');"
        "constellation.open; constellation.train; constellation.ConstellationError;"
        "print(sorted({'torch', 'ray', 'numpy', 'fastapi'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_train_is_the_function_once_its_folder_was_imported() -> None:
    import constellation.train.loop

    assert constellation.train is constellation.api.train
    from constellation.train import loop

    assert loop is sys.modules["constellation.train.loop"]


@pytest.fixture(scope="module")
def opened(micro_run: Path) -> Any:
    with constellation.open(micro_run, say=silent) as run:
        yield run


@pytest.mark.parametrize("mode", ["route", "mixture", "barycenter", OCEAN, "heart"])
def test_the_tokens_are_those_of_the_command_line(opened: Any, micro_run: Path, mode: str, capsys: Any) -> None:
    words = ["generate", "--run", str(micro_run), "--prompt", "The import statement", "--mode", mode, "--json"]
    settings = ["--max-new-tokens", "40", "--temperature", "0.9", "--seed", "3", "--top-k-kernels", "2"]
    assert cli([*words, *settings]) == 0
    printed = json.loads(capsys.readouterr().out)
    answer = opened.generate("The import statement", mode=mode, top_k_kernels=2, **HOW)
    assert isinstance(answer, constellation.Answer) and len(answer.token_ids) == 40
    told = json.loads(json.dumps(answer.to_json()))
    for name in told.keys() - {"seconds", "seconds_per_token"}:
        assert told[name] == printed[name], name
    assert (answer.certificate == "") == (mode in (OCEAN, "heart"))
    stream = opened.stream("The import statement", mode=mode, top_k_kernels=2, **HOW)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == answer.text and len(pieces) > 2
    assert untimed(stream.answer) == untimed(answer) and next(stream, None) is None


def test_several_prompts_are_each_alone(opened: Any) -> None:
    prompts = ["The import statement", "", "def f(x):", "x"] * 3
    found = opened.generate(prompts, **HOW)
    assert [answer.request for answer in found] == list(range(12))
    assert [untimed(answer) for answer in found] == [untimed(opened.generate(prompt, **HOW)) for prompt in prompts]
    assert opened.generate([]) == []


def test_it_answers_inside_a_running_event_loop(opened: Any) -> None:
    async def notebook() -> str:
        return "".join(piece.text for piece in opened.stream("x", **HOW)) + opened.generate("x", **HOW).text

    assert asyncio.run(notebook()) == 2 * opened.generate("x", **HOW).text


def test_a_stream_that_is_left_leaves_no_work(opened: Any) -> None:
    stream = opened.stream("x", 10_000_000, ignore_eos=True)
    assert isinstance(next(stream), constellation.Piece)
    stream.close()
    assert stream.answer is None and not asyncio.run(opened.service.health())["requests"]
    assert opened.generate("x", 5).text


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"temperature": -1}, "temperature=-1"), ({"heat": 1}, "unknown sampling parameter 'heat'; known: temp"),
        ({"mode": "hart"}, "mode='hart': choose one of route"), ({"top_k_kernels": 0}, "top_k=0"),
        ({"prompt": 5}, "prompt=5: must be a text"), ({"prompt": ["a", b"b"]}, "prompt=b'b': must be a text"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_one_line(opened: Any, wrong: dict[str, Any], told: str) -> None:
    for ask in (opened.generate, opened.stream):
        if ask == opened.stream and isinstance(wrong.get("prompt"), list):
            continue
        with pytest.raises(ConfigError, match=told) as error:
            list(ask(**{"prompt": "x", **wrong}))
        assert "\n" not in str(error.value)


def test_who_would_answer_is_what_the_router_says(opened: Any) -> None:
    texts = ["def f(x): return x", "The import statement binds", ""]
    found = opened.route(texts)
    router = opened.service.policy
    assert [choice.to_json() for choice in found] == [c.to_json() for c in router.route([t.encode() for t in texts])]
    assert opened.route(texts[0]).to_json() == found[0].to_json() == opened.route(texts[0].encode()).to_json()


def test_a_text_is_scored_as_the_command_line_evaluates_it(
    opened: Any, micro_run: Path, tmp_path: Path, capsys: Any
) -> None:
    """Evaluated = served: bits per byte of texts that the run was not trained on, routed and mixed."""
    words = ("a name", "class", "def f")
    texts = [f"{word} is bound to {word}s of the {word} {i}; " * 4 for i, word in enumerate(words)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert cli(["eval", "--run", str(micro_run), "--corpus", str(tmp_path), "--top-k", "2", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["answers"]
    for mode, name in (("route", "routed"), ("mixture", "mixture_2"), (OCEAN, "ocean"), ("heart", "alone:heart")):
        found = opened.bits_per_byte(texts, mode, top_k_kernels=2)
        assert 0 <= expected[name]["bits_per_byte"] - found < 0.01, mode  # an answer holds no reserved id
    nats = opened.score(texts)
    tokens = [opened.service.tokenizer.encode(text) for text in texts]
    assert [len(one) for one in nats] == list(map(len, tokens)) and all((one >= 0).all() for one in nats)
    size = sum(map(len, texts))
    assert sum(one.sum() for one in nats) / math.log(2) / size < opened.bits_per_byte(texts)  # which counts the ends
    assert np.array_equal(opened.score(texts[1].encode()), nats[1])
    with pytest.raises(ConfigError, match="at least one byte"):
        opened.bits_per_byte(["", ""])


def test_a_kernel_is_a_module_of_torch(micro_run: Path, micro: constellation.Config) -> None:
    kernel = constellation.load_kernel(micro_run, "heart")
    assert isinstance(kernel, torch.nn.Module) and not kernel.training
    assert kernel(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, micro.kernel.vocab_size)
    with pytest.raises(ConfigError, match="role='hart': choose one of ocean, heart"):
        constellation.load_kernel(micro_run, "hart")


def test_what_is_no_run_and_what_is_closed_is_told(tmp_path: Path, micro_run: Path) -> None:
    with pytest.raises(ConfigError, match="not a constellation run"):
        constellation.open(tmp_path)
    with pytest.raises(ConfigError, match="exclude each other"):
        constellation.open(micro_run, local=True, address="auto")
    run = constellation.open(micro_run, local=True)
    assert "kernels=('ocean', 'heart'" in repr(run)
    run.close()
    run.close()
    with pytest.raises(ConfigError, match="closed; open it again"):
        run.generate("x")


# -- training: the run of all tests is trained by `constellation.train(..., local=True)` (conftest.py) -----------------


def test_a_run_that_is_trained_yields_nothing_and_keeps_its_settings(
    micro_run: Path, micro: constellation.Config, micro_corpus: Path
) -> None:
    assert list(constellation.train(micro_corpus, micro_run, micro, local=True)) == []
    assert list(constellation.train(None, micro_run, local=True)) == []
    with pytest.raises(ConfigError, match=r"optim.lr=0.5: .* was started with"):
        constellation.train(None, micro_run, micro, {"optim.lr": 0.5}, local=True)
    with pytest.raises(ConfigError, match="exclude each other"):
        constellation.train(None, micro_run, local=True, address="auto")


def test_texts_at_hand_are_a_corpus_and_training_goes_on_with_them(
    tmp_path: Path, micro: constellation.Config, micro_corpus: Path
) -> None:
    files = sorted(micro_corpus.iterdir())
    texts = [files[0], *(file.read_text() for file in files[1:9]), *(file.read_bytes() for file in files[9:30])]
    config, run = override(micro, {"train.checkpoint_every": 1}), tmp_path / "run"
    steps = constellation.train(iter(texts), run, config, local=True)
    begun = [next(steps), next(steps)]
    steps.close()
    assert [(step.role, step.step) for step in begun] == [(OCEAN, 1), (OCEAN, 2)] and begun[1].loss_nats > 0
    again = constellation.train(texts, run, config, local=True)
    assert next(again).step == 3
    again.close()
    with pytest.raises(ConfigError, match="does not hold these texts"):
        constellation.train(texts[1:], run, config, local=True)
    kept = {json.loads(line)["text"] for line in (tmp_path / "run.texts.jsonl").read_text().splitlines()}
    assert kept == {file.read_text() for file in files[:30]}


def test_what_is_no_text_is_refused_before_anything_is_begun(tmp_path: Path) -> None:
    for wrong, error, told in (
        ([b"\xff"], DataError, "text 0 is no UTF-8 at byte 0"), (["a", 5], ConfigError, "text 1 is of type int"),
        (tmp_path / "absent", ConfigError, "does not exist"),
    ):  # fmt: skip
        with pytest.raises(error, match=told):
            constellation.train(wrong, tmp_path / "run", "tiny", local=True)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no usable text"):
        list(constellation.train([""], tmp_path / "run", "tiny", local=True, say=silent))
    assert not (tmp_path / "run").exists()


def test_what_the_readme_shows_is_true(micro_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo-small").symlink_to(micro_run)
    text = (Path(__file__).parent.parent / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(text, {}, "README.md", "README.md", 0)
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0 and result.attempted > 10
