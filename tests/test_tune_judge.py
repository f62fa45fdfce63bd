"""A sweep's winner and its preset on text that the sweep did not see."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from constellation.config import Config, override
from constellation.coordizer.tokenizer import Tokenizer
from constellation.errors import ConfigError
from constellation.train.checkpoint import load_model
from tests.test_tune_engine import results
from tune.history import read_history
from tune.judge import JUDGED, Judgement, judge
from tune.race import paired_interval
from tune.request import SweepRequest
from tune.run import SweepRun, alone
from tune.space import read_space

TEXT = "A sphere has no corners."


@pytest.fixture(scope="module")
def swept(micro: Config, micro_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four trials of eight steps, whose preset has a rate that any other beats."""
    base = override(micro, {"train.batch": 8, "train.kernel_batch": 8, "optim.lr": 1e-5})
    space = read_space("optim", override(micro, {"train.batch": 8}))
    space = replace(space, dimensions=tuple(d for d in space.dimensions if d.name == "optim.lr"))
    space = replace(space, dimensions=(replace(space.dimensions[0], default=1e-5, low=1e-5),))
    out = tmp_path_factory.mktemp("sweeps") / "out"
    alone(SweepRun(out, SweepRequest(space, base, str(micro_corpus), 8 * 512.0, trials=4, search="random")))
    return out


def test_both_read_the_same_text_on_new_seeds(swept: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "unseen"
    shutil.copytree(swept, out)
    text.mkdir()
    (text / "a.txt").write_text(TEXT)
    found = judge(out, text, seeds=2)
    assert found.seeds == (1, 2) and found.documents == 1
    assert found.settings == read_history(out).trials[found.trial].settings
    for name, bits in (("preset", found.preset), ("best", found.best)):
        for seed, one in zip(found.seeds, bits):
            model = load_model(out / JUDGED / f"{name}-s{seed}" / "ocean")
            (tokenizer,) = (out / "shared").glob("*/tokenizer.json")
            tokens = torch.tensor([0, *Tokenizer.load(tokenizer).encode(TEXT), 0])  # EOS before and behind
            with torch.no_grad():
                logits = model(tokens[None, :-1])[0]
            nats = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum")
            assert one == pytest.approx(float(nats) / math.log(2) / len(TEXT), rel=1e-4)
    assert found.difference == paired_interval([b - p for b, p in zip(found.best, found.preset)])
    before = results(out / JUDGED)
    assert judge(out, text, seeds=2) == found and results(out / JUDGED) == before  # nothing is trained again


def test_text_that_the_sweep_has_seen_is_refused(swept: Path, micro_corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"the sweep has seen \d+ of 59 documents"):
        judge(swept, micro_corpus, seeds=1)


def test_the_verdict_is_that_of_the_interval() -> None:
    def verdict(*differences: float) -> str:
        seeds = tuple(range(len(differences)))
        return Judgement(1, {}, "", 1, seeds, tuple(2.0 for _ in seeds), tuple(2.0 + d for d in differences)).verdict

    assert verdict(-0.1, -0.11, -0.09) == "better" and verdict(0.1, 0.11, 0.09) == "worse"
    assert verdict(-0.1, 0.11, -0.09) == "no difference shown" == verdict(-0.1)
