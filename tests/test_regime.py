"""Regimes change what is computed, faults are seen, recoveries are kept or undone, and all of it is resumed."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from constellation.artifacts.run import read_trace
from constellation.config import Regimes, override
from constellation.errors import ConfigError, RunError
from constellation.experiments.bench_recovery import Injector, back_after
from constellation.presets import tiny
from constellation.regime.actions import ACTIONS, Brake
from constellation.regime.detector import Detector, detect_regime
from constellation.regime.protocol import Advice
from constellation.train import checkpoint
from constellation.train.clipping import ADAGC_LAMBDA, AdaGC, ZClip
from constellation.train.job import Job
from constellation.train.loop import fit
from tests.cases import four_words, newest, weights

STEPS = 60


@given(st.floats(0, 1))
def test_a_regime_without_history_is_the_table_of_the_design(phi: float) -> None:
    wanted = ("linear", 0.3) if phi < 0.3 else ("geometric", 1.0) if phi < 0.8 else ("breakdown", 0.0)
    assert detect_regime(phi) == wanted


@given(st.floats(0, 1), st.sampled_from(("linear", "geometric", "breakdown")))
def test_within_the_hysteresis_a_regime_stays(phi: float, before: Any) -> None:
    stays = {"linear": phi < 0.32, "geometric": 0.28 <= phi < 0.82, "breakdown": phi >= 0.78}
    found, _ = detect_regime(phi, Regimes(), before)
    assert (found == before) == stays[before]


def seen(step: int, loss: float = 3.0, norm: float = 1.0, **more: float) -> dict[str, float]:
    return {"step": step, "loss_nats": loss, "grad_norm": norm, "lr": 1e-3, **more}


def test_faults_are_debounced_and_a_run_in_order_has_none() -> None:
    detector, generator = Detector(Regimes(debounce=3)), np.random.default_rng(0)
    calm = [detector.judge(seen(i, 3 + 0.05 * generator.normal())) for i in range(100)]
    assert set(calm) == {Advice.GO_ON}
    spike = [detector.judge(seen(100 + i, 9.0)) for i in range(3)]
    assert spike == [Advice.GO_ON, Advice.GO_ON, Advice.RECOVER] and detector.fault == "loss spike"
    assert detector.judge(seen(104, math.nan)) is Advice.RECOVER and detector.fault == "nonfinite"


def test_a_collapse_is_repetition_beyond_the_texts_own() -> None:
    detector = Detector(Regimes(collapse_repeat=0.5))
    assert detector.judge(seen(1, phi=0.5, repeat_rate=0.6, text_repeat_rate=0.3)) is Advice.GO_ON
    assert detector.judge(seen(2, phi=0.5, repeat_rate=0.9, text_repeat_rate=0.3)) is Advice.RECOVER
    assert detector.fault == "collapse"


def test_breakdown_pauses_and_linear_takes_less() -> None:
    detector = Detector(Regimes(pause_steps=2))
    assert detector.judge(seen(1, phi=0.1)) is Advice.LESS_COMPUTE and detector.compute == 0.3
    assert detector.judge(seen(2)) is Advice.LESS_COMPUTE, "until phi is measured again"
    assert detector.judge(seen(3, phi=0.9)) is Advice.PAUSE and detector.compute == 0.0
    detector.judge(seen(4)), detector.judge(seen(5))
    assert detector.compute == 1.0 and detector.severity == 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return four_words(tmp_path_factory.mktemp("corpus"))


def job(corpus: tuple[Path, Path], folder: Path, **changes: object) -> Job:
    settings = {
        "kernel.vocab_size": 272, "kernel.width": 16, "kernel.hidden": 24, "kernel.layers": 1, "kernel.context": 32,
        "train.checkpoint_every": 10, "train.precision": "fp32", "train.sample_bytes": 0, "train.eval_bytes": 500,
        "optim.name": "adamw", "telemetry.enabled": True, "telemetry.every": 5, "telemetry.windows": 4,
        "regime.enabled": True, "regime.linear_below": 0.0, "regime.breakdown_from": 1.0,
    }  # fmt: skip
    config = override(tiny(), {**settings, **{k.replace("__", "."): v for k, v in changes.items()}})
    return Job("ocean", folder, config, STEPS, *corpus)


def outcomes(folder: Path) -> list[dict[str, Any]]:
    return list(newest(folder).parts.get("recovery", {}).get("outcomes", []))


def test_a_linear_run_trains_on_three_tenths_of_every_batch(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    last = list(fit(job(corpus, tmp_path, regime__linear_below=0.98, regime__breakdown_from=1.0)))[-1]
    whole, part = 8 * 32, 3 * 32  # ceil(.3 * 8) sequences
    assert last.tokens == 5 * whole + (STEPS - 5) * part, "from the first measurement on"
    assert read_trace(tmp_path)["tokens"].tolist()[:7] == [whole * i for i in range(6)] + [5 * whole + part]


def test_a_pause_trains_on_nothing(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"regime__breakdown_from": 0.01, "regime__recovery": "off", "regime__pause_steps": 3}
    own = job(corpus, tmp_path, **changes)
    steps = list(fit(own))
    rested = [s.step for s, before in zip(steps[1:], steps, strict=False) if s.tokens == before.tokens]
    assert rested[:5] == [6, 7, 8, 11, 12] and steps[-1].step == STEPS
    resting = [s for s in steps if s.step in rested]
    assert all(s.lr == 0 for s in resting)


FAULTS = ("nan_gradient", "corrupted_layer", "collapsed", "dead_units", "rate_spike")


@pytest.mark.parametrize("fault", FAULTS)
def test_the_ladder_ends_no_run_worse_than_it_found_it(corpus: tuple[Path, Path], tmp_path: Path, fault: str) -> None:
    own = job(corpus, tmp_path)
    steps = list(fit(own, probes=[Injector(fault, 30, seed=0)]))
    assert steps[-1].step == STEPS and math.isfinite(steps[-1].loss_nats)
    for outcome in outcomes(tmp_path):
        if outcome["result"] == "kept" and outcome["before"] is not None:
            assert outcome["after"] <= outcome["before"] + own.config.regime.tolerance


def ruined(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.blocks[0].mlp.out.weight.fill_(float("nan"))  # type: ignore[index, union-attr]


class Ruin(Injector):
    def _harm(self, model: Any) -> None:
        ruined(model)


def test_damaged_weights_are_put_back_from_the_checkpoint_and_a_kill_changes_nothing(
    corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    list(fit(job(corpus, whole), probes=[Ruin("", 34, seed=0)]))
    (found,) = outcomes(whole)
    assert found["action"] == "rollback" and found["result"] == "kept" and found["before"] is None
    assert checkpoint.steps_on_disk(whole / "recovery") == [found["step"]], "the moment before is kept"
    for step in fit(job(corpus, killed), probes=[Ruin("", 34, seed=0)]):
        if step.step == 47:
            break
    list(fit(job(corpus, killed), probes=[Ruin("", 34, seed=0)]))
    assert weights(killed) == weights(whole) and outcomes(killed) == outcomes(whole)


def test_without_a_recovery_the_same_run_ends(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"train anew with optim.lr below"):
        list(fit(job(corpus, tmp_path, regime__enabled=False), probes=[Ruin("", 34, seed=0)]))


def test_a_disk_that_cannot_be_written_is_an_outcome_and_the_run_goes_on(
    corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "recovery").write_text("a file where the folder should be")
    changes: dict[str, Any] = {"regime__breakdown_from": 0.01, "regime__pause_steps": 0}
    steps = list(fit(job(corpus, tmp_path, **changes)))
    assert steps[-1].step == STEPS
    assert all(o["action"] == "none" and "unwritable" in o["result"] for o in outcomes(tmp_path))


@pytest.mark.parametrize("name", sorted(ACTIONS))
def test_every_action_leaves_a_model_that_works_and_is_kept_within_its_budget(
    corpus: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    changes: dict[str, Any] = {
        "regime__breakdown_from": 0.01, "regime__pause_steps": 0, "regime__recovery": name, "regime__actions": 2,
        "regime__recovery_steps": 2, "regime__tolerance": 9.0,
    }  # fmt: skip
    steps = list(fit(job(corpus, tmp_path, **changes)))
    assert math.isfinite(steps[-1].loss_nats)
    assert [o["action"] for o in outcomes(tmp_path)] == [name, name]


def test_what_costs_more_than_the_tolerance_is_undone_to_the_bit(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    idle, undone = tmp_path / "idle", tmp_path / "undone"
    pauses: dict[str, Any] = {"regime__breakdown_from": 0.01, "regime__pause_steps": 0}
    list(fit(job(corpus, idle, **pauses, regime__recovery="off")))
    before = ACTIONS["mushroom"]
    try:
        ACTIONS["mushroom"] = lambda training, steps, brake: ruined(training.model)
        list(fit(job(corpus, undone, **pauses, regime__recovery="mushroom")))
    finally:
        ACTIONS["mushroom"] = before
    assert {o["result"] for o in outcomes(undone)} == {"rolled back"} and len(outcomes(undone)) == 8
    assert weights(undone) == weights(idle)


def test_a_cooldown_halves_the_rate_for_its_steps() -> None:
    brake = Brake()
    brake.left = 2
    rates = []
    for step in range(4):
        rates.append(brake.rate(step, 1.0))
        brake.observe({})
    assert rates == [0.5, 0.5, 1.0, 1.0]


def gradients(scale: float) -> list[torch.Tensor]:
    return [scale * torch.ones(3), torch.ones(4)]


def test_adagc_clips_the_tensor_that_spikes_and_no_other() -> None:
    clip = AdaGC()
    for _ in range(120):
        clip(gradients(1.0), 10.0)
    spiked = gradients(100.0)
    clip(spiked, 10.0)
    assert float(spiked[0].norm()) == pytest.approx(ADAGC_LAMBDA * 3**0.5) and torch.equal(spiked[1], torch.ones(4))
    again = AdaGC()
    again.load_state(clip.state())
    a, b = gradients(50.0), gradients(50.0)
    clip(a, 10.0), again(b, 10.0)
    assert torch.equal(a[0], b[0])


def test_zclip_brings_a_spike_near_the_mean_and_leaves_usual_norms() -> None:
    clip, generator = ZClip(), np.random.default_rng(0)
    for _ in range(60):
        usual = [torch.tensor([1 + 0.1 * generator.normal()])]
        before = usual[0].clone()
        clip(usual, 10.0)
    assert torch.equal(usual[0], before) or float(usual[0]) < float(before)
    spike = [torch.tensor([50.0])]
    clip(spike, 1000.0)
    assert 0.5 < float(spike[0]) < 1.5


@pytest.mark.parametrize("kind", ["adagc", "zclip"])
def test_clipping_is_resumed_to_the_bit(corpus: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"regime__enabled": False, "telemetry__enabled": False, "train__clip_kind": kind}
    whole, killed = (job(corpus, tmp_path / name, **changes) for name in ("whole", "killed"))
    list(fit(whole))
    assert next(step for step in fit(killed) if step.step == 47)
    list(fit(killed))
    assert weights(killed.folder) == weights(whole.folder)


def test_requests_that_contradict_themselves_are_refused(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"regime.enabled=true and fit.governor=.... both say"):
        list(fit(job(corpus, tmp_path), governor=Brake()))
    with pytest.raises(ConfigError, match=r"regime.linear_below=0.9: must be below"):
        job(corpus, tmp_path, regime__linear_below=0.9, regime__breakdown_from=0.5)


def test_steps_to_recover_of_drawn_curves() -> None:
    flat, hit = [3.0] * 20, [9.0] * 10
    assert back_after([*flat, *[3.0] * 30], 20, 50) == 0
    assert back_after([*flat, *hit, *[3.0] * 20], 20, 50) == 15
    assert back_after([*flat, *[9.0] * 30], 20, 50) == 30
    assert back_after([*flat, math.nan], 20, 50) == 30
