"""A folder of a LlamaForCausalLM, pretrained elsewhere, as a kernel: the way back of export.py.

Shared keys and values (num_key_value_heads), an untied head and any rms_norm_eps are read; what a kernel has no place
for is refused by its name: biases, rotary scaling, heads of a width of their own, another activation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from constellation.config import Kernel
from constellation.errors import ArtifactError, ConfigError
from constellation.kernel.export import BLOCK_NAMES, ENDS
from constellation.kernel.model import KernelLM

NEEDED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip


def load_llama(folder: Path) -> KernelLM:
    """The kernel, float32, on the CPU, in evaluation mode; ConfigError for a model that is none of ours, ArtifactError
    for files that are damaged or missing."""
    said = _read(folder / "config.json")
    model = KernelLM(kernel_config(said), seed=None)
    weights = _weights(folder)
    ours = model.state_dict()
    for name, parts in _places(model.config).items():
        if missing := [part for part in parts if part not in weights]:
            raise ArtifactError(f"{folder}: no weight is called {missing[0]!r}")
        whole = torch.cat([weights.pop(part).float() for part in parts])
        if whole.shape != ours[name].shape:
            raise ArtifactError(f"{folder}: {parts[0]} is of shape {tuple(whole.shape)}, not {tuple(ours[name].shape)}")
        ours[name] = whole
    weights = {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.config.tied:
        weights.pop("lm_head.weight", None)
    if weights:
        raise ConfigError(f"{folder} is no kernel: it has {next(iter(weights))}, for which a kernel has no place")
    model.load_state_dict(ours)
    return model.eval()


def kernel_config(said: Mapping[str, Any]) -> Kernel:
    """The kernel that a config.json of transformers describes; ConfigError naming what a kernel has no place for."""
    if missing := [name for name in NEEDED if name not in said]:
        raise ConfigError(f"config.json: {missing[0]} is missing")
    heads = said["num_attention_heads"]
    groups = said.get("num_key_value_heads") or heads
    rope = {**(said.get("rope_scaling") or {}), **(said.get("rope_parameters") or {})}
    reasons = {
        "model_type": said.get("model_type") == "llama",
        "hidden_act": said.get("hidden_act", "silu") == "silu",
        "attention_bias": not said.get("attention_bias"),
        "mlp_bias": not said.get("mlp_bias"),
        "head_dim": (said.get("head_dim") or said["hidden_size"] // heads) * heads == said["hidden_size"],
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) == "default",
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) == 1.0,
        "pretraining_tp": said.get("pretraining_tp", 1) == 1,
    }
    if odd := [name for name, fits in reasons.items() if not fits]:
        found = rope if odd[0].startswith(("rope", "partial")) else said.get(odd[0])
        raise ConfigError(f"config.json: {odd[0]}={found!r} is nothing that a kernel can compute")
    kernel = Kernel(
        vocab_size=said["vocab_size"], width=said["hidden_size"], layers=said["num_hidden_layers"], heads=heads,
        kv_heads=groups if groups < heads else 0, hidden=said["intermediate_size"],
        context=said["max_position_embeddings"], metric="dot", coupling="off", look_back=0,
        rope_base=float(rope.get("rope_theta", said.get("rope_theta", 10_000.0))), norm_eps=said["rms_norm_eps"],
        tied=bool(said.get("tie_word_embeddings", False)),
    )  # fmt: skip
    kernel.check()
    return kernel


def _places(config: Kernel) -> dict[str, list[str]]:
    """Our weight -> theirs, which stand below one another in it."""
    found = {ours: [theirs] for ours, theirs in ENDS.items() if not (config.tied and ours == "head.weight")}
    for i in range(config.layers):
        for ours, theirs in BLOCK_NAMES.items():
            found[f"blocks.{i}.{ours}"] = [f"model.layers.{i}.{name}" for name in theirs]
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_read(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    found: dict[str, Tensor] = {}
    for name in names:
        try:
            found |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{folder / name}: {error}") from None
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: {error}") from None
    return found
