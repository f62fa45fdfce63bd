"""What a run costs, and where it stops: counted over sittings, warned once, stopped to be resumed to the same bits."""

import json

import pytest
import torch

import constellation
from constellation.cli import run as cli
from constellation.config import override
from constellation.errors import ConfigError
from constellation.pipeline.cost import Energy, Meter, line, read
from constellation.pipeline.status import finished
from constellation.presets import tiny
from constellation.train.checkpoint import load_model

PRICED = override(tiny(), {"train.budget_usd": 10.0, "cluster.usd_per_hour": 3600.0})  # a dollar a second


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def steps(clock, seconds, closed=None):
    try:
        for second in range(seconds):
            clock.now += 1.0
            yield second
    finally:
        if closed is not None:
            closed.append(True)


def test_it_warns_at_80_percent_once_and_stops_at_100_over_two_sittings(tmp_path):
    said, clock, closed = [], Clock(), []
    meter = Meter(tmp_path, PRICED, said.append, clock=clock, rapl=tmp_path)
    assert list(meter.until_spent(steps(clock, 6))) == list(range(6)) and not said
    assert read(tmp_path)["usd"] == pytest.approx(6.0) and read(tmp_path)["joules"] is None
    again = Meter(tmp_path, PRICED, said.append, clock=clock, rapl=tmp_path)
    assert list(again.until_spent(steps(clock, 99, closed))) == [0, 1, 2, 3] and again.spent and closed
    assert [text.count("%") for text in said] == [1, 0] and "80%" in said[0] and "--resume" in said[1]
    assert read(tmp_path) == pytest.approx(
        {"hours": 10 / 3600, "usd": 10.0, "usd_per_hour": 3600.0, "budget_usd": 10.0, "joules": None}
    )
    assert line(read(tmp_path)) == "cost: 0.00 hours, 10.00 of 10 USD" and line({}) == ""


def test_without_a_budget_nothing_stops_and_hours_are_counted(tmp_path):
    clock = Clock()
    meter = Meter(tmp_path, tiny(), pytest.fail, clock=clock, rapl=tmp_path)
    assert len(list(meter.until_spent(steps(clock, 50)))) == 50
    assert read(tmp_path)["hours"] == pytest.approx(50 / 3600) and read(tmp_path)["usd"] is None


def test_energy_is_of_whole_processors_and_outlives_their_counters_range(tmp_path):
    for name, uj in (("intel-rapl:0", 900), ("intel-rapl:1", 100), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{uj}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    energy = Energy(tmp_path)
    assert energy.told and energy.since() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("150")
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("99")
    assert energy.since() == pytest.approx((200 + 50) / 1e6) and energy.since() == 0
    assert not Energy(tmp_path / "none").told


def test_a_budget_without_a_price_is_refused():
    with pytest.raises(ConfigError, match=r"cluster\.usd_per_hour"):
        override(tiny(), {"train.budget_usd": 1.0})


def test_a_run_that_stopped_goes_on_with_a_larger_budget_to_the_same_bits(micro_corpus, tmp_path, capsys):
    settings = {"constellation.kernels": 2, "kernel.vocab_size": 288, "train.tokens": 8_000, "train.sample_bytes": 0,
                "train.checkpoint_every": 3, "train.eval_bytes": 512, "router.bins": 256, "router.dims": 8,
                "cluster.usd_per_hour": 3600.0}  # fmt: skip
    said, run, alone = [], tmp_path / "run", tmp_path / "alone"
    how = {"local": True, "say": said.append}
    done = list(constellation.train(micro_corpus, run, "tiny", {**settings, "train.budget_usd": 1e-9}, **how))
    assert len(done) == 1 and not finished(run) and "is spent" in said[-1]
    assert not list(constellation.train(None, run, **how))  # still spent
    more = {**settings, "train.budget_usd": 1e6}
    assert list(constellation.train(None, run, "tiny", more, **how))[-1].role == "perception"
    for _ in constellation.train(micro_corpus, alone, "tiny", settings, **how):
        pass
    for role in ("ocean", "heart", "perception"):
        ours, theirs = (load_model(r / role).state_dict() for r in (run, alone))
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert json.loads((run / "cost.json").read_text())["budget_usd"] == 1e6
    words = ["train", "--run", str(run), "--resume", "train.budget_usd=5"]
    assert cli(words) == 0  # it is trained to its end
    assert "of 1e+06 USD" in capsys.readouterr().out
    assert cli([*words, "optim.lr=1"]) == 2 and "optim.lr=1.0" in capsys.readouterr().err
