"""Checkpoints: weights, optimizer, random numbers, data position and history, whole or absent.

    checkpoints/step-00000120/{model.safetensors, optim.safetensors, trace.npz, state.json}

state.json holds the step, the scalars of the optimizer, the generator state, what the run's parts remember
and the sha256 of each other file, and is sealed itself (atomic.py). The folder is written beside and renamed,
so a killed writer leaves the last one intact. One that is damaged is named, and the next older one is taken.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from constellation.config import Kernel
from constellation.errors import ArtifactError, ConfigError
from constellation.kernel.model import KernelLM
from constellation.optim.natural import may_inherit
from constellation.storage.atomic import read_object, seal, sha256, write_folder

SCHEMA = 1
FILES = ("model.safetensors", "optim.safetensors", "trace.npz")
_TYPES = {"step": int, "kernel": dict, "optimizer": dict, "rng": str, "sha256": dict}  # of state.json
_UNFIT = (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, OSError)
T = TypeVar("T")
Say = Callable[[str], None]


def warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, its checksums verified."""

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def trace(self) -> dict[str, np.ndarray]:
        with np.load(self.path / "trace.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the saved bits into `model`, `optimizer` and the global generator."""
        model.load_state_dict(load_file(self.path / "model.safetensors"))
        if optimizer is not None:
            _load_optimizer(optimizer, load_file(self.path / "optim.safetensors"), self.state["optimizer"])
            torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(self.state["rng"])), dtype=torch.uint8))

    def inherit(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """For a branch: the weights, and what the optimizer remembers if `optimizer` can use it; settings stay its own.

        Where it cannot (optim/natural.py, `may_inherit`), or is None, nothing is remembered.
        """
        if optimizer is None or not may_inherit(optimizer, self.state["optimizer"]["groups"]):
            self.restore(model)
            return
        own = [dict(group) for group in optimizer.param_groups]
        self.restore(model, optimizer)
        for group, mine in zip(optimizer.param_groups, own, strict=True):
            group.update(mine)

    @property
    def parts(self) -> dict[str, Any]:
        """What the run's parts remember (parts.py), by their names; {} for a run without any."""
        return dict(self.state.get("parts", {}))


@dataclass(frozen=True)
class Snapshot:
    """Weights, optimizer state and generator of a moment, in memory; may be restored any number of times."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    rng: Tensor

    @classmethod
    def of(cls, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
        return cls(copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), torch.get_rng_state())

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        model.load_state_dict(self.model)
        if optimizer is not None:
            optimizer.load_state_dict(copy.deepcopy(self.optimizer))
            torch.set_rng_state(self.rng)


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def save(
    run: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    trace: dict[str, np.ndarray],
    *,
    tokens: int,
    dev_bits_per_byte: float | None,
    keep_last: int,
    keep_best: int,
    parts: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint of `step`, then remove those that neither `keep_last` nor `keep_best` holds.

    `parts` is what the run's parts remember; ConfigError where that is not JSON.
    """
    tensors, scalars = _optimizer_state(optimizer)
    remembered = {"parts": _plain(parts)} if parts else {}

    def fill(folder: Path) -> None:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / FILES[0])
        save_file(tensors, folder / FILES[1])
        np.savez(folder / FILES[2], allow_pickle=False, **trace)
        state = {
            "schema": SCHEMA,
            "step": step,
            "tokens": tokens,
            "dev_bits_per_byte": dev_bits_per_byte,
            "kernel": vars(model.config),  # a plain record, whatever the model
            "optimizer": scalars,
            "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "sha256": {name: sha256(folder / name) for name in FILES},
            **remembered,
        }
        (folder / "state.json").write_text(json.dumps(seal(state), indent=1))

    path = folder_of(run, step)
    sweep(run)
    write_folder(path, fill)
    _prune(run, keep_last, keep_best)
    return path


def steps_on_disk(run: Path) -> list[int]:
    """Steps of the checkpoints in `run`, oldest first, without looking inside."""
    names = (re.fullmatch(r"step-(\d{8})", p.name) for p in (run / "checkpoints").glob("step-*"))
    return sorted(int(m[1]) for m in names if m)


def sweep(run: Path) -> None:
    """Remove what a killed writer left in `run`: checkpoints that it was writing, or removing."""
    folder = run / "checkpoints"
    for path in [] if folder.is_symlink() else folder.glob("*"):
        left = re.fullmatch(r"\.step-\d{8}\.[0-9a-f]{12}|\.gone-\d{8}", path.name)
        if left or (re.fullmatch(r"step-\d{8}", path.name) and not (path / "state.json").exists()):
            shutil.rmtree(path, ignore_errors=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in `path`; ArtifactError when anything of it is missing or changed."""
    state = read_object(path / "state.json")
    if state.get("schema") != SCHEMA:
        raise ArtifactError(f"{path}: schema {state.get('schema')!r}, this version reads {SCHEMA}")
    wrong = [name for name, kind in _TYPES.items() if type(state.get(name)) is not kind]
    wrong += [] if isinstance(state.get("parts", {}), dict) else ["parts"]
    if wrong or set(state["sha256"]) != set(FILES) or not {"groups", "scalars"} <= set(state["optimizer"]):
        raise ArtifactError(f"{path / 'state.json'} is damaged: {wrong[0] if wrong else 'sha256 or optimizer'}")
    if path.name != folder_of(path, state["step"]).name:
        raise ArtifactError(f"{path / 'state.json'} is damaged: it is of step {state['step']}")
    for name, wanted in state["sha256"].items():
        file = path / name
        if not file.is_file() or sha256(file) != wanted:
            raise ArtifactError(f"{file} is missing or damaged (checksum differs)")
    return Checkpoint(path, state["step"], state)


def use_newest(run: Path, use: Callable[[Checkpoint], T], say: Say = warn) -> T | None:
    """`use(checkpoint)` of the newest one of `run` that is whole and fits; None when there is none at all.

    One that is damaged is told to `say` and the next older one is taken; when all are damaged, ArtifactError.
    """
    damaged: ArtifactError | None = None
    for step in reversed(steps_on_disk(run)):
        path = folder_of(run, step)
        try:
            return use(open_checkpoint(path))
        except ArtifactError as error:
            why = error
        except _UNFIT as error:
            first = str(error).strip().partition("\n")[0]
            why = ArtifactError(f"{path} does not fit its own configuration ({type(error).__name__}: {first})")
        say(f"{why}; trying the next older one")
        damaged = damaged or why
    if damaged is not None:
        raise ArtifactError(f"{damaged}; no older checkpoint of {run} is whole: delete {run}, then --resume")
    return None


def newest(run: Path, say: Say = warn) -> Checkpoint | None:
    """The newest whole checkpoint of `run`, as `use_newest` finds it."""
    return use_newest(run, lambda checkpoint: checkpoint, say)


def load_model(run: Path, device: str | torch.device = "cpu", say: Say = warn) -> KernelLM:
    """The model of the newest whole checkpoint of `run`, in evaluation mode."""

    def load(checkpoint: Checkpoint) -> KernelLM:
        model = KernelLM(Kernel(**checkpoint.state["kernel"]), seed=None)
        checkpoint.restore(model)
        return model

    model = use_newest(run, load, say)
    if model is None:
        raise ArtifactError(f"{run} holds no checkpoint; train it first: constellation train --run {run.parent}")
    return model.to(device).eval()


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """state_dict() split into tensors, named "parameter.key", and JSON scalars."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.contiguous()
            else:
                scalars.setdefault(str(index), {})[key] = value
    return tensors, {"groups": state["param_groups"], "scalars": scalars}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in scalars["scalars"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": scalars["groups"]})


def _plain(parts: Mapping[str, Any]) -> dict[str, Any]:
    """`parts` as JSON gives it back."""
    found = {}
    for name, state in parts.items():
        try:
            found[name] = json.loads(json.dumps(state))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name}: its state() must be text, numbers, lists and dicts ({error})") from None
    return found


def _prune(run: Path, keep_last: int, keep_best: int) -> None:
    steps = steps_on_disk(run)
    keep = set(steps[-keep_last:])
    if keep_best and len(steps) > len(keep):
        scored = []
        for step in steps:
            with contextlib.suppress(ArtifactError):  # a damaged one is nobody's best
                bits = read_object(folder_of(run, step) / "state.json").get("dev_bits_per_byte")
                if isinstance(bits, float):
                    scored.append((bits, step))
        keep |= {step for _, step in sorted(scored)[:keep_best]}
    for step in set(steps) - keep:  # out of sight first: a kill in between leaves no half checkpoint
        condemned = folder_of(run, step).with_name(f".gone-{step:08d}")
        folder_of(run, step).rename(condemned)
        shutil.rmtree(condemned)
