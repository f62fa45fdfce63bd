"""Does the coupling of a trained kernel run with the context length, with beta = 0.44, and does nothing else do so?

Registered beforehand, here: the lengths, L_ref = 128 (far above 10, where any s ln L has beta = .43), the law `running`
of J for the verdict, kappa and the law `power` beside it, D documents of held-out text, and the rule

    passed   the interval of beta lies within 0.34 .. 0.54, and that of every control excludes 0.44

Controls, each measured on the same windows:

    untrained   the same kernel with random weights
    plain       metric dot, no coupling, no look-back, trained as this one was: an ordinary transformer
    beta_zero   the same kernel trained with coupling off
    shuffled    this kernel on the window's tokens in random order

The window of length L ends where the longest one ends, so that all lengths read the same last tokens. Lengths beyond
the kernel's own context are read with the same weights and longer tables, and marked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from constellation.config import Config, override
from constellation.data.cache import TokenCache, open_cache
from constellation.errors import ConfigError, DataError
from constellation.experiments import beta_fit, beta_observables
from constellation.experiments.harness import described, save
from constellation.kernel.model import KernelLM
from constellation.pipeline.prepare import Plan, ocean_job, open_plan
from constellation.train.checkpoint import load_model
from constellation.train.job import Job
from constellation.train.loop import fit

LENGTHS = (128, 256, 512, 1024, 2048)
L_REF = 128
OTHER_REFS = (10, 32, 64, 256, 1024)
TARGET, LOW, HIGH = 0.44, 0.34, 0.54
CONTROLS: dict[str, dict[str, Any]] = {
    "untrained": {},
    "plain": {"kernel.metric": "dot", "kernel.coupling": "off", "kernel.look_back": 0},
    "beta_zero": {"kernel.coupling": "off"},
    "shuffled": {},
}
KAPPA_REFERENCE = 64.0  # kappa is reported with this kernel's median at the shortest length as 64


def run(
    run: Path,
    *,
    role: str = "ocean",
    lengths: Sequence[int] = LENGTHS,
    documents: int = 16,
    draws: int = 8,
    controls: Sequence[str] = tuple(CONTROLS),
    work: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure, fit, judge; the raw result and the plots go to `out`. Controls are trained in `work` once."""
    plan = open_plan(run)
    _check(plan, role, lengths, controls)
    torch.set_num_threads(plan.config.train.threads)
    cache = open_cache(plan.dev)
    windows_DL = windows(cache, max(lengths), documents, seed)
    counts = np.bincount(cache.tokens, minlength=plan.config.kernel.vocab_size).astype(np.float64)
    model = load_model(plan.folder(role))
    result: dict[str, Any] = {
        **described(__doc__), "run": run.name, "role": role, "trained_context": model.config.context,
        "registered": {
            "lengths": list(lengths), "L_ref": L_REF, "law": "running", "quantity": "coupling J", "target": TARGET,
            "interval_within": [LOW, HIGH], "documents": len(windows_DL), "interventions": draws, "seed": seed,
        },
        "arms": {},
    }  # fmt: skip
    reference = None
    for name in ("trained", *controls):
        say(f"{name}: {len(windows_DL)} documents at {', '.join(map(str, lengths))} tokens")
        arm, text = _arm(name, model, plan, work or run / "measure", windows_DL, seed)
        arm = beta_observables.stretched(arm, max(lengths))
        j_DL, kappa_DL = _measure(arm, text, lengths, counts / counts.sum(), draws, seed)
        reference = float(np.median(kappa_DL[:, 0])) if reference is None else reference
        kappa_DL = kappa_DL * (KAPPA_REFERENCE / reference) if reference else kappa_DL
        result["arms"][name] = {
            "coupling": j_DL.mean(0).tolist(), "kappa": kappa_DL.mean(0).tolist(),
            "fits": {q: beta_fit.fits(y, lengths, L_REF, OTHER_REFS, seed) for q, y in
                     (("coupling", j_DL), ("kappa", kappa_DL))},
            "documents": {"coupling": j_DL.tolist(), "kappa": kappa_DL.tolist()},
        }  # fmt: skip
    result = summed(result)
    for text_line in report(result):
        say(text_line)
    if out:
        save(result, out)
        from constellation.experiments import beta_plots

        for file in (out, *beta_plots.plot(result, out)):
            say(f"wrote {file}")
    return result


def windows(cache: TokenCache, longest: int, most: int, seed: int) -> NDArray[np.int64]:
    """(D, longest + 1) tokens, from the end of each of `most` documents that are long enough, drawn by `seed`."""
    long_enough = np.flatnonzero(np.diff(cache.offsets) > longest)
    if len(long_enough) < 2:
        raise DataError(
            f"{len(long_enough)} held-out documents have more than {longest} tokens, the longest has "
            f"{int(np.diff(cache.offsets).max())}; at least two are wanted: choose shorter --lengths"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(long_enough)[:most])
    ends = cache.offsets[chosen + 1]
    return cache.tokens[ends[:, None] + np.arange(-longest - 1, 0)].astype(np.int64)


def verdict(arms: Mapping[str, Any], quantity: str = "coupling", law: str = "running") -> dict[str, Any]:
    """The registered rule: passed, or the reasons why not."""
    beta = {name: arm["fits"][quantity][law] for name, arm in arms.items()}
    own = beta["trained"]
    reasons = []
    if own["interval"] is None or not LOW <= own["interval"][0] <= own["interval"][1] <= HIGH:
        reasons.append(f"its interval {_shown(own)} is not within {LOW} .. {HIGH}")
    for name in CONTROLS:
        if name not in beta:
            reasons.append(f"the control {name} was not measured")
        elif (at := beta[name]["interval"]) is not None and at[0] <= TARGET <= at[1]:
            reasons.append(f"the control {name} has {_shown(beta[name])}, which holds {TARGET}")
    return {"passed": not reasons, "reasons": reasons}


def summed(result: dict[str, Any]) -> dict[str, Any]:
    """The result with its conclusion, under the names of the original design's page."""
    own = result["arms"]["trained"]
    judged = verdict(result["arms"])
    fit_of = own["fits"]["coupling"]["running"]
    head = f"beta of J = {_shown(fit_of)} at L_ref = {L_REF}"
    why = "passed" if judged["passed"] else f"not passed: {'; '.join(judged['reasons'])}"
    return {
        **result, "context_lengths": result["registered"]["lengths"], "kappa_measured": own["kappa"],
        "coupling_measured": own["coupling"],
        "beta_fit": {key: fit_of[key] for key in ("value", "std_error", "R_squared", "p_value", "interval")},
        "kappa_fit": own["fits"]["kappa"]["running"], "verdict": judged, "conclusion": f"{head}; {why}",
    }  # fmt: skip


def report(result: Mapping[str, Any]) -> list[str]:
    """The table, a line each."""
    lines = [f"{'arm':<11}{'quantity':<10}{'law':<9}{'beta':>8}  95 % interval      R^2     p       s of s ln L"]
    for name, arm in result["arms"].items():
        for quantity, found in arm["fits"].items():
            for law in ("running", "power"):
                row = found[law]
                low, high = row["interval"] or (None, None)
                lines.append(
                    f"{name:<11}{quantity:<10}{law:<9}{_n(row['value']):>8}  [{_n(low):>7}, {_n(high):>7}]"
                    f"{_n(row['R_squared']):>8} {_n(row['p_value']):>8} {_n(found['s_ln_L']['value']):>8}"
                )
    others = result["arms"]["trained"]["fits"]["coupling"]["running"]["under_other_L_ref"]
    lines.append("beta of J under another L_ref: " + ", ".join(f"{ref}: {_n(v)}" for ref, v in others.items()))
    return [*lines, result["conclusion"]]


def _check(plan: Plan, role: str, lengths: Sequence[int], controls: Sequence[str]) -> None:
    if unknown := set(controls) - set(CONTROLS):
        raise ConfigError(f"--controls {sorted(unknown)[0]}: choose of {', '.join(CONTROLS)}")
    if role not in plan.config.models:
        raise ConfigError(f"--kernel {role}: choose one of {', '.join(plan.config.models)}")
    if len(lengths) < 3 or list(lengths) != sorted(set(lengths)) or lengths[0] < 2:
        raise ConfigError(f"--lengths {','.join(map(str, lengths))}: at least three, rising, from 2 on")


def _arm(
    name: str, model: KernelLM, plan: Plan, work: Path, windows_DL: NDArray[np.int64], seed: int
) -> tuple[KernelLM, NDArray[np.int64]]:
    """The model and the text of an arm."""
    if name == "untrained":
        return KernelLM(model.config, seed=plan.config.train.seed + 1), windows_DL
    if name == "shuffled":
        return model, np.random.default_rng(seed).permuted(windows_DL, axis=1)
    if name in CONTROLS:
        return trained(name, plan, work), windows_DL
    return model, windows_DL


def trained(name: str, plan: Plan, work: Path) -> KernelLM:
    """The control `name`, trained as OCEAN was; what an earlier call trained is used again."""
    job = ocean_job(plan)
    if plan.config.pretrained.given:
        raise ConfigError(f"--controls {name}: a pretrained OCEAN has no twin that was trained so; leave it out")
    config: Config = override(plan.config, CONTROLS[name])
    folder = work / name
    for _ in fit(Job(job.role, folder, config, job.steps, plan.train, plan.dev, plan.tokenizer)):
        pass
    return load_model(folder)


def _measure(
    model: KernelLM, text_DL: NDArray[np.int64], lengths: Sequence[int], unigram_V: Any, draws: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """J and kappa, each (D, lengths)."""
    j, kappa = (np.zeros((len(text_DL), len(lengths))) for _ in range(2))
    for d, text in enumerate(text_DL):
        for at, length in enumerate(lengths):
            window = text[-length - 1 :]
            j[d, at] = beta_observables.coupling(model, window[:-1], unigram_V, draws, seed + d)
            kappa[d, at] = beta_observables.curvature(model, window)
    return j, kappa


def _shown(row: Mapping[str, Any]) -> str:
    low, high = row["interval"] or (None, None)
    return f"{_n(row['value'])} [{_n(low)}, {_n(high)}]"


def _n(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
