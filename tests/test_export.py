"""A plain kernel, written as a Llama and read by transformers, is the same function; any other is refused."""

import dataclasses

import pytest
import torch

from constellation.cli import run as cli
from constellation.config import Kernel
from constellation.coordizer.tokenizer import Tokenizer
from constellation.decoding.decode import generate
from constellation.decoding.sample import Sampling
from constellation.errors import ConfigError
from constellation.experiments.bench_decode import load_transformers
from constellation.kernel.export import export_llama, llama_weights
from constellation.kernel.model import KernelLM

transformers = load_transformers()

PLAIN = Kernel(vocab_size=336, width=48, layers=3, heads=4, hidden=100, context=64, metric="dot", coupling="off",
               look_back=0, rope_base=5000.0)  # fmt: skip
TEXTS = [f"the quick brown fox {i} jumps over the lazy dog, naïve café {i}: x = {i} + 1\n" for i in range(40)]


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
    Tokenizer.train(TEXTS, 320).save(path / "ours.json")
    export_llama(plain(), path / "llama", 0, "<|eos|>", path / "ours.json")
    return path


def test_transformers_computes_the_same_logits(folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    assert type(theirs) is transformers.LlamaForCausalLM
    tokens = torch.randint(336, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (theirs(tokens).logits - plain()(tokens)).abs().max() < 1e-5


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


@pytest.mark.parametrize("changes", [{"metric": "fidelity"}, {"look_back": 1}, {"coupling": "fixed"}])
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
