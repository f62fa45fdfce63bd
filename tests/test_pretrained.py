"""A constellation from a pretrained Llama that transformers wrote: the same function, lossless, and back again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Engine

import constellation
from constellation.cli import run as cli
from constellation.coordizer.tokenizer import Tokenizer
from constellation.errors import ArtifactError, ConfigError, DataError
from constellation.experiments.bench_decode import load_transformers
from constellation.kernel.llama import load_llama, projected
from constellation.kernel.model import KernelLM
from constellation.train.checkpoint import load_model

transformers = load_transformers()

TEXTS = [f"the quick brown fox {i} jumps over the lazy dog, naïve café {i}: x = {i} + 1\n" for i in range(60)]
LLAMA = {
    "vocab_size": 420, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip
KINDS = {
    "grouped, untied": {},
    "a key a head, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "one key": {"num_key_value_heads": 1},
    "rope base": {"rope_theta": 500_000.0},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    "rope llama3": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 48,
    }},
}  # fmt: skip
SETTINGS = {
    "constellation.kernels": 2, "kernel.context": 48, "train.tokens": 12_000, "train.batch": 8,
    "train.kernel_batch": 8, "train.sample_bytes": 0, "train.eval_bytes": 1024, "train.checkpoint_every": 4,
    "train.precision": "fp32", "optim.ns_precision": "fp32", "optim.lr": 1e-3, "router.dims": 8, "router.bins": 256,
    "router.max_prefix": 256,
}  # fmt: skip


def byte_level() -> Engine:
    """As SmolLM's: bytes, a text begun by a special token, specials that a text may name."""
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    engine.decoder = decoders.ByteLevel()
    engine.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    engine.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return engine


def sentencepiece() -> Engine:
    """As TinyLlama's: spaces as ▁ and one before the first word, bytes as <0x00> .. <0xFF> where there is no token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "th"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("q", "u")]
    pieces += ["the", "▁the", "qu"]
    engine = Engine(models.BPE(
        vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True,
    ))  # fmt: skip
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    engine.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return engine


def written(folder: Path, engine: Engine | None = None, shard: str = "30KB", **changes) -> Path:
    """A folder as save_pretrained leaves it."""
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes}))
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=engine or byte_level(), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return folder


def theirs(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text")
    for i, text in enumerate(TEXTS):
        (path / f"{i}.txt").write_text(text * 3)
    return path


def trained(corpus: Path, run: Path, changes=None, **how) -> Path:
    for _ in constellation.train(corpus, run, "tiny", {**SETTINGS, **(changes or {})}, local=True, **how):
        pass
    return run


@pytest.fixture(scope="module")
def begun(folder, corpus, tmp_path_factory) -> Path:
    return trained(corpus, tmp_path_factory.mktemp("runs") / "run", pretrained=folder)


# -- the model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", ["20KB", "1GB"], ids=["sharded", "single"])
def test_logits_are_those_of_transformers(kind, shard, tmp_path):
    path = written(tmp_path / "model", shard=shard, **KINDS[kind])
    assert (path / "model.safetensors.index.json").exists() == (shard == "20KB")
    tokens = torch.randint(420, (2, 96), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert (load_llama(path)(tokens) - theirs(path)(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["rope linear", "rope llama3"])
def test_slowed_rotary_positions_go_back_to_transformers(kind, tmp_path):
    from constellation.kernel.export import export_llama

    ours = load_llama(written(tmp_path / "model", **KINDS[kind]))
    export_llama(ours, tmp_path / "back", 0, "<|endoftext|>")
    tokens = torch.arange(96)[None]
    with torch.no_grad():
        assert (theirs(tmp_path / "back")(tokens).logits - ours(tokens)).abs().max() < 1e-4
    assert load_llama(tmp_path / "back").config == ours.config


# -- the tokenizer


def of(engine: Engine, eos: int) -> Tokenizer:
    return Tokenizer.pretrained(engine.to_str(), eos)


@pytest.fixture(scope="module", params=[byte_level, sentencepiece])
def tokenizer(request) -> Tokenizer:
    return of(request.param(), 0 if request.param is byte_level else 2)


@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=40).map(lambda t: t.encode("utf-8", "surrogatepass"))))
@settings(max_examples=100, deadline=None)
def test_any_bytes_come_back(tokenizer, data):
    for one in (data, b" " + data, data + b" the quick \xe2\x96\x81 </s><|im_start|>"):
        ids = tokenizer.encode(one)
        assert tokenizer.decode(ids) == one and tokenizer.eos not in ids


def test_ids_are_those_of_transformers(folder):
    reader, ours = transformers.AutoTokenizer.from_pretrained(folder), of(byte_level(), 0)
    for text in (*(" " + t for t in TEXTS[:4]), " naïve  café\n\n 12"):  # theirs puts a space before the first word
        assert ours.encode(text) == reader.encode(text, add_special_tokens=False)
        assert ours.encode_batch([text, text]) == [ours.encode(text)] * 2


def test_a_sentencepiece_text_has_no_space_before_its_first_word():
    engine, ours = sentencepiece(), of(sentencepiece(), 2)
    assert ours.encode(" the quick") == engine.encode("the quick", add_special_tokens=False).ids
    assert ours.token_bytes[ours.encode("the")[0]] == b"the"


def test_a_tokenizer_is_saved_loaded_pickled_and_its_damage_is_told(tmp_path):
    import pickle

    file, text = tmp_path / "tokenizer.json", "the quick ▁ naïve\xff"
    for make, end in ((byte_level, 0), (sentencepiece, 2)):
        one = of(make(), end)
        one.save(file)
        for again in (Tokenizer.load(file), pickle.loads(pickle.dumps(one))):
            assert (again.hash, again.eos, again.encode(text)) == (one.hash, end, one.encode(text))
        Engine.from_file(str(file))  # transformers' own library reads it
    said = json.loads(file.read_text())
    said["model"]["merges"] = said["model"]["merges"][:-1]
    file.write_text(json.dumps(said))
    with pytest.raises(ArtifactError, match="checksum"):
        Tokenizer.load(file)


def test_a_token_of_texts_ends_no_text():
    with pytest.raises(ConfigError, match="ends a text and stands in texts"):
        of(byte_level(), 2)


def test_what_a_tokenizer_would_lose_is_told():
    engine = Engine(models.BPE(vocab={"a": 0, "b": 1, "<end>": 2}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.add_special_tokens([AddedToken("<end>", special=True)])
    one = of(engine, 2)
    assert one.encode("ab") == [0, 1]
    for text in ("abc", b"a\xff"):
        with pytest.raises(DataError, match="pretrained tokenizer"):
            one.encode(text)
    with pytest.raises(DataError, match="loses a part of b'abc'"):
        one.encode_batch(["ab", "abc"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: setattr(e, "normalizer", normalizers.NFC()), "NFC"),
        (lambda e: setattr(e, "model", models.WordPiece({"a": 0}, unk_token="a")), "WordPiece"),
    ],
)
def test_a_tokenizer_that_changes_text_is_refused_by_name(change, said):
    engine = byte_level()
    change(engine)
    with pytest.raises(ConfigError, match=said):
        of(engine, 0)


# -- a run


def test_ocean_is_the_pretrained_model_bit_for_bit(folder, begun):
    ocean, pretrained = load_model(begun / "ocean"), load_llama(folder)
    assert all(torch.equal(w, pretrained.state_dict()[name]) for name, w in ocean.state_dict().items())
    assert ocean.config.context == 48
    said = json.loads((begun / "ocean" / "summary.json").read_text())
    assert said["status"] == "done" and said["steps"] == 0 and said["best_dev_bits_per_byte"] > 0


def test_kernels_learn_route_answer_and_go_back_to_transformers(folder, begun, tmp_path, capsys):
    with constellation.open(begun, local=True) as run:
        assert run.generate("the quick", max_new_tokens=8, seed=1).token_ids
        bits = {mode: run.bits_per_byte(TEXTS[:3], mode=mode) for mode in ("route", "ocean")}
    assert bits["route"] < bits["ocean"]
    assert cli(["export", "--run", str(begun), "--kernel", "heart", "--out", str(tmp_path / "hf")]) == 0
    ours, tokens = constellation.load_kernel(begun, "heart"), torch.arange(48)[None]
    with torch.no_grad():
        assert (theirs(tmp_path / "hf")(tokens).logits - ours(tokens)).abs().max() < 1e-4
        assert (theirs(folder)(tokens).logits - ours(tokens)).abs().max() > 1e-2
    mine, first = (transformers.AutoTokenizer.from_pretrained(p) for p in (tmp_path / "hf", folder))
    assert mine.encode(TEXTS[0]) == first.encode(TEXTS[0]) and mine.eos_token == "<|endoftext|>"


def test_with_a_share_ocean_is_trained_on(folder, corpus, tmp_path):
    run = trained(corpus, tmp_path / "run", {"train.ocean_share": 0.5}, pretrained=folder)
    ocean, pretrained = load_model(run / "ocean"), load_llama(folder)
    assert not torch.equal(ocean.embedding.weight, pretrained.embedding.weight)
    losses = [json.loads(line)["loss_nats"] for line in (run / "ocean" / "diag_steps.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] < 8


KILLED = """
import os, signal, sys
import constellation
for at, step in enumerate(constellation.train(sys.argv[1], sys.argv[2], "tiny", eval(sys.argv[4]), local=True,
                                              pretrained=sys.argv[3])):
    if at == int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_goes_on_to_the_same_bits_without_the_folder(folder, corpus, begun, tmp_path):
    moved = tmp_path / "model"
    run = tmp_path / "run"
    moved.mkdir()
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    words = [sys.executable, "-c", KILLED, str(corpus), str(run), str(moved), repr(SETTINGS)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run([*words, "6"], env=env, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    for file in moved.iterdir():
        file.unlink()
    for _ in constellation.train(None, run, local=True):
        pass
    for role in ("ocean", "heart", "perception"):
        ours, alone = (load_model(r / role).state_dict() for r in (run, begun))
        assert all(torch.equal(weight, alone[name]) for name, weight in ours.items())


# -- embeddings alone


@pytest.mark.parametrize("width", [16, 64])
def test_frozen_embeddings_are_those_of_the_file_in_all_models(folder, corpus, tmp_path, width):
    changes = {"kernel.width": width, "kernel.heads": 2, "kernel.hidden": 40}
    source = written(tmp_path / "one", shard="1GB") / "model.safetensors" if width == 16 else folder
    run = trained(corpus, tmp_path / "run", {**changes, "train.ocean_share": 0.5}, embeddings=source)
    table = projected(theirs(folder).get_input_embeddings().weight.detach(), width)
    models_ = [load_model(run / role) for role in ("ocean", "heart")]
    assert all(torch.equal(model.embedding.weight, table) for model in models_)
    fresh = KernelLM(models_[0].config, seed=0)
    assert not torch.equal(fresh.blocks[0].mlp.out.weight, models_[0].blocks[0].mlp.out.weight)
    assert models_[0].config.metric == "fidelity"


def test_a_projection_keeps_what_its_width_can():
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(8.0))
    whole, half = projected(rows, 12).double(), projected(rows, 3).double()
    centred = (rows - rows.mean(0)).double()
    torch.testing.assert_close(whole @ whole.T, centred @ centred.T / centred.square().sum() * 50, rtol=0, atol=1e-5)
    assert abs(float(whole.square().mean()) * 12 - 1) < 1e-5 and (whole[:, 8:] == 0).all()
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    best = u[:, :3] * s[:3]
    torch.testing.assert_close(half @ half.T, (best @ best.T) / best.square().mean() / 3, rtol=1e-4, atol=1e-4)


# -- bad input


def edited(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def surplus(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, file)


def lacking(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({n: w for n, w in load_file(file).items() if n != "model.norm.weight"}, file)


def pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


MISTAKES = {
    "another architecture": (lambda f: edited(f, model_type="mistral"), [], "model_type='mistral'"),
    "another rope": (lambda f: edited(f, rope_parameters={"rope_type": "yarn", "factor": 2.0}), [], "rope_scaling"),
    "no config": (lambda f: (f / "config.json").unlink(), [], "config.json"),
    "no folder": (lambda f: [one.unlink() for one in f.iterdir()] and f.rmdir(), [], "does not exist"),
    "pickles": (pickled, [], "pytorch_model.bin is a pickle"),
    "missing": (lacking, [], "'model.norm.weight'"),
    "surplus": (surplus, [], "q_proj.bias"),
    "damaged": (cut_short, [], "model.safetensors"),
    "another shape": (lambda f: edited(f, intermediate_size=40), [], "shape"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), [], "tokenizer.json is missing"),
    "another tokenizer": (lambda f: edited(f, vocab_size=380), [], "380"),
    "a damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), [], "not a tokenizer"),
    "no end of a text": (lambda f: edited(f, eos_token_id=5000), [], "5000"),
    "beyond the rotary table": (lambda f: None, ["kernel.context=97"], "rotary table"),
    "another width": (lambda f: None, ["kernel.width=64"], "kernel.width=64"),
    "loops": (lambda f: None, ["kernel.loops=2"], "min_loops"),
    "another kernel": (lambda f: None, ["kernel.metric=fidelity"], "kernel.metric=fidelity"),
    "both": (lambda f: None, ["--embeddings", "x"], "exclude each other"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(name, corpus, tmp_path, capsys):
    mistake, words, said = MISTAKES[name]
    path, run = written(tmp_path / "model", shard="1GB"), tmp_path / "run"
    mistake(path)
    capsys.readouterr()  # transformers' progress
    assert cli(["train", "--from", str(path), "--run", str(run), "--corpus", str(corpus), *words]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    assert not run.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--embeddings", "none"], "does not exist"), (["train.ocean_share=0"], "ocean_share"),
        (["kernel.loops=2"], "min_loops"), (["kernel.width=30", "kernel.heads=4"], "kernel.width"),
        (["kernel.prelude=3"], "kernel.prelude"), (["kernel.kv_heads=3"], "kv_heads"),
    ],
)  # fmt: skip
def test_impossible_shapes_are_told(words, said, corpus, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli(["train", "--run", str(run), "--corpus", str(corpus), *words]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and not run.exists()


def test_embeddings_of_a_file_without_its_tokenizer_are_refused(corpus, tmp_path, capsys):
    save_file({"table": torch.zeros(420, 8)}, tmp_path / "table.safetensors")
    words = ["--embeddings", str(tmp_path / "table.safetensors"), "--corpus", str(corpus)]
    assert cli(["train", "--run", str(tmp_path / "run"), *words]) == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
