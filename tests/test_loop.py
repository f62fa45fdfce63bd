"""fit: the same bits however often it is stopped, killed or cut into micro-batches."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from constellation.artifacts.run import read_trace
from constellation.config import Config, override
from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.cache import build_cache
from constellation.data.corpus import Document
from constellation.errors import RunError
from constellation.presets import tiny
from constellation.train import checkpoint
from constellation.train.job import Job, steps_for
from constellation.train.loop import fit
from constellation.train.schedule import learning_rate

STEPS = 30


def config(**changes: object) -> Config:
    settings = {
        "train.checkpoint_every": 7,
        "train.precision": "fp32",
        "train.ocean_threads": 1,
        "train.sample_bytes": 0,
    }
    return override(tiny(), {**settings, **{k.replace("__", "."): v for k, v in changes.items()}})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(train cache, dev cache, tokenizer) of a small synthetic text with something to learn."""
    root = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    words = ["basin", "kernel", "sphere", "root", "angle", "geodesic", "metric", "mean"]
    texts = [" ".join(generator.choices(words, k=300)) + f" {i}." for i in range(12)]
    tokenizer = Tokenizer.train(texts, 512)
    tokenizer.save(root / "tokenizer.json")
    documents = [Document(t, None, str(i), None, {}) for i, t in enumerate(texts)]
    train, dev = (build_cache(part, tokenizer, root / "data").path for part in (documents[:10], documents[10:]))
    return train, dev, root / "tokenizer.json"


def job(corpus: tuple[Path, Path, Path], folder: Path, steps: int = STEPS, **changes: object) -> Job:
    return Job("ocean", folder, config(**changes), steps, corpus[0], corpus[1], corpus[2])


def weights(folder: Path) -> bytes:
    found = checkpoint.newest(folder)
    assert found is not None
    return (found.path / "model.safetensors").read_bytes() + (found.path / "optim.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(corpus: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was left alone."""
    folder = tmp_path_factory.mktemp("alone") / "ocean"
    losses = [step.loss_nats for step in fit(job(corpus, folder))]
    assert losses[-1] < losses[0]
    return folder


def test_two_runs_are_equal_bit_for_bit(corpus: tuple[Path, Path, Path], alone: Path, tmp_path: Path) -> None:
    list(fit(job(corpus, tmp_path / "ocean")))
    assert weights(tmp_path / "ocean") == weights(alone)


@pytest.mark.parametrize("stop", [1, 7, 20])
def test_a_run_stopped_and_resumed_ends_in_the_same_bits(
    corpus: tuple[Path, Path, Path], alone: Path, tmp_path: Path, stop: int
) -> None:
    for step in fit(job(corpus, tmp_path / "ocean")):
        if step.step == stop:
            break
    resumed = [s.step for s in fit(job(corpus, tmp_path / "ocean"))]
    assert resumed == list(range(stop // 7 * 7 + 1, STEPS + 1))
    assert weights(tmp_path / "ocean") == weights(alone)
    ours, theirs = read_trace(tmp_path / "ocean"), read_trace(alone)
    for name in theirs:
        assert np.array_equal(ours[name], theirs[name], equal_nan=True), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "ocean" / "diag_steps.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


KILLED = """
import pickle, sys
from constellation.train.loop import fit
for step in fit(pickle.load(open(sys.argv[1], "rb"))):
    print(step.step, flush=True)
"""


def test_sigkill_at_random_moments_loses_nothing_that_was_saved(
    corpus: tuple[Path, Path, Path], alone: Path, tmp_path: Path
) -> None:
    import pickle

    work = tmp_path / "job"
    work.write_bytes(pickle.dumps(job(corpus, tmp_path / "ocean")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    generator, kills = random.Random(os.getpid()), 0
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(work)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        until = generator.randint(2, 12)
        for count, _line in enumerate(process.stdout, 1):
            if count == until and kills < 3:
                time.sleep(generator.random() * 0.02)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        process.stdout.close()
        if process.wait() == 0:
            break
    assert kills == 3
    assert weights(tmp_path / "ocean") == weights(alone)


def test_a_finished_run_yields_nothing(corpus: tuple[Path, Path, Path], alone: Path) -> None:
    assert list(fit(job(corpus, alone))) == []


def test_accumulation_changes_rounding_only(corpus: tuple[Path, Path, Path], alone: Path, tmp_path: Path) -> None:
    list(fit(job(corpus, tmp_path / "ocean", train__accumulation=4)))
    a, b = (read_trace(f) for f in (tmp_path / "ocean", alone))
    assert a["loss_nats"][0] == pytest.approx(b["loss_nats"][0], abs=1e-5)
    assert a["grad_norm"][0] == pytest.approx(b["grad_norm"][0], rel=1e-4)
    assert np.allclose(a["loss_nats"], b["loss_nats"], atol=0.02)  # bf16 products of the optimizer in between


@pytest.mark.parametrize("chunk", [16, 100])
def test_the_loss_chunk_changes_rounding_only(
    corpus: tuple[Path, Path, Path], alone: Path, tmp_path: Path, chunk: int
) -> None:
    list(fit(job(corpus, tmp_path / "ocean", train__loss_chunk=chunk)))
    a, b = (read_trace(f)["loss_nats"] for f in (tmp_path / "ocean", alone))
    assert np.allclose(a, b, atol=0.02) and abs(a[0] - b[0]) < 1e-5


def test_a_branch_starts_from_the_weights_and_the_optimizer_it_names(
    corpus: tuple[Path, Path, Path], alone: Path, tmp_path: Path
) -> None:
    source = checkpoint.newest(alone)
    assert source is not None
    branch = dataclasses.replace(job(corpus, tmp_path / "heart", 1), role="heart", branch=source.path)
    (step,) = fit(branch)
    final = read_trace(alone)
    assert abs(step.loss_nats - final["loss_nats"][-1]) < 0.3  # near where OCEAN ended, far from ln 512
    held = checkpoint.newest(tmp_path / "heart")
    assert held is not None
    from safetensors.torch import load_file

    counts = {k: v for k, v in load_file(held.path / "optim.safetensors").items() if k.endswith(".step")}
    assert {float(v) for v in counts.values()} == {STEPS + 1.0}


def test_a_diverged_run_fails_with_its_reason_and_keeps_its_checkpoints(
    corpus: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    steps = fit(job(corpus, tmp_path / "ocean", optim__lr=1e30, train__clip=1e30))
    with pytest.raises(RunError, match=r"optim\.lr below"):
        list(steps)
    summary = json.loads((tmp_path / "ocean" / "summary.json").read_text())
    assert summary["status"] == "failed" and "step" in summary["failure"]


def test_the_run_folder_holds_what_is_promised(alone: Path) -> None:
    meta, summary = (json.loads((alone / f).read_text()) for f in ("meta.json", "summary.json"))
    trace = read_trace(alone)
    assert meta["schema"] == 2 and meta["role"] == "ocean"
    block = {"name": "embedding.weight", "shape": [512, 32], "dtype": "torch.float32", "unit": "1"}
    assert any(block.items() <= own.items() for own in meta["layout"])
    assert summary["run_id"] == meta["run_id"] and summary["changes"]["kernel.width"] == 32
    assert {len(v) for v in trace.values()} == {STEPS + 1} and list(trace["step"]) == list(range(STEPS + 1))
    assert summary["status"] == "done" and summary["tokens"] == STEPS * 8 * 64
    assert summary["best_loss_nats"] == trace["loss_nats"].min()
    assert summary["best_dev_bits_per_byte"] > 0


def test_replaying_the_trace_reproduces_it(corpus: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """loss[t] = L(theta[t]) on batch t, from the saved theta of a model that is small enough to be traced."""
    from constellation.data.batches import Batches
    from constellation.data.cache import open_cache
    from constellation.kernel.model import KernelLM

    small = {"kernel__width": 4, "kernel__heads": 1, "kernel__layers": 1, "kernel__hidden": 8}
    list(fit(job(corpus, tmp_path / "ocean", 5, **small)))
    trace = read_trace(tmp_path / "ocean")
    settings = config(**small)
    model = KernelLM(settings.kernel)
    batches = Batches(open_cache(corpus[0]), None, 64, 8, 0)
    assert trace["theta"].shape == (6, model.num_parameters())
    for t, theta in enumerate(trace["theta"]):
        torch.nn.utils.vector_to_parameters(torch.from_numpy(theta), model.parameters())
        x, y = (torch.from_numpy(a) for a in batches.at(t))
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        assert abs(float(loss.detach()) - trace["loss_nats"][t]) < 1e-5


def test_learning_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [learning_rate(i, 100, 2.0, 0.1, 0.5) for i in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0 and rates[50] == 2.0
    assert rates[75] == pytest.approx(1.0) and rates[100] == 0.0
    assert {learning_rate(i, 10, 1.0, 0.0, 0.0) for i in range(10)} == {1.0}


def test_the_token_budget_is_that_of_the_whole_constellation() -> None:
    c = override(tiny(), {"train.tokens": 1_000_000, "train.ocean_share": 0.5})
    ocean = steps_for(c, "ocean") * c.train.batch * c.kernel.context
    kernels = 8 * steps_for(c, "heart") * c.train.kernel_batch * c.kernel.context
    assert ocean + kernels == pytest.approx(1_000_000, rel=0.02)


def test_a_kill_between_the_last_checkpoint_and_the_summary_is_made_good(
    corpus: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    list(fit(job(corpus, tmp_path / "ocean", 4)))
    kept = read_trace(tmp_path / "ocean")
    for name in ("summary.json", "trace.npz"):
        (tmp_path / "ocean" / name).unlink()
    assert list(fit(job(corpus, tmp_path / "ocean", 4))) == []
    assert json.loads((tmp_path / "ocean" / "summary.json").read_text())["status"] == "done"
    assert np.array_equal(read_trace(tmp_path / "ocean")["loss_nats"], kept["loss_nats"])


def test_a_damaged_checkpoint_is_told_in_a_line_and_the_older_one_ends_in_the_same_bits(
    corpus: tuple[Path, Path, Path], alone: Path, tmp_path: Path
) -> None:
    steps = fit(job(corpus, tmp_path / "ocean"))
    for step in steps:
        if step.step == 21:
            break
    steps.close()
    state = tmp_path / "ocean" / "checkpoints" / "step-00000021" / "state.json"
    text = state.read_text()
    assert text.count('"lr": ') >= 1
    state.write_text(text.replace('"lr": ', '"lr": 1', 1))
    said: list[str] = []
    done = [step.step for step in fit(job(corpus, tmp_path / "ocean"), say=said.append)]
    assert done == list(range(15, STEPS + 1)) and len(said) == 1 and "trying the next older one" in said[0]
    assert weights(tmp_path / "ocean") == weights(alone)


def test_the_token_ranges_of_a_role_are_under_a_checksum(corpus: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A single bit of <role>.npy gave other weights without a word."""
    from constellation.artifacts import segments
    from constellation.errors import ArtifactError

    own = np.array([[0, 300], [500, 900]])
    segments.write(tmp_path, {"heart": own, "meta": own[:0]})
    assert np.array_equal(segments.read(tmp_path / "heart.npy"), own) and len(segments.read(tmp_path / "meta.npy")) == 0
    job_of_heart = dataclasses.replace(job(corpus, tmp_path / "heart", 2), segments=tmp_path / "heart.npy")
    whole = (tmp_path / "heart.npy").read_bytes()
    for bit in (0, 70 * 8, len(whole) * 8 - 64 * 2, len(whole) * 8 - 64 * 4 + 3):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "heart.npy").write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"heart\.npy is missing or damaged"):
            next(fit(job_of_heart))
    (tmp_path / "heart.npy").write_bytes(whole)
    (tmp_path / "segments.json").write_text('{"heart": 700, "meta": 0}')  # as it was before there were checksums
    assert len(list(fit(job_of_heart))) == 2
    (tmp_path / "segments.json").write_text('{"heart": 701}')
    for name in ("heart", "meta"):
        with pytest.raises(ArtifactError, match="missing or damaged"):
            segments.read(tmp_path / f"{name}.npy")
