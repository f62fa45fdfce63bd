"""What does telemetry cost, do emotions vary and differ, and does any of it predict the loss beyond the loss?

    cost        a run of a preset with telemetry.* as it is by default: seconds of its probe over seconds of the rest
    emotions    of OCEAN of `tiny`, measured every 5 steps: the least standard deviation of a primitive, the largest
                |correlation| of two; the rule is variance > 0 and |corr| < .95
    prediction  of the change of held-out loss until the next measurement, by least squares on the first half of a run
                and judged on the second. Base: the loss, its last change and the step. Gain of a signal is
                1 - squared error with it / without it: above 0 it predicts, below 0 it is noise that was fitted.
                Null: the signal rolled by half its length

Intervals are Student's 95 % over seeds, paired; a signal that never varies predicts nothing and says so.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation.artifacts.run import read_telemetry
from constellation.config import Config, override
from constellation.experiments.harness import described, finish, machine_line
from constellation.experiments.statistics import paired
from constellation.pipeline.prepare import open_plan, prepare, request
from constellation.presets import tiny
from constellation.regime.detector import ORDER
from constellation.telemetry.emotion import EXTENDED, PRIMITIVES
from constellation.train import checkpoint
from constellation.train.job import Job, resolve_precision
from constellation.train.loop import fit

SIGNALS = ("phi", "differentiation", "regime", "coupling", "kappa_eff", "unigram_kl", "curiosity_16")
STUDY_EVERY, GOAL = 5, 0.03


def run(
    config: Config, *, cost_steps: int, steps: int, seeds: int, corpus: Path | None, work: Path, out: Path | None
) -> dict[str, Any]:
    """Both parts; prints what was found."""
    cost = cost_of(config, cost_steps, corpus, work / "cost")
    studied = {"telemetry.every": STUDY_EVERY, "train.sample_bytes": 0, "train.checkpoint_every": 50}
    runs = [told(override(tiny(), {**studied, "train.seed": s}), steps, corpus, work / "study") for s in range(seeds)]
    result = {
        **described(__doc__), "cost": cost, "steps": steps, "seeds": seeds, "emotions": emotions(runs),
        "prediction": prediction(runs), "raw": runs,
    }  # fmt: skip
    return finish(result, lines(result), out)


def told(config: Config, steps: int, corpus: Path | None, place: Path) -> list[dict[str, Any]]:
    """The telemetry of OCEAN trained for `steps`."""
    return _trained(config, steps, corpus, place)[0]


def cost_of(config: Config, steps: int, corpus: Path | None, place: Path) -> dict[str, Any]:
    """Seconds of a measurement and of a step, and their share at the cadence of `config`."""
    rows, cost, elapsed_s = _trained(config, steps, corpus, place)
    train_s = (elapsed_s - cost["spent_s"]) / (steps - 1)
    each_s = cost["spent_s"] / len(rows)
    return {
        "preset": config.preset, "steps": steps, "every": config.telemetry.every, "measurements": len(rows),
        "measurement_s": each_s, "step_s": train_s, "share": each_s / (config.telemetry.every * train_s),
    }  # fmt: skip


def _trained(
    config: Config, steps: int, corpus: Path | None, place: Path
) -> tuple[list[dict[str, Any]], dict[str, float], float]:
    request(place, corpus, config, resume=False) if not place.exists() else None
    prepare(place)
    plan = open_plan(place)
    own = override(config, {"telemetry.enabled": True, "train.precision": plan.config.train.precision})
    with tempfile.TemporaryDirectory() as scratch:
        job = Job("ocean", Path(scratch) / "ocean", resolve_precision(own), steps, plan.train, plan.dev, plan.tokenizer)
        for _ in fit(job):
            pass
        found = checkpoint.newest(job.folder)
        assert found is not None
        probes = found.parts["probes"]
        return read_telemetry(job.folder), probes["probes"]["telemetry"]["cost"], float(probes["elapsed_s"])


def emotions(runs: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Least deviation and largest correlation over the seeds, with the names; the nine, and all twelve."""
    found: dict[str, Any] = {}
    for label, names in (("nine", PRIMITIVES), ("twelve", (*PRIMITIVES, *EXTENDED))):
        least, most = (np.inf, ""), (0.0, "")
        for rows in runs:
            x = np.array([[row[f"emotion_{name}"] for name in names] for row in rows])
            least = min(least, *zip(x.std(0).tolist(), names, strict=True))
            c = np.abs(np.corrcoef(x[2:].T))
            pairs = [
                (float(c[i, j]), f"{names[i]}, {names[j]}") for i, j in itertools.combinations(range(len(names)), 2)
            ]
            most = max(most, *pairs)
        found[label] = {
            "least_deviation": least[0], "of": least[1], "largest_correlation": most[0], "between": most[1],
            "passed": bool(least[0] > 0 and most[0] < 0.95),
        }  # fmt: skip
    return found


def prediction(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each signal: mean gain with its interval, beside its null's."""
    rows = []
    for name in (*SIGNALS, *(f"emotion_{e}" for e in (*PRIMITIVES, *EXTENDED))):
        gains = [gain(rows_of, name, rolled=False) for rows_of in runs]
        nulls = [gain(rows_of, name, rolled=True) for rows_of in runs]
        row: dict[str, Any] = {"signal": name}
        if any(g is None for g in gains) or len(runs) < 2:
            row["verdict"] = "did not vary"
        else:
            own, null = paired([g or 0.0 for g in gains]), paired([n or 0.0 for n in nulls])
            verdict = "predicts" if own.low > 0 else "no prediction shown"
            row |= {"gain": asdict(own), "null": asdict(null), "verdict": verdict}
        rows.append(row)
    return rows


def gain(rows: Sequence[Mapping[str, Any]], name: str, rolled: bool) -> float | None:
    """1 - squared error with the signal / without; None where it does not vary in both halves."""
    loss = np.array([row["held_out_nats"] for row in rows])
    raw = [ORDER.index(row[name]) if name == "regime" and name in row else row.get(name, np.nan) for row in rows]
    signal = np.array(raw, float)
    signal = np.where(np.isfinite(signal), signal, np.nanmedian(signal) if np.isfinite(signal).any() else 0.0)
    target, t = np.diff(loss)[1:], np.arange(1, len(loss) - 1)
    base = np.stack([np.ones(len(t)), loss[1:-1], np.diff(loss)[:-1], t / len(loss)], 1)
    own = signal[1:-1]
    half = len(t) // 2
    if own[:half].std() == 0 or own[half:].std() == 0:
        return None
    if rolled:
        own = np.roll(own, half)

    def error(x: NDArray[np.float64]) -> float:
        fitted = np.linalg.lstsq(x[:half], target[:half], rcond=None)[0]
        return float(((target[half:] - x[half:] @ fitted) ** 2).sum())

    return 1 - error(np.column_stack([base, own])) / error(base)


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    c = result["cost"]
    yield f"{result['question']}  {machine_line(result)}"
    yield (
        f"cost: {1000 * c['measurement_s']:.0f} ms a measurement, {1000 * c['step_s']:.0f} ms a step of {c['preset']}, "
        f"every {c['every']} steps: {100 * c['share']:.2f} % of the training time (goal {100 * GOAL:.0f} %: "
        f"{'passed' if c['share'] < GOAL else 'missed'})"
    )
    for label, e in result["emotions"].items():
        yield (
            f"{label} emotions: least deviation {e['least_deviation']:.3f} ({e['of']}), largest |correlation| "
            f"{e['largest_correlation']:.3f} ({e['between']}): {'passed' if e['passed'] else 'missed'}"
        )
    yield f"{'signal':<24}{'gain over loss history':>28}   null"
    for row in result["prediction"]:
        if "gain" not in row:
            yield f"{row['signal']:<24}{row['verdict']:>28}"
            continue
        g, n = row["gain"], row["null"]
        yield (
            f"{row['signal']:<24}{g['mean']:+8.3f} [{g['low']:+.3f}, {g['high']:+.3f}]   {n['mean']:+.3f}  "
            f"{row['verdict']}"
        )
