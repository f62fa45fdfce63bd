"""What precision=auto comes to: the processor is asked in one place, the answer is written down and stays."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from constellation import processor
from constellation.config import Config, override
from constellation.errors import ConfigError
from constellation.optim.kronecker import KroneckerNG
from constellation.optim.mixed import HybridGeometricOptimizer
from constellation.pipeline.prepare import request
from constellation.presets import tiny
from constellation.train import checkpoint
from constellation.train.job import Job, resolve_precision
from constellation.train.loop import fit

MICRO = {
    "kernel.vocab_size": 272, "kernel.width": 16, "kernel.hidden": 24, "kernel.layers": 1, "kernel.context": 16,
    "train.checkpoint_every": 2, "train.precision": "fp32", "train.sample_bytes": 0,
}  # fmt: skip


class Text:
    def at(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        tokens = (np.random.default_rng(step).integers(0, 272, (8, 1)) + np.arange(17) * 5) % 272
        return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> str:
    """The precision that this processor would not choose; from now on it would."""
    answer = not processor.fast_bf16("cpu")
    monkeypatch.setattr(processor, "fast_bf16", lambda device: answer)
    return "bf16" if answer else "fp32"


def test_auto_becomes_what_the_processor_multiplies_fast() -> None:
    config = resolve_precision(tiny())
    assert (
        config.train.precision
        == config.optim.ns_precision
        == processor.precision("cuda" if torch.cuda.is_available() else "cpu")
    )
    fixed = override(tiny(), {"train.precision": "bf16", "optim.ns_precision": "fp32"})
    assert resolve_precision(fixed) == fixed


def test_where_kernels_have_gpus_of_their_own_it_is_bf16() -> None:
    config = resolve_precision(override(tiny(), {"cluster.gpus_per_kernel": 1.0}))
    assert config.train.precision == config.optim.ns_precision == "bf16"


@pytest.mark.parametrize("variable", [{"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"ATEN_CPU_CAPABILITY": "avx2"}])
def test_a_processor_told_to_leave_its_bf16_instructions_alone_computes_in_float32(variable: dict[str, str]) -> None:
    code = "from constellation import processor; print(processor.precision('cpu'), processor.instructions())"
    out = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variable}, capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith("fp32 ") and "no bf16" in out


def test_optimizers_write_down_what_auto_came_to() -> None:
    w, v = torch.ones(4, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    assert KroneckerNG([w, v]).state_dict()["param_groups"][0]["ns_precision"] == processor.precision("cpu")
    hybrid = HybridGeometricOptimizer([("basin", v), ("w", w)], rest_optimizer="kron")
    assert hybrid.param_groups[1]["ns_precision"] == processor.precision("cpu")


def test_an_optimizer_goes_on_in_the_precision_of_its_state(other: str) -> None:
    w = torch.ones(4, 3, requires_grad=True)
    mine = "fp32" if other == "bf16" else "bf16"
    saved = KroneckerNG([w], ns_precision=mine).state_dict()
    optimizer = KroneckerNG([w])
    assert optimizer.param_groups[0]["ns_precision"] == other
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["ns_precision"] == mine


def weights(folder: Path) -> bytes:
    found = checkpoint.newest(folder)
    assert found is not None
    return (found.path / "model.safetensors").read_bytes() + (found.path / "optim.safetensors").read_bytes()


def test_a_run_that_goes_on_elsewhere_keeps_its_precision_and_its_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(name: str, config: Config) -> Job:
        return Job("ocean", tmp_path / name, config, 6, train=Path("unread"))

    config = override(tiny(), MICRO)
    settled = resolve_precision(config)
    list(fit(job("alone", settled), Text()))
    for name, its in (("resolved", settled), ("auto", config)):
        run = fit(job(name, its), Text())
        for step in run:
            if step.step == 3:
                break
        run.close()  # type: ignore[attr-defined]
        with monkeypatch.context() as elsewhere:
            answer = not processor.fast_bf16("cpu")
            elsewhere.setattr(processor, "fast_bf16", lambda device, answer=answer: answer)
            list(fit(job(name, its), Text()))
        assert weights(tmp_path / name) == weights(tmp_path / "alone")


def test_resuming_elsewhere_with_the_same_words_is_no_other_setting(tmp_path: Path, other: str) -> None:
    def ask(config: Config, resume: bool) -> str:
        return request(tmp_path / "run", tmp_path, config, resume)

    mine = "fp32" if other == "bf16" else "bf16"
    here = override(tiny(), {"train.precision": mine, "optim.ns_precision": mine})
    ask(here, resume=False)
    ask(tiny(), resume=True)  # auto, as when the run was started
    asked = dataclasses.replace(here, train=dataclasses.replace(here.train, precision=other))
    with pytest.raises(ConfigError, match=f"train.precision={other}"):
        ask(asked, resume=True)
