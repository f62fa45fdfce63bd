"""What is added to a run: it changes no bit unasked, and is killed and resumed with the run as if never stopped."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from constellation.artifacts.run import read_trace
from constellation.config import Config, override
from constellation.errors import ConfigError, RunError
from constellation.presets import tiny
from constellation.regime.protocol import Advice, Recoverable
from constellation.train import checkpoint
from constellation.train.job import Job
from constellation.train.loop import fit
from constellation.train.objective import Objective
from tests.cases import four_words, newest, weights
from tests.parts import Brake, EveryFifth, Ladder, Norm, every_part

STEPS = 24


def config(**changes: object) -> Config:
    settings = {
        "kernel.vocab_size": 272, "kernel.width": 16, "kernel.hidden": 24, "kernel.layers": 1, "kernel.context": 32,
        "train.checkpoint_every": 7, "train.precision": "fp32", "train.sample_bytes": 0, "train.eval_bytes": 500,
        "optim.name": "adamw",
    }  # fmt: skip
    return override(tiny(), {**settings, **{k.replace("__", "."): v for k, v in changes.items()}})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(train cache, dev cache) of a text with something to learn."""
    return four_words(tmp_path_factory.mktemp("corpus"))


def job(corpus: tuple[Path, Path], folder: Path, **changes: object) -> Job:
    return Job("ocean", folder, config(**changes), STEPS, corpus[0], corpus[1])


def remembered(folder: Path) -> dict[str, Any]:
    """What the parts of a run remember, but for seconds."""
    parts = newest(folder).parts
    del parts["probes"]["elapsed_s"]
    for probe in parts["probes"]["probes"].values():
        del probe["cost"]["spent_s"], probe["cost"]["last_s"]
    return parts


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "diag_steps.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "wall_s"} for line in lines]


@pytest.fixture(scope="module")
def plain(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run to which nothing was added."""
    folder = tmp_path_factory.mktemp("plain") / "ocean"
    list(fit(job(corpus, folder)))
    return folder


@pytest.fixture(scope="module")
def alone(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with every part, left alone."""
    folder = tmp_path_factory.mktemp("alone") / "ocean"
    torch.manual_seed(7)
    list(fit(job(corpus, folder), **every_part()))
    return folder


def test_a_run_to_which_nothing_was_added_has_no_parts(plain: Path) -> None:
    assert "parts" not in newest(plain).state and newest(plain).parts == {}
    assert not {"measured", "advice"} & set().union(*logged(plain))


def test_a_probe_changes_no_bit_although_it_draws_numbers_and_leaves_gradients(
    corpus: tuple[Path, Path], plain: Path, tmp_path: Path
) -> None:
    probe = Norm(every=3)
    torch.manual_seed(1)
    steps = list(fit(job(corpus, tmp_path), probes=[probe]))
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    assert weights(tmp_path) == weights(plain)
    assert [s.step for s in steps if s.measured] == list(range(3, STEPS + 1, 3)) and len(probe.before) == STEPS // 3
    last = checkpoint.load_model(tmp_path)
    norm = torch.stack([p.detach().norm() for p in last.parameters()]).norm()
    assert steps[-1].measured is not None and steps[-1].measured["norm"] == pytest.approx(float(norm), rel=1e-6)


def test_every_part_does_what_it_says(alone: Path, plain: Path) -> None:
    parts, log = remembered(alone), logged(alone)
    assert set(parts) == {"objective", "probes", "regime", "recovery", "governor"}
    assert parts["recovery"] == {"kept": STEPS // 5, "rolled_back": STEPS // 5}
    assert parts["regime"]["judged"] == STEPS
    assert parts["regime"]["norms"] == parts["probes"]["probes"]["norm"]["state"]["before"]
    assert [line["step"] for line in log if "advice" in line] == [5, 10, 15, 20]
    assert all(line["measured"]["spread"] > 0 for line in log)
    assert parts["governor"] == {"first": log[0]["loss_nats"], "last": log[-1]["loss_nats"]}
    for before, line, scheduled in zip(log, log[1:], logged(plain)[1:], strict=False):
        assert line["lr"] == scheduled["lr"] * (before["loss_nats"] / log[0]["loss_nats"])


KILLED = """
import pickle, sys
import torch
from constellation.train.loop import fit
from constellation.train.objective import Objective
from tests.parts import every_part
torch.manual_seed(7)
for step in fit(pickle.load(open(sys.argv[1], "rb")), **every_part(lambda text: print(text, flush=True))):
    print(f"step {step.step}", flush=True)
"""


def test_killed_in_the_middle_of_a_step_and_of_an_action_it_ends_in_the_same_bits(
    corpus: tuple[Path, Path], alone: Path, tmp_path: Path
) -> None:
    work, folder = tmp_path / "job", tmp_path / "ocean"
    work.write_bytes(pickle.dumps(job(corpus, folder)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    deaths = ["step 9", "acting at 10", "acting at 20", "never"]
    for death in deaths:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(work)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == death:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == (0 if death == "never" else -signal.SIGKILL)
    assert weights(folder) == weights(alone)
    assert remembered(folder) == remembered(alone)
    assert logged(folder) == logged(alone)


def test_a_run_is_not_resumed_without_what_it_was_trained_with(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    def stop(steps: Iterator[Any], at: int) -> None:
        assert next(step for step in steps if step.step == at)

    stop(fit(job(corpus, tmp_path), **every_part()), 8)
    for name in ("objective", "regime", "recovery", "governor"):
        given = {key: part for key, part in every_part().items() if key != name}
        with pytest.raises(ConfigError, match=rf"pass fit\(job, {name}="):
            next(fit(job(corpus, tmp_path), **given))
    stop(fit(job(corpus, tmp_path), **{**every_part(), "probes": [Norm(name="other")]}), 14)
    kept = newest(tmp_path).parts["probes"]["probes"]
    assert len(kept["norm"]["state"]["before"]) == 2, "a probe that comes back goes on where it was"
    assert len(kept["other"]["state"]["before"]) == 2


def test_a_run_that_had_no_parts_may_be_given_some(corpus: tuple[Path, Path], plain: Path, tmp_path: Path) -> None:
    assert next(step for step in fit(job(corpus, tmp_path)) if step.step == 7)
    regime = EveryFifth()
    list(fit(job(corpus, tmp_path), regime=regime, probes=[Norm()]))
    assert regime.judged == STEPS - 7 and weights(tmp_path) == weights(plain), "advice without recovery is only told"


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0])
def test_a_rate_that_is_none_is_refused(corpus: tuple[Path, Path], tmp_path: Path, rate: float) -> None:
    class Stuck(Brake):
        def rate(self, step: int, scheduled: float) -> float:
            return rate

    with pytest.raises(ConfigError, match=rf"the rate of step 0 is {rate}; it must be finite and at least 0"):
        next(fit(job(corpus, tmp_path), governor=Stuck()))


def test_what_is_no_json_cannot_be_remembered(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    governor = Brake()
    governor.first = torch.ones(())  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"^governor: its state\(\) must be text, numbers.*Tensor"):
        list(fit(job(corpus, tmp_path), governor=governor))


@dataclasses.dataclass
class Kappa(Norm):
    """Says at its first measurement that the model is curved, and later that it is not."""

    name: str = "kappa"
    every: int = 4

    def measure(self, training: Any) -> dict[str, float]:
        self.before.append(50.0 if not self.before else 0.0)
        return {"kappa_eff": self.before[-1]}


def test_an_optimizer_that_wants_telemetry_is_told_what_was_measured_last_also_after_a_kill(
    corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    gate = {"kappa_every": 0, "max_overhead": 0.0, "force_ng_every_n_steps": 0}
    changes = {f"optim__gate__{name}": value for name, value in gate.items()}
    own = job(corpus, tmp_path, optim__name="adaptive_mixed_qig", train__checkpoint_every=6, **changes)
    assert next(step for step in fit(own, probes=[Kappa()]) if step.step == 7)
    list(fit(own, probes=[Kappa()]))
    gate_memory = newest(tmp_path).state["optimizer"]["groups"][0]["gate"]
    assert gate_memory["natural_steps"] == 4, "steps 5 to 8; the second sitting began at 6, after the measurement at 4"


class Burst:
    """A term of weight 1 that is next to nothing, and no number at one call; the first is fit's look for a gradient."""

    def __init__(self, bad: int):
        self.calls, self.bad = 0, bad

    def __call__(self, forward: Any) -> torch.Tensor:
        self.calls += 1
        return forward.hidden_BTD.square().mean() * (float("nan") if self.calls == self.bad else 1e-12)


@dataclasses.dataclass
class Skip(Ladder):
    """Goes on without the batch that failed, from the last checkpoint."""

    def act(self, training: Recoverable, advice: Advice) -> None:
        if training.failure is not None:
            saved = training.last_checkpoint()
            assert saved is not None
            training.roll_back(saved)
            self.rolled_back += 1


def test_a_failed_step_ends_the_run_unless_a_recovery_helps(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    def burst() -> Objective:
        return Objective({"burst": Burst(12)}, {"burst": 1.0})

    with pytest.raises(RunError, match=r"loss nan and gradient norm nan at step 10; train anew"):
        list(fit(job(corpus, tmp_path / "a"), objective=burst(), regime=EveryFifth()))
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["status"] == "failed"

    recovery = Skip()
    steps = list(fit(job(corpus, tmp_path / "b"), objective=burst(), regime=EveryFifth(), recovery=recovery))
    assert recovery.rolled_back == 1 and steps[10].advice == "recover" and len(steps) == STEPS
    trace, summary = read_trace(tmp_path / "b"), json.loads((tmp_path / "b" / "summary.json").read_text())
    assert list(np.flatnonzero(np.isnan(trace["grad_norm"]))) == [10, STEPS] and summary["status"] == "done"
    assert trace["loss_nats"][11] == pytest.approx(trace["loss_nats"][7], abs=0.2), "from the checkpoint of step 7"


class Pause(Ladder):
    def act(self, training: Recoverable, advice: Advice) -> None:
        training.pause()


def test_a_pause_ends_the_sitting_with_a_checkpoint_and_changes_no_bit(
    corpus: tuple[Path, Path], plain: Path, tmp_path: Path
) -> None:
    sittings = []
    while not sittings or sittings[-1]:
        sittings.append([step.step for step in fit(job(corpus, tmp_path), regime=EveryFifth(), recovery=Pause())])
    assert [steps[-1] for steps in sittings[:-1]] == [5, 10, 15, 20, 24] and weights(tmp_path) == weights(plain)


def test_only_to_go_on_is_no_advice() -> None:
    assert [advice for advice in Advice if not advice] == [Advice.GO_ON]
