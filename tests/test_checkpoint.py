"""Checkpoints are whole or absent, checked when read, pruned by rule."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from constellation import optim
from constellation.config import Config
from constellation.errors import ArtifactError
from constellation.kernel.loss import linear_cross_entropy
from constellation.kernel.model import KernelLM
from constellation.presets import tiny
from constellation.train import checkpoint

CONFIG: Config = tiny()


def step(model: KernelLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randint(CONFIG.kernel.vocab_size, (2, 17), generator=torch.Generator().manual_seed(seed))
    linear_cross_entropy(model.hidden(x[:, :-1]), model.embedding.weight, x[:, 1:], 64).backward()
    optimizer.step()
    optimizer.zero_grad()


def save(run: Path, at: int, model: KernelLM, optimizer: torch.optim.Optimizer, bits: float | None = None) -> Path:
    trace = {"loss_nats": np.arange(at, dtype=float)}
    return checkpoint.save(
        run, at, model, optimizer, trace, tokens=at, dev_bits_per_byte=bits, keep_last=2, keep_best=1
    )


def trained(name: str = "diagonal_ng", power: float = 0.5) -> tuple[KernelLM, torch.optim.Optimizer]:
    import dataclasses

    model = KernelLM(CONFIG.kernel, seed=1)
    optimizer = optim.build(dataclasses.replace(CONFIG.optim, name=name, power=power), model)
    for i in range(3):
        step(model, optimizer, i)
    return model, optimizer


@pytest.mark.parametrize(
    ("name", "power"), [("kronecker_ng", 0.5), ("diagonal_ng", 0.5), ("diagonal_ng", 1.0), ("adamw", 0.5)]
)
def test_a_restored_model_goes_on_with_the_same_bits(tmp_path: Path, name: str, power: float) -> None:
    model, optimizer = trained(name, power)
    save(tmp_path, 3, model, optimizer)
    for i in range(3, 6):
        step(model, optimizer, i)
    other, its = trained(name, power)
    for i in range(50, 53):  # anywhere else
        step(other, its, i)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 3
    found.restore(other, its)
    for i in range(3, 6):
        step(other, its, i)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_generator_comes_back(tmp_path: Path) -> None:
    model, optimizer = trained()
    torch.manual_seed(5)
    save(tmp_path, 1, model, optimizer)
    expected = torch.rand(3)
    torch.manual_seed(6)
    checkpoint.open_checkpoint(checkpoint.folder_of(tmp_path, 1)).restore(model, optimizer)
    assert torch.equal(torch.rand(3), expected)


def test_load_model_equals_the_saved_one(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, 3, model, optimizer)
    loaded = checkpoint.load_model(tmp_path)
    x = torch.arange(20)[None]
    assert torch.equal(model(x), loaded(x)) and not loaded.training


@pytest.mark.parametrize("name", checkpoint.FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(tmp_path: Path, name: str, damage: str) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    file = save(tmp_path, 2, model, optimizer) / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(ArtifactError, match=name):
        checkpoint.open_checkpoint(file.parent)
    with pytest.warns(UserWarning, match=name):
        found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1


def test_nothing_is_taken_when_all_are_damaged(tmp_path: Path) -> None:
    model, optimizer = trained()
    (save(tmp_path, 1, model, optimizer) / "state.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"), pytest.warns(UserWarning):
        checkpoint.newest(tmp_path)


def test_no_checkpoint_is_none_and_a_clear_line_for_a_reader(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    with pytest.raises(ArtifactError, match="train it first"):
        checkpoint.load_model(tmp_path / "heart")


def test_keep_last_and_keep_best(tmp_path: Path) -> None:
    model, optimizer = trained()
    for at, bits in ((1, 3.0), (2, 2.0), (3, None), (4, 2.5), (5, 2.6)):
        save(tmp_path, at, model, optimizer, bits)
    assert checkpoint.steps_on_disk(tmp_path) == [2, 4, 5]


def test_a_torn_writer_leaves_the_last_one(tmp_path: Path) -> None:
    model, optimizer = trained()
    good = save(tmp_path, 1, model, optimizer)
    shutil.copytree(good, good.parent / ".step-00000002.abc123")  # what SIGKILL leaves of a writer
    (good.parent / ".step-00000002.abc123" / "state.json").unlink()
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
