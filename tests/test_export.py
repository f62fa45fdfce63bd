"""A plain kernel, written as a Llama and read by transformers, is the same function; any other is refused."""

import dataclasses

import pytest
import torch

from constellation.cli import run as cli
from constellation.config import Kernel
from constellation.coordizer.tokenizer import Tokenizer
from constellation.decoding.decode import generate
from constellation.decoding.sample import Sampling
from constellation.errors import ArtifactError, ConfigError
from constellation.experiments.bench_decode import load_transformers
from constellation.kernel.export import export_llama, llama_weights
from constellation.kernel.llama import load_llama
from constellation.kernel.llama_folder import kernel_config
from constellation.kernel.model import KernelLM
from tests.cases import TEXTS, TOKENIZER

transformers = load_transformers()

PLAIN = Kernel(vocab_size=336, width=48, layers=3, heads=4, hidden=100, context=64, metric="dot", coupling="off",
               look_back=0, rope_base=5000.0)  # fmt: skip


def plain(**changes):
    model = KernelLM(dataclasses.replace(PLAIN, **changes), seed=3)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.2 * torch.randn(weight.shape, generator=random))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    TOKENIZER.save(path / "ours.json")
    export_llama(plain(), path / "llama", 0, "<|eos|>", path / "ours.json")
    return path


def test_transformers_computes_the_same_logits(folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    assert type(theirs) is transformers.LlamaForCausalLM
    tokens = torch.randint(336, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (theirs(tokens).logits - plain()(tokens)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "changes",
    [{"kv_heads": 2}, {"tied": False}, {"kv_heads": 1, "tied": False, "norm_eps": 1e-5}],
    ids=["shared", "untied", "both"],
)
def test_shared_keys_and_an_untied_head_go_to_transformers_and_come_back(changes, tmp_path):
    ours, tokens = plain(**changes), torch.arange(2 * 64).view(2, 64) % 336
    export_llama(ours, tmp_path, 0, "<|eos|>")
    theirs, back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), load_llama(tmp_path)
    with torch.no_grad():
        assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-5
        assert torch.equal(back(tokens), ours(tokens)) and back.config == ours.config


def test_a_llama_that_transformers_made_is_a_kernel(tmp_path):
    """Its own names of the settings, in bfloat16 and in several files."""
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=50_000.0, rms_norm_eps=1e-5,
        initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="50KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours, tokens = load_llama(tmp_path), torch.arange(64)[None]
    assert (ours.config.groups, ours.config.tied, ours.config.rope_base) == (2, False, 50_000.0)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    window = list(range(40, 60))
    (made,) = generate(ours, [window], [Sampling(temperature=0, max_new_tokens=12)])
    naive = theirs.generate(
        torch.tensor([window]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
    )
    assert naive[0, 20:].tolist() == made


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_scaling"), ({"attention_bias": True}, "bias"),
        ({"hidden_act": "gelu"}, "hidden_act"), ({"head_dim": 20}, "head_dim"),
        ({"model_type": "mistral"}, "model_type"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
    ],
)  # fmt: skip
def test_a_llama_that_is_no_kernel_is_refused_by_name(changes, name):
    from constellation.kernel.export import llama_config

    said = {key: value for key, value in {**llama_config(PLAIN, 0), **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=name) as told:
        kernel_config(said)
    assert "\n" not in str(told.value)


def test_weights_that_are_missing_or_too_many_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    export_llama(plain(), tmp_path, 0, "<|eos|>")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}, file)
    with pytest.raises(ConfigError, match=r"q_proj\.bias"):
        load_llama(tmp_path)
    save_file({name: w for name, w in weights.items() if name != "model.norm.weight"}, file)
    with pytest.raises(ArtifactError, match=r"no weight is called 'model\.norm\.weight'"):
        load_llama(tmp_path)
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        load_llama(tmp_path)


def test_transformers_generates_the_same_tokens(folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    window = list(range(40, 60))
    ours = generate(plain(), [window], [Sampling(temperature=0, max_new_tokens=30)])[0]
    out = theirs.generate(torch.tensor([window]), do_sample=False, max_new_tokens=30, eos_token_id=None, pad_token_id=0)
    assert out[0, 20:].tolist() == ours


def test_transformers_reads_the_tokenizer(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "llama")
    ours = Tokenizer.load(folder / "ours.json")
    for text in (TEXTS[3], "naïve  café\n\n 123456", ""):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (theirs.eos_token_id, theirs.model_max_length) == (0, 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "fidelity"},
        {"metric": "geodesic"},
        {"look_back": 1},
        {"coupling": "fixed"},
        {"coupling": "scalable"},
        {"loops": 3},
    ],
)
def test_a_kernel_that_is_no_llama_is_refused_with_the_reason(changes):
    (name,) = changes
    with pytest.raises(ConfigError, match=rf"no Llama.*{name}="):
        llama_weights(plain(**changes))


def test_the_command_refuses_a_qfi_kernel_in_one_line_and_writes_nothing(micro_run, tmp_path, capsys):
    out = tmp_path / "hf"
    assert cli(["export", "--run", str(micro_run), "--kernel", "heart", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("constellation: this kernel is no Llama: metric='fidelity'")
    assert not out.exists()


def test_the_command_exports_a_plain_kernel(micro_run, tmp_path, capsys):
    import shutil

    import numpy as np

    from constellation.train import checkpoint

    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    shutil.rmtree(run / "heart" / "checkpoints")
    model = plain(vocab_size=288)
    checkpoint.save(run / "heart", 3, model, torch.optim.AdamW(model.parameters()), {"step": np.zeros(1)}, tokens=0,
                    dev_bits_per_byte=None, keep_last=1, keep_best=0)  # fmt: skip
    assert cli(["export", "--run", str(run), "--kernel", "heart", "--out", str(tmp_path / "hf")]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-5
