"""A folder of a LlamaForCausalLM, looked at without its weights: which kernel it is, and whether it is whole.

    config.json         -> the settings of a kernel; what a kernel has no place for is refused by its name
    *.safetensors       -> names and shapes, each against the kernel's own; pickles are not read
    `ENDS`, `BLOCK_NAMES`  which of their weights is which of ours, for export.py and llama.py too

Shared keys and values (num_key_value_heads), an untied head, any rms_norm_eps and rope_theta, and rotary scaling of the
kinds linear and llama3 are read; biases, other scalings, heads of a width of their own and other activations are not.
No torch here, so that a wrong folder is told before a run begins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from constellation.config import Kernel
from constellation.errors import ArtifactError, ConfigError

ENDS = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight"}  # fmt: skip
BLOCK_NAMES = {  # ours -> theirs, whose rows stand below one another in it
    "norm_attention.weight": ("input_layernorm.weight",),
    "norm_mlp.weight": ("post_attention_layernorm.weight",),
    "attention.qkv.weight": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "mlp.gate_up.weight": tuple(f"mlp.{name}_proj.weight" for name in ("gate", "up")),
    "mlp.out.weight": ("mlp.down_proj.weight",),
}
NEEDED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3"}  # theirs -> kernel.rope_scaling
Shape = tuple[int, ...]


def read_config(folder: Path) -> Kernel:
    """The kernel that `folder` holds by its config.json."""
    return kernel_config(read_json(folder / "config.json"))


def kernel_config(said: Mapping[str, Any]) -> Kernel:
    """The kernel that a config.json of transformers describes; ConfigError naming what a kernel has no place for."""
    if said.get("model_type") != "llama":
        raise ConfigError(
            f"config.json: model_type={said.get('model_type')!r} is nothing that a kernel can compute: it must be llama"
        )
    if missing := [name for name in NEEDED if name not in said]:
        raise ConfigError(f"config.json: {missing[0]} is missing")
    heads = said["num_attention_heads"]
    groups = said.get("num_key_value_heads") or heads
    rope = {**(said.get("rope_scaling") or {}), **(said.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    reasons = {
        "hidden_act": said.get("hidden_act", "silu") == "silu",
        "attention_bias": not said.get("attention_bias"),
        "mlp_bias": not said.get("mlp_bias"),
        "head_dim": (said.get("head_dim") or said["hidden_size"] // heads) * heads == said["hidden_size"],
        "rope_scaling": kind in SCALINGS,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) == 1.0,
        "pretraining_tp": said.get("pretraining_tp", 1) == 1,
    }
    if odd := [name for name, fits in reasons.items() if not fits]:
        found = rope if odd[0].startswith(("rope", "partial")) else said.get(odd[0])
        raise ConfigError(f"config.json: {odd[0]}={found!r} is nothing that a kernel can compute")
    try:
        kernel = Kernel(
            vocab_size=said["vocab_size"], width=said["hidden_size"], layers=said["num_hidden_layers"], heads=heads,
            kv_heads=groups if groups < heads else 0, hidden=said["intermediate_size"],
            context=said["max_position_embeddings"], metric="dot", coupling="off", look_back=0,
            rope_base=float(rope.get("rope_theta", said.get("rope_theta", 10_000.0))), norm_eps=said["rms_norm_eps"],
            tied=bool(said.get("tie_word_embeddings", False)), **_scaling(SCALINGS[kind], rope),
        )  # fmt: skip
        kernel.check()
    except (TypeError, ZeroDivisionError, KeyError) as error:
        raise ConfigError(f"config.json: {type(error).__name__}: {error}") from None
    return kernel


def _scaling(kind: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "none":
        return {}
    found = {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
    if kind == "llama3":
        found |= {
            "rope_low": float(rope["low_freq_factor"]), "rope_high": float(rope["high_freq_factor"]),
            "rope_original": int(rope["original_max_position_embeddings"]),
        }  # fmt: skip
    return found


def places(config: Kernel) -> dict[str, list[str]]:
    """Our weight -> theirs, which stand below one another in it."""
    found = {ours: [theirs] for ours, theirs in ENDS.items() if not (config.tied and ours == "head.weight")}
    for i in range(config.layers):
        for ours, theirs in BLOCK_NAMES.items():
            found[f"blocks.{i}.{ours}"] = [f"model.layers.{i}.{name}" for name in theirs]
    return found


def shapes(config: Kernel) -> dict[str, Shape]:
    """Their weight -> its shape."""
    d, kv = config.width, config.groups * config.size
    own: dict[str, Shape] = {
        "embed_tokens": (config.vocab_size, d), "lm_head": (config.vocab_size, d),
        "q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d),
        "gate_proj": (config.hidden, d), "up_proj": (config.hidden, d),
        "down_proj": (d, config.hidden),
    }  # fmt: skip
    names = (name for theirs in places(config).values() for name in theirs)
    return {name: own.get(name.split(".")[-2], (d,)) for name in names}


def check_weights(folder: Path, config: Kernel) -> dict[str, Path]:
    """Their weight -> the file that holds it.

    ArtifactError for one that is missing or of another shape, ConfigError for one that a kernel has no place for.
    """
    found = stored(folder)
    wanted = shapes(config)
    for name, shape in wanted.items():
        if name not in found:
            raise ArtifactError(f"{folder}: no weight is called {name!r}, which config.json asks for")
        if found[name][1] != shape:
            raise ArtifactError(f"{folder}: {name} is of shape {found[name][1]}, config.json asks for {shape}")
    for name in found:
        derived = name.endswith("rotary_emb.inv_freq") or (config.tied and name == ENDS["head.weight"])
        if name not in wanted and not derived:
            raise ConfigError(f"{folder} is no kernel: it has {name}, for which a kernel has no place")
    return {name: found[name][0] for name in wanted}


def stored(folder: Path) -> dict[str, tuple[Path, Shape]]:
    """Every weight of the folder's safetensors files: its file and its shape; ArtifactError for damaged or no files."""
    found: dict[str, tuple[Path, Shape]] = {}
    for file in _files(folder):
        found |= {name: (file, shape) for name, shape in stored_in(file).items()}
    return found


def stored_in(file: Path) -> dict[str, Shape]:
    """Names and shapes of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file}: {' '.join(str(error).split())}") from None


def embedding_name(path: Path, shapes: Mapping[str, Shape]) -> str:
    """Which of the stored arrays is the embedding: a Llama's own name, or the only matrix there is."""
    if ENDS["embedding.weight"] in shapes:
        return ENDS["embedding.weight"]
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    if len(matrices) != 1:
        raise ArtifactError(
            f"{path}: {len(matrices)} matrices and none is called {ENDS['embedding.weight']!r}; give a file with one"
        )
    return matrices[0]


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        try:
            return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        except (KeyError, AttributeError, TypeError):
            raise ArtifactError(f"{index}: no weight_map in it") from None
    if not (folder / SINGLE).exists() and (pickles := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))):
        raise ConfigError(
            f"{folder}: {pickles[0].name} is a pickle, which may run anything; save it as safetensors: "
            "model.save_pretrained(FOLDER, safe_serialization=True)"
        )
    return [folder / SINGLE]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of somebody else's; ArtifactError for anything else."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: a JSON object is wanted")
    return found
