"""What a run records replays it, ends in the same bits however it is stopped, and changes none of the run."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from constellation import optim
from constellation.artifacts.layout import cut, layout_hash
from constellation.artifacts.run import read_trace
from constellation.artifacts.saved import open_run
from constellation.artifacts.signal import Signal, read_about, read_signals, write_signals
from constellation.config import Config, override
from constellation.errors import ArtifactError, ConfigError
from constellation.kernel.model import KernelLM
from constellation.presets import tiny
from constellation.train import checkpoint
from constellation.train.job import Job
from constellation.train.loop import fit

STEPS = 12
RECORD = {"record.grads_every": 1, "record.curvature_every": 3, "record.signals": 1}


class Drawn:
    """Batches of random tokens, a pure function of the step."""

    def at(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        tokens = np.random.default_rng(step).integers(0, 40, (4, 9))
        return tokens[:, :-1], tokens[:, 1:]


def config(**changes: object) -> Config:
    """3,000 parameters, few enough to be traced."""
    return override(tiny(), {
        "kernel.vocab_size": 272, "kernel.width": 8, "kernel.heads": 2, "kernel.hidden": 16, "kernel.layers": 1,
        "kernel.context": 8, "train.batch": 4, "train.precision": "fp32", "train.checkpoint_every": 5,
        "train.warmup": 0.0, "train.sample_bytes": 0, **changes,
        **({} if "optim.name" in changes else {"optim.ns_precision": "fp32"}),
    })  # fmt: skip


def job(folder: Path, settings: Config, steps: int = STEPS) -> Job:
    return Job("ocean", folder, settings, steps, Path("unread"))


def trained(folder: Path, settings: Config, stop: int | None = None, steps: int = STEPS) -> Path:
    for step in fit(job(folder, settings, steps), Drawn()):
        if step.step == stop:
            break
    return folder


def weights(folder: Path) -> bytes:
    found = checkpoint.newest(folder)
    assert found is not None
    return (found.path / "model.safetensors").read_bytes() + (found.path / "optim.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("alone") / "ocean", config(**RECORD))


def load(model: torch.nn.Module, theta: NDArray[np.float32], blocks: list[dict[str, object]]) -> None:
    with torch.no_grad():
        for (_, p), value in zip(model.named_parameters(), cut(theta, blocks).values(), strict=True):
            p.copy_(torch.from_numpy(value.copy()))


def test_the_loss_of_every_state_is_that_of_its_saved_theta(alone: Path) -> None:
    run = open_run(alone)
    model = KernelLM(config().kernel, seed=3)
    assert run.meta["layout_hash"] == layout_hash(run.meta["layout"]) and len(run.trace["theta"]) == STEPS + 1
    for t, theta in enumerate(run.trace["theta"]):
        load(model, theta, run.meta["layout"])
        x, y = (torch.from_numpy(a) for a in Drawn().at(t))
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        assert float(loss) == pytest.approx(run.trace["loss_nats"][t], rel=1e-6)


@pytest.mark.parametrize("name", ["", "adamw", "diagonal_ng", "curvature_sgd"])
def test_every_theta_follows_from_the_saved_gradients_and_rates(tmp_path: Path, name: str) -> None:
    settings = config(**({"optim.name": name} if name else {}), **RECORD)
    run = open_run(trained(tmp_path / "ocean", settings))
    grads = read_signals(run.path / "grads.npz")["grads"]
    assert grads.step.tolist() == list(range(1, STEPS + 1))
    model = KernelLM(settings.kernel, seed=3)
    load(model, run.trace["theta"][0], run.meta["layout"])
    optimizer = optim.build(settings.optim, model)
    rates = [group["lr"] / settings.optim.lr for group in optimizer.param_groups]
    for t, grad in enumerate(grads.values):
        for p, g in zip(model.parameters(), cut(grad, run.meta["layout"]).values(), strict=True):
            p.grad = torch.from_numpy(g.copy())
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = run.trace["lr"][t] * rate
        optimizer.step()
        theta = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
        assert np.array_equal(theta, run.trace["theta"][t + 1]), t


def test_a_step_follows_from_the_saved_preconditioner(tmp_path: Path) -> None:
    settings = config(**{
        "optim.name": "curvature_sgd", "optim.momentum": 0.0, "optim.refresh": 100, "optim.weight_decay": 0.0,
        "record.precond_every": STEPS - 1, "record.grads_every": 1, "train.ocean_decay": 0.0,
    })  # fmt: skip
    run = open_run(trained(tmp_path / "ocean", settings))
    with np.load(run.path / "precond.npz", allow_pickle=False) as held:
        rates = np.concatenate([held[f"lr.{i}"].ravel() for i in range(sum(n.startswith("lr.") for n in held.files))])
    theta, grads = run.trace["theta"], read_signals(run.path / "grads.npz")["grads"].values
    order = np.concatenate([b.ravel() for b in _in_order_of_the_optimizer(settings)])
    moved = np.empty_like(rates)
    moved[order] = rates
    np.testing.assert_allclose(theta[-1], theta[-2] - moved * grads[-1], rtol=0, atol=1e-7)


def _in_order_of_the_optimizer(settings: Config) -> list[NDArray[np.int64]]:
    """Where in theta each parameter of the optimizer's groups is."""
    model = KernelLM(settings.kernel, seed=3)
    places, start = {}, 0
    for p in model.parameters():
        places[p] = np.arange(start, start + p.numel())
        start += p.numel()
    return [places[p] for group in optim.build(settings.optim, model).param_groups for p in group["params"]]


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_records_end_in_the_same_bits_however_a_run_is_stopped(alone: Path, tmp_path: Path, stop: int) -> None:
    folder = trained(tmp_path / "ocean", config(**RECORD), stop)
    trained(folder, config(**RECORD))
    assert weights(folder) == weights(alone)
    for name in ("grads.npz", "curvature.npz"):
        for key, ours in read_signals(folder / name).items():
            theirs = read_signals(alone / name)[key]
            assert np.array_equal(ours.values, theirs.values) and np.array_equal(ours.step, theirs.step)
            assert ours.stderr is None or (theirs.stderr is not None and np.array_equal(ours.stderr, theirs.stderr))


def test_recording_changes_no_bit_of_the_run(alone: Path, tmp_path: Path) -> None:
    plain = trained(tmp_path / "ocean", config())
    assert weights(plain) == weights(alone)
    assert {n: a.tobytes() for n, a in read_trace(plain).items()} == {
        n: a.tobytes() for n, a in read_trace(alone).items()
    }
    assert not [name for name in ("grads.npz", "curvature.npz", "signals.npz") if (plain / name).exists()]


def test_curvature_says_kind_unit_and_error(alone: Path) -> None:
    about, found = read_about(alone / "curvature.npz"), read_signals(alone / "curvature.npz")["curvature"]
    assert about == {"kind": "gauss_newton", "units": "loss / theta^2", "probes": 4} and found.unit == "loss / theta^2"
    assert found.step.tolist() == [3, 6, 9, 12] and found.stderr is not None and bool((found.values >= 0).all())
    assert found.values.shape == found.stderr.shape == (4, read_trace(alone)["theta"].shape[1])


def test_signals_are_written_and_a_truth_that_was_added_stays(tmp_path: Path) -> None:
    settings = config(**{"record.signals": 1})
    folder = trained(tmp_path / "ocean", settings, 6)
    run = open_run(folder)
    assert run.signals["theta"].step[-1] == 4  # the states before the five steps that the checkpoint holds
    truth = np.zeros(run.trace["theta"].shape[1])
    own = {**run.signals, "theta": Signal(run.signals["theta"].values, run.signals["theta"].step, truth=truth)}
    write_signals(folder / "signals.npz", own)
    trained(folder, settings)
    found = open_run(folder).signals["theta"]
    assert found.step[-1] == STEPS and found.truth is not None and np.array_equal(found.residual().values, found.values)


def test_what_cannot_be_recorded_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"record\.precond_every=5: kronecker_ng keeps no rates"):
        config(**{"record.precond_every": 5})
    big = config(**{"record.grads_every": 1})
    with pytest.raises(ConfigError, match=r"record\.grads_every=1: 1000000 rows .* raise it"):
        list(fit(job(tmp_path / "big", big, 10**6), Drawn()))
    folder = trained(tmp_path / "ocean", config(**RECORD), 8)
    (folder / "grads.npz").write_bytes((folder / "grads.npz").read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"grads\.npz is damaged"):
        trained(folder, config(**RECORD))
    assert math.isfinite(open_run(folder).trace["loss_nats"][0])
