"""A run takes a coordizer's tokenizer, or learns one by the score that its settings name."""

from pathlib import Path

import pytest

from constellation.config import Coordizer as Settings
from constellation.config import override
from constellation.coordizer import trainer
from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.document import Document
from constellation.errors import ConfigError
from constellation.pipeline.prepare import open_plan, prepare, request
from constellation.presets import tiny

LINE = "the {} of that text was read by {} and by the other {}\n"
TEXTS = [LINE.format(*("abc", "def", "ghi")[i % 3 :], *"xyz") * 8 + str(i) for i in range(30)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def coordizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coordizer") / "pmi"
    for _ in trainer.train([Document(text) for text in TEXTS], "corpus", folder, 300, Settings(score="pmi")):
        pass
    return folder


def prepared(run: Path, corpus: Path, **changes: object) -> Path:
    config = override(tiny(), {name.replace("__", "."): value for name, value in changes.items()})
    request(run, corpus, config, resume=False)
    prepare(run)
    return run


def test_a_folder_is_taken_as_it_is(corpus, coordizer, tmp_path):
    run = prepared(tmp_path / "run", corpus, coordizer__folder=str(coordizer), kernel__vocab_size=300)
    assert (run / "tokenizer.json").read_bytes() == (coordizer / "tokenizer.json").read_bytes()
    assert open_plan(run).config.coordizer.folder == str(coordizer)


def test_a_score_learns_the_runs_own(corpus, tmp_path):
    run = prepared(tmp_path / "run", corpus, coordizer__score="superword", coordizer__words=0.3, kernel__vocab_size=320)
    found = Tokenizer.load(run / "tokenizer.json")
    assert any(b" " in text.strip() for text in found.token_bytes)


def test_the_default_is_the_librarys_bpe_as_before(corpus, tmp_path):
    run = prepared(tmp_path / "run", corpus, kernel__vocab_size=300)
    found = Tokenizer.load(run / "tokenizer.json")
    assert found.vocab_size <= 300 and not any(b" " in text.strip() for text in found.token_bytes)


def test_a_vocabulary_that_is_too_small_is_refused(corpus, coordizer, tmp_path):
    with pytest.raises(ConfigError, match=r"kernel\.vocab_size=280: .* has 300 tokens"):
        prepared(tmp_path / "run", corpus, coordizer__folder=str(coordizer), kernel__vocab_size=280)


def test_a_folder_that_is_none_is_told_before_anything_begins(corpus, tmp_path, capsys):
    from constellation.cli import run

    status = run(["train", "--corpus", str(corpus), "--run", str(tmp_path / "run"), "--tokenizer", str(tmp_path)])
    assert status == 2 and "holds no coordizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
