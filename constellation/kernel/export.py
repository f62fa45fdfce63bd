"""A plain kernel as a folder that transformers, vLLM and CTranslate2 load: LlamaForCausalLM.

With metric "dot", no look-back, no coupling and no loop the kernel is that architecture, weight by weight
(llama_folder.py), with shared keys and values and an untied head where it has them. Rotary positions turn the same
pairs (i, i + K/2) in both, so nothing is permuted. A QFI kernel compares unit vectors, which no Llama does: it is
refused. A basin head, which changes no logit, is left out.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from constellation.config import Kernel
from constellation.errors import ConfigError
from constellation.kernel.llama_folder import BLOCK_NAMES, ENDS
from constellation.kernel.model import KernelLM


def refuse_unless_plain(config: Kernel) -> None:
    """ConfigError naming what of the kernel a Llama has no place for."""
    reasons = []
    if config.metric != "dot":
        reasons.append(f"metric={config.metric!r} (attention between unit vectors)")
    if config.look_back:
        reasons.append(f"look_back={config.look_back} (the embedding of the token before)")
    if config.coupling != "off":
        reasons.append(f"coupling={config.coupling!r} (a temperature that runs with the visible keys)")
    if config.loops > 1:
        reasons.append(f"loops={config.loops} (blocks that are applied several times)")
    if reasons:
        raise ConfigError(
            f"this kernel is no Llama: {', '.join(reasons)}; only a kernel trained with kernel.metric=dot "
            "kernel.look_back=0 kernel.coupling=off kernel.loops=1 can be exported as one"
        )


def llama_config(config: Kernel, eos: int) -> dict[str, object]:
    """config.json of transformers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": len(config.order),
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": _rope_scaling(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied,
        "bos_token_id": eos,  # a document follows the end of another one
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }


def _rope_scaling(config: Kernel) -> dict[str, object] | None:
    if config.rope_scaling == "none":
        return None
    found: dict[str, object] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        found |= {
            "low_freq_factor": config.rope_low, "high_freq_factor": config.rope_high,
            "original_max_position_embeddings": config.rope_original,
        }  # fmt: skip
    return found


def llama_weights(model: KernelLM) -> dict[str, Tensor]:
    """The weights by the names of transformers."""
    config, ours, found = model.config, model.state_dict(), dict[str, Tensor]()
    refuse_unless_plain(config)
    for mine, theirs in ENDS.items():
        if mine in ours:
            found[theirs] = ours[mine]
    heights = {3: [config.heads * config.size, *[config.groups * config.size] * 2], 2: [config.hidden] * 2}
    for i in range(config.layers):
        for mine, names in BLOCK_NAMES.items():
            whole = ours[f"blocks.{i}.{mine}"]
            parts = whole.split(heights.get(len(names), [len(whole)]))
            found |= {f"model.layers.{i}.{name}": part for name, part in zip(names, parts, strict=True)}
    return {name: weight.float().cpu().contiguous().clone() for name, weight in found.items()}


def export_llama(model: KernelLM, folder: Path, eos: int, eos_token: str, tokenizer: Path | None = None) -> None:
    """Write model.safetensors, config.json, generation_config.json and, with `tokenizer`, its files into `folder`."""
    weights = llama_weights(model)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", llama_config(model.config, eos))
    _write(folder / "generation_config.json", {"bos_token_id": eos, "eos_token_id": eos, "do_sample": True})
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        _write(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.context,
            "bos_token": eos_token, "eos_token": eos_token, "clean_up_tokenization_spaces": False,
        })  # fmt: skip


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
