"""A folder of a LlamaForCausalLM, pretrained elsewhere, as a kernel: the way back of export.py (llama_folder.py)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from constellation.config import Kernel
from constellation.kernel.llama_folder import check_weights, embedding_name, places, read_config, stored, stored_in
from constellation.kernel.model import KernelLM


def load_llama(folder: Path, config: Kernel | None = None) -> KernelLM:
    """The kernel, float32, on the CPU, in evaluation mode; ConfigError for a model that is none of ours, ArtifactError
    for files that are damaged or missing. `config` is the folder's with another context, or with a basin head."""
    theirs = read_config(folder)
    files = check_weights(folder, theirs)
    model = KernelLM(config or theirs, seed=0 if config else None)
    weights = _read(files)
    ours = model.state_dict()
    for name, parts in places(theirs).items():
        ours[name] = torch.cat([weights.pop(part).float() for part in parts])
    model.load_state_dict(ours)
    return model.eval()


def load_embedding(path: Path) -> Tensor:
    """E (V, P), float32, of a folder or of one safetensors file; ArtifactError where there is none."""
    found = stored(path) if path.is_dir() else {name: (path, shape) for name, shape in stored_in(path).items()}
    name = embedding_name(path, {name: shape for name, (_, shape) in found.items()})
    return _read({name: found[name][0]})[name].float()


def projected(embedding_VP: Tensor, width: int) -> Tensor:
    """The rows in `width` = D channels, (V, D), as long as a kernel's own at the start: mean square 1 / D.

    With E - mean = U S A^T the first D columns of (E - mean) A: the closest of that rank. For D >= P inner products are
    those of E - mean and the channels beyond P are 0.
    """
    centred = embedding_VP.double() - embedding_VP.double().mean(0)
    axes_PP = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(-1)
    axes_PP = axes_PP * axes_PP.sum(0).sign().where(axes_PP.sum(0) != 0, torch.ones(()).double())
    rows_VD = torch.zeros(len(centred), width, dtype=torch.float64)
    kept = min(width, centred.shape[1])
    rows_VD[:, :kept] = centred @ axes_PP[:, :kept]
    return (rows_VD / (rows_VD.square().mean() * width).sqrt()).float()


def _read(files: dict[str, Path]) -> dict[str, Tensor]:
    by_file = defaultdict(list)
    for name, file in files.items():
        by_file[file].append(name)
    found: dict[str, Tensor] = {}
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as weights:
            found |= {name: weights.get_tensor(name) for name in names}
    return found
