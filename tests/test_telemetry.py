"""Telemetry says what its formulas say: closed forms, nulls, what is degenerate, and a run that it does not touch."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from constellation.artifacts.run import read_telemetry
from constellation.config import override
from constellation.errors import ConfigError
from constellation.geometry.fisher import FisherBlock, flatten
from constellation.kernel.model import KernelLM
from constellation.optim.gate import AdaptiveConfig, should_apply_ng
from constellation.presets import tiny
from constellation.regime.words import words
from constellation.telemetry.collapse import repeat_rate, unigram_kl
from constellation.telemetry.collective import collective_phi
from constellation.telemetry.coupling import coupling
from constellation.telemetry.curiosity import Curiosity, Mood
from constellation.telemetry.emotion import EXTENDED, PRIMITIVES, EmotionMonitor
from constellation.telemetry.integration import equicorrelated, integration
from constellation.telemetry.kappa import gradient_curvature
from constellation.telemetry.monitor import Telemetry, Windows, basin_distance, read
from constellation.telemetry.ricci import ollivier_ricci
from constellation.train import checkpoint
from constellation.train.job import Job
from constellation.train.loop import fit
from tests.cases import four_words, weights

N, D = 4096, 64
STEPS = 24


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


REFERENCES = {
    "iid": (normal(N, D), 0.02, 0.985),
    "rank 1": (normal(N, 1) @ normal(1, D, seed=1), 0.454, 0.0),
    "equicorrelated": (0.2**0.5 * normal(N, 1) + 0.8**0.5 * normal(N, D, seed=1), equicorrelated(0.2, D), 0.277),
    "16 factors": (normal(N, 16) @ normal(16, D, seed=1), 0.936, 0.192),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_phi_and_differentiation_of_known_covariances(name: str) -> None:
    states, phi, differentiation = REFERENCES[name]
    found = integration(states)
    assert found.phi == pytest.approx(phi, abs=0.015) and found.differentiation == pytest.approx(
        differentiation, abs=0.012
    )
    assert not found.degenerate


def test_phi_does_not_see_units_offsets_or_scales() -> None:
    states = normal(512, 8) @ normal(8, 8, seed=1)
    other = states * torch.linspace(0.1, 7, 8) + torch.linspace(-3, 3, 8)
    assert integration(other).phi == pytest.approx(integration(states).phi, abs=1e-6)


@pytest.mark.parametrize("states", [torch.ones(100, 8), torch.full((100, 8), float("nan"))], ids=["constant", "nan"])
def test_what_does_not_vary_is_degenerate_and_not_integrated(states: torch.Tensor) -> None:
    found = integration(states)
    assert found.degenerate and found.phi == 0


def test_too_few_samples_are_refused_with_the_number_needed() -> None:
    with pytest.raises(ConfigError, match="phi of 60 samples of 64 units: at least 66 are needed"):
        integration(normal(60, 64))


def test_collective_phi_of_copies_is_near_one_and_of_strangers_near_nought() -> None:
    def basins(seed: int) -> torch.Tensor:
        return torch.softmax(2 * normal(600, 20, seed=seed), -1).sqrt()

    copies = collective_phi(basins(0).expand(4, -1, -1))
    strangers = collective_phi(torch.stack([basins(seed) for seed in range(4)]))
    assert copies.phi > 0.9 and strangers.phi < 0.3
    with pytest.raises(ConfigError, match="collective phi of 1 kernel"):
        collective_phi(basins(0)[None])


def model(seed: int = 0, **changes: Any) -> KernelLM:
    settings = {"kernel.vocab_size": 272, "kernel.width": 16, "kernel.hidden": 24, "kernel.context": 32}
    return KernelLM(override(tiny(), {**settings, **changes}).kernel, seed=seed)


def tokens(rows: int = 4, length: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(16, 272, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_gradient_curvature_is_the_rayleigh_quotient_of_the_fisher_matrix() -> None:
    lm, x = model(), tokens(1)
    parameters = [p for p in lm.parameters() if p.numel() < 300]
    loss = torch.nn.functional.cross_entropy(lm(x)[0, :-1], x[0, 1:])
    grads = torch.autograd.grad(loss, parameters)
    block = FisherBlock(lm(x), parameters)
    g = flatten(grads)
    wanted = float(g @ block.matvec(g) / (g @ g))
    assert gradient_curvature(lm, parameters, grads, x) == pytest.approx(wanted, rel=1e-4)
    assert math.isnan(gradient_curvature(lm, parameters, [torch.zeros_like(p) for p in parameters], x))


def test_a_model_that_does_not_look_back_is_not_coupled() -> None:
    lm = model()
    assert float(coupling(lm, tokens()).mean()) > 0
    with torch.no_grad():
        for block in lm.blocks:
            block.attention.out.weight.zero_()
    assert float(coupling(lm, tokens(), reads=200)[0]) == pytest.approx(0.0, abs=0.05)  # the look-back alone is left


def test_the_basin_distance_is_a_distance_of_models() -> None:
    windows = Windows(tokens(), tokens())
    a, b, c = (read(model(seed), windows).sqrt_p_NV for seed in (0, 1, 2))
    assert basin_distance(a, a) == pytest.approx(0, abs=1e-3)
    assert basin_distance(a, b) == basin_distance(b, a) > 0.1
    assert basin_distance(a, c) <= basin_distance(a, b) + basin_distance(b, c) + 1e-6


def test_a_reading_says_what_the_whole_logits_say() -> None:
    lm, windows = model(), Windows(tokens(), tokens(seed=1))
    seen = read(lm, windows, chunk=7)
    logits = lm(windows.inputs_ST).flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits, windows.targets_ST.flatten(), reduction="none")
    torch.testing.assert_close(seen.nats_ST.flatten(), nats)
    torch.testing.assert_close(seen.mean_V, logits.softmax(-1).mean(0))


def test_repeats_and_unigrams_of_plain_cases() -> None:
    text = tokens(2, 64)
    assert repeat_rate(text) == 0.0 and repeat_rate(torch.zeros_like(text)) == pytest.approx(60 / 61)
    assert repeat_rate(torch.arange(8).repeat(1, 8)) == pytest.approx(53 / 61)
    frequencies = torch.bincount(text.flatten(), minlength=272) / text.numel()
    assert unigram_kl(text, frequencies) == pytest.approx(0, abs=1e-6)
    assert unigram_kl(torch.zeros(9, dtype=torch.int64), torch.full((16,), 1 / 16)) == pytest.approx(math.log(16))


@given(st.integers(0, 1000))
def test_ricci_curvature_is_that_of_the_cheapest_assignment(seed: int) -> None:
    points = normal(9, 2, seed=seed)
    d = torch.cdist(points, points)
    found = ollivier_ricci(d).tolist()
    near = (d + torch.diag(torch.full((9,), torch.inf))).topk(4, largest=False).indices
    wanted = []
    for x, k in itertools.product(range(9), range(4)):
        y = int(near[x, k])
        cost = d[near[x]][:, near[y]].numpy()
        wanted.append(1 - cost[linear_sum_assignment(cost)].mean() / float(d[x, y]))
    assert found == pytest.approx(wanted, abs=1e-4)


def test_moods_of_falling_flat_and_rising_losses() -> None:
    def mood(losses: list[float], noise: float = 0.0, norm: float = 1.0) -> Mood:
        curiosity, signs = Curiosity(), (-1.0) ** np.arange(8)
        for i, loss in enumerate(losses):
            _, found = curiosity.see((loss + noise * (-1) ** i * signs).tolist(), norm + i)
        return found

    assert mood([5, 4, 3, 2, 1]) is Mood.EXPLORATION
    assert mood([5, 4, 3, 2.9, 2.89]) is Mood.EXPLOITATION
    assert mood([1, 2, 3]) is Mood.REGRESSION
    assert mood([3.0] * 3, noise=0.1) is Mood.STAGNATION
    assert mood([3.0] * 8, noise=0.1) is Mood.STUCK


def test_an_emotion_is_a_z_score_of_its_trailing_window() -> None:
    monitor, values = EmotionMonitor(), [1.0, 4.0, 2.0, 8.0]
    found = [monitor.compute({"joy": v, "calm": 3.0})["emotion_joy"] for v in values]
    assert found[0] == 0.0 and found[-1] == pytest.approx((8 - np.mean(values)) / np.std(values))
    assert monitor.compute({"joy": float("nan")}) == {"emotion_joy": 0.0}
    assert monitor.compute({"calm": 3.0}) == {"emotion_calm": 0.0}, "what has not varied"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return four_words(tmp_path_factory.mktemp("corpus"))


def job(corpus: tuple[Path, Path], folder: Path, branch: Path | None = None, **changes: object) -> Job:
    settings = {
        "kernel.vocab_size": 272, "kernel.width": 16, "kernel.hidden": 24, "kernel.layers": 1, "kernel.context": 32,
        "train.checkpoint_every": 7, "train.precision": "fp32", "train.sample_bytes": 0, "train.eval_bytes": 500,
        "optim.name": "adamw", "telemetry.enabled": True, "telemetry.every": 3, "telemetry.windows": 4,
    }  # fmt: skip
    config = override(tiny(), {**settings, **{k.replace("__", "."): v for k, v in changes.items()}})
    return Job("ocean" if branch is None else "heart", folder, config, STEPS, *corpus, branch=branch)


@pytest.fixture(scope="module")
def measured(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "ocean"
    list(fit(job(corpus, folder)))
    return folder


def test_telemetry_changes_no_bit_of_a_run(corpus: tuple[Path, Path], measured: Path, tmp_path: Path) -> None:
    list(fit(job(corpus, tmp_path, telemetry__enabled=False)))
    assert weights(tmp_path) == weights(measured)
    assert not (tmp_path / "training_telemetry.jsonl").exists()


def test_every_measurement_is_a_line_with_names_and_a_killed_run_writes_the_same(
    corpus: tuple[Path, Path], measured: Path, tmp_path: Path
) -> None:
    lines = read_telemetry(measured)
    assert [line["step"] for line in lines] == list(range(3, STEPS + 1, 3))
    assert all(line["regime"] in ("linear", "geometric", "breakdown") for line in lines)
    assert {f"emotion_{name}" for name in (*PRIMITIVES, *EXTENDED)} <= set(lines[-1])
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    assert "kappa_eff" not in lines[2] and lines[-1]["kappa_eff"] > 0, "three are its calibration"
    for step in fit(job(corpus, tmp_path)):
        if step.step == 17:
            break
    list(fit(job(corpus, tmp_path)))
    assert read_telemetry(tmp_path) == lines and weights(tmp_path) == weights(measured)


def test_a_kernel_is_measured_against_the_checkpoint_it_branches_from(
    corpus: tuple[Path, Path], measured: Path, tmp_path: Path
) -> None:
    list(fit(job(corpus, tmp_path / "heart", checkpoint.folder_of(measured, STEPS))))
    distances = [line["basin_distance"] for line in read_telemetry(tmp_path / "heart")]
    assert 0 < distances[0] < distances[-1] < math.pi
    assert not any("basin_distance" in line for line in read_telemetry(measured)), "OCEAN is nobody's branch"


def test_a_model_that_predicts_nothing_finite_is_flagged_and_nothing_else_is_said() -> None:
    class Stub:
        model, step, numbers = model(), 1, {"grad_norm": 1.0}

    with torch.no_grad():
        Stub.model.norm.weight.fill_(float("nan"))
    probe = Telemetry(Windows(tokens(), tokens()), every=1)
    assert probe.measure(Stub()) == {"telemetry_nan": 1.0}  # type: ignore[arg-type]
    assert json.dumps(probe.state())


def test_wrong_probe_sets_are_refused_in_one_line(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"telemetry.windows=1: 8 states of 16 units are too few .*windows=3"):
        list(fit(job(corpus, tmp_path, kernel__context=8, telemetry__windows=1)))
    no_dev = job(corpus, tmp_path)
    with pytest.raises(ConfigError, match=r"telemetry.enabled=true needs held-out text"):
        list(fit(Job(**{**vars(no_dev), "dev": None})))
    with pytest.raises(ConfigError, match="no probe set"):
        Windows(torch.zeros(0, 32), torch.zeros(0, 32)).check(16)


def test_the_gate_is_told_regime_and_mood_by_their_names() -> None:
    gate = AdaptiveConfig(force_ng_every_n_steps=0, min_kappa_for_ng=1e9, min_basin_distance=9.0, use_curiosity=False)
    told = {"phi": 0.75, "kappa_eff": 35.0, "mood": float(Mood.STUCK)}
    reasons = should_apply_ng({**told, **words(told)}, 1, gate).reasons
    assert [reason.split(":")[0] for reason in reasons] == ["geometric", "stuck"]
