"""How fast does a kernel decode, beside transformers and CTranslate2 with equal weights, in one run?

    ours fp32, int8        the engine of the service: continuous batch, slots
    transformers           LlamaForCausalLM of our own export, generate(): as it comes, static cache + compile, top-p
    CTranslate2 fp32, int8 the same export, converted

Greedy tokens of a plain kernel are compared first: with transformers' in float32, token for token. Contestants take
turns and a ratio is the median of the ratios of neighbouring repeats. Seconds are the processor's, of one thread, so
other work on the machine changes little. Weights are random, with logits spread so that 256 tokens hold 90 % of the
mass, as they do in a trained model. Memory and start are measured in processes of their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from constellation.config import Kernel
from constellation.decoding.batch import Batch, Writing
from constellation.decoding.sample import Sampling
from constellation.errors import ConfigError, RunError
from constellation.experiments import products
from constellation.experiments.harness import described, finish, machine_line
from constellation.kernel.export import export_llama
from constellation.kernel.model import KernelLM

LARGE = Kernel(vocab_size=32_000, width=384, layers=8, heads=8, hidden=1024, context=256, metric="dot", look_back=0,
               coupling="off")  # fmt: skip
SMALL = dataclasses.replace(LARGE, vocab_size=2048, width=128, layers=5, heads=4, hidden=344)
MODELS = {"26M": LARGE, "1.3M": SMALL}
PROMPT, NEW = 32, 64
SHARPNESS = 5.0  # factor on the logits of a random model
GREEDY, TOP_P = Sampling(temperature=0), Sampling(top_p=0.9)
CTRANSLATE2 = ("ctranslate2 fp32", "ctranslate2 int8")
# (ours, peer): the ratio wanted in every cell, or (model, batch, ours, peer): of that one
TARGETS = {
    ("fp32", "transformers"): 1.5,
    ("fp32", "ctranslate2 fp32"): 1.0,
    ("int8", "ctranslate2 int8"): 1.0,
    ("26M", 1, "fp32", "transformers compiled"): 1.25,
    ("26M", 1, "int8", "transformers"): 3.0,
    ("26M", 16, "int8", "transformers"): 2.4,
    ("26M", 16, "fp32 top-p", "transformers top-p"): 3.5,
    ("1.3M", 1, "fp32", "transformers"): 3.0,
}
ENGINE = (1, 8, 32)  # streams of the preset `small`
COLD_START_S = 2.0


def run(*, out: Path | None = None, repeats: int = 5, compiled: bool = True) -> dict[str, Any]:
    """Measure, print the table, write the raw result to `out`."""
    transformers = load_transformers()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        **described(__doc__), "transformers": transformers.__version__,
        "ctranslate2": _ctranslate2().__version__, "prompt": PROMPT, "new": NEW, "repeats": repeats,
        "models": {name: vars(config) for name, config in MODELS.items()}, "ratios": [], "equal": {},
        "products": products.compare(repeats), "engine": _engine(repeats),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in MODELS.items():
            model, folder = plain(config), Path(scratch) / name
            export_llama(model, folder / "hf", 0, "<|eos|>")
            contestants = _ours(model) | _theirs(folder, transformers, compiled and name == "26M")
            result["equal"][name] = check_equal(model, contestants)
            for batch in (1, 16):
                result["ratios"] += _compare(name, batch, contestants, repeats)
            if name == "26M":
                result["processes"] = _processes(folder / "hf", model, Path(scratch))
    return finish(result, report(result), out)


def _engine(repeats: int) -> dict[int, float]:
    """Tokens a CPU-second of the preset `small`, sampled, the prompt read anew: the median of the repeats."""
    model, found = KernelLM(Kernel(), seed=1).eval(), {}
    for streams in ENGINE:
        decode, asked = _contestant(model, "fp32", Sampling()), prompts(model.config.vocab_size, streams, 0)
        decode(asked)
        seconds = []
        for _ in range(repeats):
            tick = time.process_time()
            decode(asked)
            seconds.append(time.process_time() - tick)
        found[streams] = streams * NEW / statistics.median(seconds)
    return found


def plain(config: Kernel) -> KernelLM:
    """A random kernel, its logits spread like a trained one's."""
    model = KernelLM(config, seed=1)
    with torch.no_grad():
        model.norm.weight.mul_(SHARPNESS)
    return model.eval()


# -- contestants -------------------------------------------------------------------------------------------------------

Contestant = Callable[[list[list[int]]], list[list[int]]]  # prompts of PROMPT tokens -> NEW tokens after each


def _ours(model: KernelLM) -> dict[str, Contestant]:
    return {
        "fp32": _contestant(model, "fp32", GREEDY), "int8": _contestant(model, "int8", GREEDY),
        "fp32 top-p": _contestant(model, "fp32", TOP_P), "int8 top-p": _contestant(model, "int8", TOP_P),
    }  # fmt: skip


def _contestant(model: KernelLM, precision: str, sampling: Sampling) -> Contestant:
    batch = Batch(model, slots=max(ENGINE), precision=precision)

    def decode(prompts: list[list[int]]) -> list[list[int]]:
        batch.forget()
        works = [
            Writing(tokens=list(prompt), sampling=dataclasses.replace(sampling, seed=i), room=NEW, take=_counted())
            for i, prompt in enumerate(prompts)
        ]
        for work in works:
            batch.add(work)
        while not batch.idle:
            batch.step()
        return [work.tokens[PROMPT:] for work in works]

    return decode


def _counted() -> Callable[[int], bool]:
    count = iter(range(1, NEW + 1))
    return lambda token: next(count) == NEW


def _theirs(folder: Path, transformers: Any, compiled: bool) -> dict[str, Contestant]:
    llama = transformers.LlamaForCausalLM.from_pretrained(folder / "hf").eval()

    def generate(**options: Any) -> Contestant:
        def decode(prompts: list[list[int]]) -> list[list[int]]:
            tokens = torch.tensor(prompts)
            with torch.inference_mode():
                found = llama.generate(
                    tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, min_new_tokens=None,
                    eos_token_id=None, pad_token_id=0, **options,
                )  # fmt: skip
            answer: list[list[int]] = found[:, PROMPT:].tolist()
            return answer

        return decode

    found = {
        "transformers": generate(do_sample=False),
        "transformers top-p": generate(do_sample=True, top_p=0.9, top_k=0, temperature=1.0),
    }
    if compiled:
        found["transformers compiled"] = _compiled(llama)
    return found | {f"ctranslate2 {kind}": _translated(folder, kind) for kind in ("fp32", "int8")}


def _compiled(llama: Any) -> Contestant:
    """A static cache and the forward pass compiled: what generate() does on a GPU for cache_implementation="static"."""
    from transformers import StaticCache

    forward = torch.compile(llama.forward)

    @torch.no_grad()
    def decode(prompts: list[list[int]]) -> list[list[int]]:
        cache = StaticCache(config=llama.config, max_cache_len=PROMPT + NEW)
        tokens, found = torch.tensor(prompts), []
        logits = llama(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        for at in range(PROMPT, PROMPT + NEW):
            token = logits[:, -1].argmax(-1, keepdim=True)
            found.append(token)
            if at < PROMPT + NEW - 1:
                place = torch.full((len(prompts), 1), at)
                logits = forward(token, past_key_values=cache, position_ids=place, use_cache=True).logits
        return torch.cat(found, 1).tolist()

    return decode


def _translated(folder: Path, kind: str) -> Contestant:
    ctranslate2 = _ctranslate2()
    target = folder / f"ct2-{kind}"
    names = [f"t{i}" for i in range(json.loads((folder / "hf" / "config.json").read_text())["vocab_size"])]
    _convert(folder / "hf", target, names, "float32" if kind == "fp32" else "int8")
    generator = ctranslate2.Generator(str(target), device="cpu", intra_threads=1, inter_threads=1)

    def decode(prompts: list[list[int]]) -> list[list[int]]:
        found = generator.generate_batch(
            [[names[t] for t in prompt] for prompt in prompts], max_length=NEW, min_length=NEW, sampling_topk=1,
            include_prompt_in_result=False, end_token=[], max_batch_size=len(prompts),
        )  # fmt: skip
        return [list(one.sequences_ids[0]) for one in found]

    return decode


def _convert(source: Path, target: Path, names: list[str], quantization: str) -> None:
    """CTranslate2's own converter of Llama weights; the vocabulary is the ids' names."""
    from ctranslate2.converters import transformers as converters
    from transformers import LlamaForCausalLM

    loader = converters.LlamaLoader()
    model = LlamaForCausalLM.from_pretrained(source)
    spec = loader.get_model_spec(model)
    spec.register_vocabulary(names)
    for name in ("bos_token", "eos_token", "unk_token"):
        setattr(spec.config, name, names[0])
    spec.config.layer_norm_epsilon = model.config.rms_norm_eps
    spec.validate()
    spec.optimize(quantization=quantization)
    target.mkdir()
    spec.save(str(target))


def load_transformers() -> Any:
    """transformers, kept from torchvision: it imports the one it finds, and one made for another torch fails."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "torchvision"}
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # not there, says Python to whoever looks
    try:
        import transformers
        from transformers import LlamaForCausalLM  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"bench decode needs transformers: {error}; pip install transformers") from None
    finally:
        del sys.modules["torchvision"]
        sys.modules.update(hidden)
    transformers.logging.set_verbosity_error()
    return transformers


def _ctranslate2() -> Any:
    try:
        import ctranslate2
    except ImportError as error:
        raise ConfigError(f"bench decode needs ctranslate2: {error}; pip install ctranslate2") from None
    return ctranslate2


# -- measuring ---------------------------------------------------------------------------------------------------------


def prompts(vocabulary: int, batch: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocabulary, (batch, PROMPT), generator=generator).tolist()


def check_equal(model: KernelLM, contestants: dict[str, Contestant]) -> dict[str, float]:
    """Part of the greedy tokens, before the first that differs, that are ours in fp32; RunError unless
    transformers' are all the same, but for one whose two likeliest logits are a rounding apart."""
    asked = prompts(model.config.vocab_size, 16, 0)
    ours = contestants["fp32"](asked)
    found = {}
    for name, contestant in contestants.items():
        if "top-p" in name:
            continue
        theirs = contestant(asked)
        same = [_shared(a, b) for a, b in zip(ours, theirs, strict=True)]
        found[name] = sum(same) / (len(asked) * NEW)
        if name == "transformers":
            for prompt, tokens, n in zip(asked, ours, same, strict=True):
                if n < NEW and _margin(model, prompt + tokens[:n]) > 1e-4:
                    raise RunError(f"bench decode: transformers writes another token at {n}: nothing can be compared")
    return found


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


@torch.no_grad()
def _margin(model: KernelLM, tokens: list[int]) -> float:
    best = model(torch.tensor([tokens]))[0, -1].topk(2).values
    return float(best[0] - best[1])


def _compare(model: str, batch: int, contestants: dict[str, Contestant], repeats: int) -> list[dict[str, Any]]:
    """Every one of ours against every peer that does the same, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 1):
        for name, contestant in contestants.items():
            asked = prompts(MODELS[model].vocab_size, batch, repeat)
            tick = time.process_time()
            contestant(asked)
            if repeat:  # the first one warms up
                seconds[name].append(time.process_time() - tick)
    rows = []
    for ours in [name for name in contestants if name.startswith(("fp32", "int8"))]:
        for peer in [n for n in contestants if n not in seconds or not n.startswith(("fp32", "int8"))]:
            if ("top-p" in ours) != ("top-p" in peer):
                continue
            ratios = [b / a for a, b in zip(seconds[ours], seconds[peer], strict=True)]
            target = TARGETS.get((model, batch, ours, peer)) or TARGETS.get((ours, peer))
            ratio = statistics.median(ratios)
            rows.append({
                "model": model, "batch": batch, "ours": ours, "peer": peer, "ratio": ratio, "low": min(ratios),
                "high": max(ratios), "target": target, "met": None if target is None else ratio >= target,
                "tokens_per_s": batch * NEW / statistics.median(seconds[ours]),
                "peer_tokens_per_s": batch * NEW / statistics.median(seconds[peer]),
            })  # fmt: skip
    return rows


_START = """
import time
{imports}
import torch
torch.set_num_threads(1)
{load}
first = {first}
started = time.process_time()
{rest}
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
print(started, peak)
"""


def _processes(llama: Path, model: KernelLM, scratch: Path) -> dict[str, dict[str, float]]:
    """The processor's seconds from nothing to the first token, and peak memory after NEW tokens at batch 1."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, scratch / "ours.safetensors")
    ours = _START.format(
        imports="from constellation.config import Kernel\nfrom constellation.kernel.model import KernelLM\n"
        "from constellation.kernel.decode import generate\nfrom constellation.kernel.sample import Sampling\n"
        "from safetensors.torch import load_file",
        load=f"model = KernelLM(Kernel(**{vars(model.config)!r}), seed=None)\n"
        f"model.load_state_dict(load_file({str(scratch / 'ours.safetensors')!r}))\n"
        "def tokens(n): return generate(model, [list(range(32))], [Sampling(temperature=0, max_new_tokens=n)], KIND)",
        first="tokens(1)",
        rest=f"tokens({NEW})",
    )
    theirs = _START.format(
        imports="import sys\nsys.modules['torchvision'] = None\nfrom transformers import LlamaForCausalLM",
        load=f"model = LlamaForCausalLM.from_pretrained({str(llama)!r}).eval()\n"
        "def tokens(n): return model.generate(torch.arange(32)[None], do_sample=False, max_new_tokens=n, "
        "eos_token_id=None, pad_token_id=0)",
        first="tokens(1)",
        rest=f"tokens({NEW})",
    )
    programs = {"fp32": ours.replace("KIND", "'fp32'"), "int8": ours.replace("KIND", "'int8'"), "transformers": theirs}
    found = {}
    for name, program in programs.items():
        starts, peaks = zip(*(_process(program) for _ in range(3)), strict=True)
        found[name] = {"start_s": min(starts), "peak_mib": max(peaks)}
    return found


def _process(program: str) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise RunError(f"bench decode: a process failed: {done.stderr.strip().splitlines()[-1:]}")
    started, peak = map(float, done.stdout.split()[-2:])
    return started, peak


# -- the table ---------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> list[str]:
    """The table, a line each."""
    lines = [
        f"{machine_line(result)}; one thread, "
        f"transformers {result['transformers']}, CTranslate2 {result['ctranslate2']}; "
        f"prompt {PROMPT}, {NEW} new tokens, medians of {result['repeats']}",
        f"{'model':<6}{'batch':>6}  {'ours':<12}{'tokens/s':>9}  {'peer':<22}{'tokens/s':>9}{'ratio':>7}  target",
    ]
    for row in result["ratios"]:
        verdict = "" if row["target"] is None else f">= {row['target']:g} {'met' if row['met'] else 'MISSED'}"
        lines.append(
            f"{row['model']:<6}{row['batch']:>6}  {row['ours']:<12}{row['tokens_per_s']:>9.0f}  {row['peer']:<22}"
            f"{row['peer_tokens_per_s']:>9.0f}{row['ratio']:>7.2f}  {verdict}"
        )
    lines += products.report(result["products"])
    rates = ", ".join(f"{rate:.0f} at {streams}" for streams, rate in result["engine"].items())
    lines.append(f"engine, preset small, fp32, sampled: tokens a CPU-second and streams: {rates}")
    for name, one in result["processes"].items():
        late = "" if name == "transformers" else f"  < {COLD_START_S:g} s {_met(one['start_s'] < COLD_START_S)}"
        lines.append(f"start to first token, {name:<14}{one['start_s']:>6.2f} s{late}; peak {one['peak_mib']:.0f} MiB")
    for model, equal in result["equal"].items():
        shares = ", ".join(f"{name} {share:.1%}" for name, share in equal.items() if name != "fp32")
        lines.append(f"{model}: greedy tokens equal to ours in fp32 up to the first that differs: {shares}")
    return lines


def _met(met: bool) -> str:
    return "met" if met else "MISSED"
