"""Checkpoints are whole or absent, checked when read, pruned by rule."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from constellation import optim
from constellation.config import Config, override
from constellation.errors import ArtifactError
from constellation.kernel.loss import linear_cross_entropy
from constellation.kernel.model import KernelLM
from constellation.presets import tiny
from constellation.storage.atomic import SEAL
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


def trained(name: str = "diagonal_ng", **settings: float) -> tuple[KernelLM, torch.optim.Optimizer]:
    model = KernelLM(CONFIG.kernel, seed=1)
    optimizer = optim.build(
        override(CONFIG, {"optim.name": name, **{f"optim.{key}": own for key, own in settings.items()}}).optim, model
    )
    for i in range(3):
        step(model, optimizer, i)
    return model, optimizer


@pytest.mark.parametrize(
    ("name", "settings"), [("kronecker_ng", {}), ("diagonal_ng", {}), ("diagonal_ng", {"power": 1.0}), ("adamw", {})]
)
def test_a_restored_model_goes_on_with_the_same_bits(tmp_path: Path, name: str, settings: dict[str, float]) -> None:
    model, optimizer = trained(name, **settings)
    save(tmp_path, 3, model, optimizer)
    for i in range(3, 6):
        step(model, optimizer, i)
    other, its = trained(name, **settings)
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


@pytest.mark.parametrize("name", ["kronecker_ng", "diagonal_ng", "adamw"])
def test_a_snapshot_may_be_restored_again_and_again(name: str) -> None:
    model, optimizer = trained(name)
    torch.manual_seed(5)
    held = checkpoint.Snapshot.of(model, optimizer)
    ends = []
    for _ in range(3):
        for i in range(3, 6):
            step(model, optimizer, i)
        ends.append([p.detach().clone() for p in model.parameters()] + [torch.rand(3)])
        held.restore(model, optimizer)
    for again in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], again, strict=True))


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


def edited(checkpoint_folder: Path, change: Callable[[dict[str, Any]], Any], sealed: bool = True) -> Path:
    """The checkpoint with another state.json; `sealed`: its checksum is left as it was, else there is none."""
    file = checkpoint_folder / "state.json"
    state = json.loads(file.read_text())
    if not sealed:
        del state[SEAL]
    change(state)
    file.write_text(json.dumps(state))
    return checkpoint_folder


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "momentum": lambda s: s["optimizer"]["groups"][0].__setitem__("momentum", 0.5),
    "rate": lambda s: s["optimizer"]["groups"][0].__setitem__("lr", s["optimizer"]["groups"][0]["lr"] * (1 + 1e-15)),
    "step": lambda s: s.__setitem__("step", 1),
    "tokens": lambda s: s.__setitem__("tokens", 7),
    "generator": lambda s: s.__setitem__("rng", "A" + s["rng"][1:] if s["rng"][0] != "A" else "B" + s["rng"][1:]),
    "checksum": lambda s: s.__setitem__("sha256", {}),
    "bits": lambda s: s.__setitem__("dev_bits_per_byte", 0.1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_number_is_named_and_the_older_one_used(tmp_path: Path, change: Callable[..., Any]) -> None:
    model, optimizer = trained("kronecker_ng")
    save(tmp_path, 1, model, optimizer)
    edited(save(tmp_path, 2, model, optimizer), change)
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found.step == 1
    assert len(said) == 1 and "state.json is damaged" in said[0] and "\n" not in said[0]


TYPES: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{
        name: lambda s, name=name: s.__setitem__(name, 3.5) for name in ("step", "kernel", "optimizer", "rng", "sha256")
    },
    "no step": lambda s: s.pop("step"),
    "another step": lambda s: s.__setitem__("step", 1),
    "groups": lambda s: s["optimizer"].__setitem__("groups", "all"),
    "no groups": lambda s: s["optimizer"].pop("groups"),
    "fewer groups": lambda s: s["optimizer"]["groups"].pop(),
    "scalars": lambda s: s["optimizer"].__setitem__("scalars", {"x": 3}),
    "no base64": lambda s: s.__setitem__("rng", "!"),
    "short generator": lambda s: s.__setitem__("rng", "AAAA"),
    "a file elsewhere": lambda s: s["sha256"].__setitem__("../state.json", "0"),
}


@pytest.mark.parametrize("change", TYPES.values(), ids=TYPES)
def test_wrong_types_end_in_the_older_checkpoint_not_in_a_traceback(tmp_path: Path, change: Callable[..., Any]) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    edited(save(tmp_path, 2, model, optimizer), change, sealed=False)
    said: list[str] = []

    def restored(found: checkpoint.Checkpoint) -> int:
        found.restore(model, optimizer)
        return found.step

    assert checkpoint.use_newest(tmp_path, restored, said.append) == 1
    assert len(said) == 1 and "\n" not in said[0]


@pytest.mark.parametrize("change", [{"width": 64}, {"width": "wide"}, {"girth": 3}], ids=str)
def test_a_model_that_does_not_fit_gives_way_to_the_older_one(tmp_path: Path, change: dict[str, Any]) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    edited(save(tmp_path, 2, model, optimizer), lambda state: state["kernel"].update(change), sealed=False)
    with pytest.warns(UserWarning, match="does not fit its own configuration"):
        loaded = checkpoint.load_model(tmp_path)
    assert loaded.num_parameters() == model.num_parameters()


def test_a_checkpoint_without_a_seal_still_opens(tmp_path: Path) -> None:
    """As they were written before there were seals."""
    model, optimizer = trained()
    path = edited(save(tmp_path, 1, model, optimizer), lambda s: None, sealed=False)
    assert checkpoint.open_checkpoint(path).step == 1


def test_a_damaged_old_checkpoint_does_not_end_the_training(tmp_path: Path) -> None:
    model, optimizer = trained()
    for at in (1, 2):
        save(tmp_path, at, model, optimizer, 2.0)
    edited(checkpoint.folder_of(tmp_path, 1), lambda s: s.__setitem__("dev_bits_per_byte", 0.1))
    for at in (3, 4):
        save(tmp_path, at, model, optimizer, 3.0)
    assert checkpoint.steps_on_disk(tmp_path) == [2, 3, 4], "the best of those that are whole is kept"


def test_only_what_a_writer_left_is_swept_away(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = save(tmp_path / "run", 1, model, optimizer).parent
    for name in (".step-00000002.0123456789ab", ".gone-00000001", "step-00000003", "notes", ".git"):
        (folder / name).mkdir()
        (folder / name / "x").write_text("x")
    checkpoint.sweep(tmp_path / "run")
    assert {path.name for path in folder.iterdir()} == {"step-00000001", "notes", ".git"}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "checkpoints").symlink_to(folder)
    (folder / "step-00000003").mkdir()
    checkpoint.sweep(tmp_path / "theirs")
    assert (folder / "step-00000003").exists(), "a link may lead anywhere"
