"""A plain kernel as a folder that transformers, vLLM and CTranslate2 load: LlamaForCausalLM.

With metric "dot", no look-back and no coupling the kernel is that architecture, weight by weight:

    model.embed_tokens <- embedding (tied head)      self_attn.{q,k,v}_proj <- attention.qkv, split
    input_layernorm <- norm_attention                self_attn.o_proj <- attention.out
    post_attention_layernorm <- norm_mlp             mlp.{gate,up}_proj <- mlp.gate_up, split; down_proj <- mlp.out
    model.norm <- norm

Rotary positions turn the same pairs (i, i + K/2) in both, so nothing is permuted. A QFI kernel compares unit vectors,
which no Llama does: it is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from constellation.config import Kernel
from constellation.errors import ConfigError
from constellation.kernel.model import _EPS, KernelLM


def refuse_unless_plain(config: Kernel) -> None:
    """ConfigError naming what of the kernel a Llama has no place for."""
    reasons = []
    if config.metric != "dot":
        reasons.append(f"metric={config.metric!r} (attention between unit vectors)")
    if config.look_back:
        reasons.append(f"look_back={config.look_back} (the embedding of the token before)")
    if config.coupling != "off":
        reasons.append(f"coupling={config.coupling!r} (a temperature that runs with the visible keys)")
    if reasons:
        raise ConfigError(
            f"this kernel is no Llama: {', '.join(reasons)}; only a kernel trained with kernel.metric=dot "
            "kernel.look_back=0 kernel.coupling=off can be exported as one"
        )


def llama_config(config: Kernel, eos: int) -> dict[str, object]:
    """config.json of transformers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": config.width // config.heads,
        "max_position_embeddings": config.context,
        "rms_norm_eps": _EPS,
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": eos,  # a document follows the end of another one
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }


def llama_weights(model: KernelLM) -> dict[str, Tensor]:
    """The weights by the names of transformers."""
    refuse_unless_plain(model.config)
    ours, found = model.state_dict(), {}
    found["model.embed_tokens.weight"] = ours["embedding.weight"]
    found["model.norm.weight"] = ours["norm.weight"]
    for i in range(model.config.layers):
        mine, theirs = f"blocks.{i}.", f"model.layers.{i}."
        found[theirs + "input_layernorm.weight"] = ours[mine + "norm_attention.weight"]
        found[theirs + "post_attention_layernorm.weight"] = ours[mine + "norm_mlp.weight"]
        for name, part in zip("qkv", ours[mine + "attention.qkv.weight"].chunk(3), strict=True):
            found[theirs + f"self_attn.{name}_proj.weight"] = part
        found[theirs + "self_attn.o_proj.weight"] = ours[mine + "attention.out.weight"]
        for name, part in zip(("gate", "up"), ours[mine + "mlp.gate_up.weight"].chunk(2), strict=True):
            found[theirs + f"mlp.{name}_proj.weight"] = part
        found[theirs + "mlp.down_proj.weight"] = ours[mine + "mlp.out.weight"]
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
