"""Does a TopoEncoder cluster and code images better than what there is, and does any controller beat fixed weights?

Arms (`ARMS`): fixed weights; adaptive weights (PI to setpoints, dual for I(X;K)); adaptive rate (the governor); both;
learned precisions; fixed weights under supervision, told apart. Each arm gets the same trials: trial 0 is the default,
the others draw rate and weights, the same for all arms; the trial with the least error on a sixth of the training
images is taken (no label is looked at). Then every arm and baseline runs on the same seeds and is measured on held-out
images. VQ, FSQ and the plain autoencoder are tuned in as many trials of the rate, with the same epochs, batches,
schedule, at least as many parameters and as many codes; clusters are as many as charts everywhere. With one trial
nothing is tuned: every arm has the defaults.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from constellation.config import Config, override
from constellation.errors import ConstellationError
from constellation.experiments.harness import described, finish, machine_line
from constellation.storage.atomic import read_object, write_json
from constellation.topo import autoencoders, clusters
from constellation.topo.evaluate import evaluate
from constellation.topo.images import Images, divided
from constellation.topo.model import TopoEncoder
from constellation.topo.readers import read_images
from constellation.topo.request import preset
from constellation.topo.scores import scores
from constellation.topo.train import Training

ADAPTIVE: dict[str, dict[str, Any]] = {
    "fixed": {},
    "adaptive_weights": {"topo.control.weights": "setpoints", "topo.control.commitment": "balanced"},
    "adaptive_rate": {"topo.control.rate": "governor"},
    "adaptive_both": {
        "topo.control.weights": "setpoints", "topo.control.commitment": "balanced", "topo.control.rate": "governor",
    },
    "precision": {"topo.control.weights": "precision"},
    "supervised": {"topo.loss.supervised": 1.0},
}  # fmt: skip
BASELINES = ("vq", "fsq", "plain", "kmeans_pixels", "gmm_pixels", "kmeans_codes", "gmm_codes", "n2d", "vade")
ARMS = (*ADAPTIVE, *BASELINES)
TUNING_SEED = 100
QUANTISED = ("vq", "fsq")
SHOWN = ("accuracy", "nmi", "ami", "ari", "purity", "mse", "bits", "probe_accuracy", "charts_used", "information")


def draws(trials: int) -> list[dict[str, float]]:
    """What trials change, the same for every arm; the first changes nothing."""
    rng, found = np.random.default_rng(0), [dict[str, float]()]
    ranges = {"topo.train.lr": (2e-3, 1.2e-2), "topo.loss.routing_entropy": (0.1, 0.6),
              "topo.loss.diversity": (0.5, 2.0), "topo.loss.orbit": (0.5, 2.0)}  # fmt: skip
    for _ in range(trials - 1):
        found.append({name: float(np.exp(rng.uniform(*np.log(ends)))) for name, ends in ranges.items()})
    return found


def run(
    source: str,
    changes: Mapping[str, Any],
    *,
    seeds: int,
    trials: int,
    epochs: int,
    arms: tuple[str, ...] = ARMS,
    work: Path,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Tune, train and measure; the table is printed, the raw result written to `out`. Finished trainings are reused."""
    images = read_images(source)
    inner = divided(images.name, images.train)  # a sixth of the training images, to tune on
    base = override(preset("digits"), {**changes, "topo.train.epochs": epochs, "topo.train.eval_every": 0})
    result: dict[str, Any] = {
        **described(__doc__), "data": images.name, "data_hash": images.digest, "official_split": images.official,
        "train": len(images.train), "held_out": len(images.test), "seeds": seeds, "trials": trials, "epochs": epochs,
        "changes": dict(changes), "draws": draws(trials), "arms": {},
    }  # fmt: skip
    for arm in arms:
        tuned: list[dict[str, Any]] = []
        if trials > 1 and (arm in ADAPTIVE or arm in ("vq", "fsq", "plain")):
            for number, drawn in enumerate(draws(trials)):
                tuned.append(_once(arm, base, drawn, inner, TUNING_SEED, work / f"tune-{number}", say))
        errors = [math.inf if one.get("mse") is None else one["mse"] for one in tuned]
        chosen = draws(trials)[int(np.argmin(errors))] if tuned else {}
        runs = [_once(arm, base, chosen, images, seed, work / f"seed-{seed}", say) for seed in range(seeds)]
        result["arms"][arm] = {"chosen": chosen, "tuning": tuned, "runs": runs}
    result["verdicts"] = list(verdicts(result))
    return finish(result, lines(result), out)


def _once(
    arm: str,
    base: Config,
    drawn: Mapping[str, float],
    images: Images,
    seed: int,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """One training and its numbers, from disk where it is finished; a failed one says why."""
    key = {"arm": arm, "drawn": dict(drawn), "data": images.digest, "topo": base.to_json()["topo"], "seed": seed}
    file = folder / f"{arm}.json"
    if file.exists() and (found := read_object(file))["key"] == key:
        return dict(found["numbers"])
    began = time.process_time()
    try:
        config = override(base, {**drawn, **ADAPTIVE.get(arm, {}), "topo.train.seed": seed})
        numbers = _topo(config, images, folder / arm) if arm in ADAPTIVE else baseline(arm, config, images)
    except ConstellationError as error:
        numbers = {"failed": str(error)}
    numbers["cpu_s"] = time.process_time() - began
    write_json(file, {"key": key, "numbers": numbers}, sealed=True)
    told = ", ".join(
        f"{name} {numbers[name]:.4g}" for name in ("mse", "accuracy", "nmi") if numbers.get(name) is not None
    )
    say(f"{folder.name} {arm}: {numbers.get('failed', told)}, {numbers['cpu_s']:.1f} CPU-seconds")
    return numbers


def _topo(config: Config, images: Images, folder: Path) -> dict[str, Any]:
    """A TopoEncoder, trained without a checkpoint: what is killed begins again."""
    run = Training(config, images, folder)
    for _ in range(config.topo.train.epochs):
        run.pass_over()
    found: dict[str, Any] = evaluate(run.model, images.test, run.bias)
    found |= {"parameters": run.model.size, **run.adaptive.numbers()}
    standing = run.adaptive.standing()
    return found if standing is None else {**found, "infeasible": list(standing.infeasible)}


def baseline(arm: str, config: Config, images: Images) -> dict[str, Any]:
    """One of BASELINES on the same images, with as many clusters as charts and codes as the atlas has."""
    m, t = config.topo.model, config.topo.train
    count, codes = m.charts, m.charts * m.codes
    pixels: Any = [part.x.reshape(len(part), -1) for part in (images.train, images.test)]
    named: dict[str, Callable[..., Any]] = {"kmeans": clusters.kmeans, "gmm": clusters.mixture}
    if arm.endswith("_pixels"):
        return _scored(named[arm.removesuffix("_pixels")](*pixels, count, t.seed), images)
    kind = arm if arm in QUANTISED else "plain"
    size = TopoEncoder(m, images.shape, images.classes, t.seed).size
    hidden = autoencoders.as_wide_as(size, kind, m.encoder, images.shape, m.latent, codes)
    torch.manual_seed(t.seed)
    model = autoencoders.Autoencoder(kind, m.encoder, images.shape, hidden, m.latent, codes)
    x = torch.from_numpy(images.train.x)
    autoencoders.fit(model, x, epochs=t.epochs, batch=t.batch, lr=t.lr, seed=t.seed, decay=t.decay)
    found: dict[str, Any] = {"hidden": hidden, **autoencoders.numbers(model, images.test.x)}
    if arm == "plain":
        return found
    points: Any = [autoencoders.read(model, part.x)[1] for part in (images.train, images.test)]
    if arm == "vade":
        test = torch.from_numpy(images.test.x)
        named_M, mse = clusters.vade(
            model, x, test, count, epochs=t.epochs, batch=t.batch, lr=t.lr / 3, seed=t.seed
        )  # fmt: skip
        return {"mse": mse, **_scored(named_M, images)}
    if arm in QUANTISED:
        return {**found, **_scored(named["kmeans"](*points, count, t.seed), images)}
    how: Callable[..., Any] = clusters.n2d if arm == "n2d" else named[arm.removesuffix("_codes")]
    return _scored(how(*points, count, t.seed), images)


def _scored(named_M: np.ndarray, images: Images) -> dict[str, Any]:
    return {} if images.test.y is None else dict(scores(named_M, images.test.y))


def column(result: Mapping[str, Any], arm: str, name: str) -> list[float]:
    """An arm's number over seeds, of those that did not fail."""
    runs = result["arms"].get(arm, {"runs": []})["runs"]
    return [one[name] for one in runs if one.get(name) is not None]


def gap(result: Mapping[str, Any], arm: str, other: str, name: str) -> dict[str, float]:
    """Mean of the paired differences arm - other and its 95 % interval (Student's t over seeds)."""
    import scipy.stats

    a, b = column(result, arm, name), column(result, other, name)
    if len(a) != len(b) or not a:
        return {}
    gaps = np.subtract(a, b)
    if len(gaps) < 2 or np.ptp(gaps) == 0:
        return {"mean": float(gaps.mean())}
    low, high = scipy.stats.ttest_1samp(gaps, 0.0).confidence_interval(0.95)
    return {"mean": float(gaps.mean()), "low": float(low), "high": float(high)}


BARS = (  # arm, against, number, whether more is better
    *(("fixed", other, name, True) for name in ("accuracy", "nmi")
      for other in ("kmeans_pixels", "gmm_pixels", "kmeans_codes", "gmm_codes", "vade", "n2d")),
    *(("fixed", other, "mse", False) for other in ("vq", "fsq")),
    *((arm, "fixed", name, more) for arm in ("adaptive_weights", "adaptive_rate", "adaptive_both", "precision")
      for name, more in (("accuracy", True), ("mse", False))),
)  # fmt: skip


def verdicts(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every bar that both sides were measured for."""
    for arm, other, name, more in BARS:
        if found := gap(result, arm, other, name):
            if max(column(result, other, "codes_used"), default=2) < 2:
                word = "no comparison: it collapsed to one code"
            elif "low" not in found:
                word = "one value: no interval"
            elif found["low"] <= 0 <= found["high"]:
                word = "no difference shown"
            else:
                word = "better" if (found["low"] > 0) == more else "worse"
            yield {"arm": arm, "against": other, "number": name, **found, "verdict": word}


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The tables, in Markdown."""
    yield f"{result['data']}: {result['train']} training images, {result['held_out']} held out"
    yield (
        f"{result['seeds']} seeds, {result['trials']} trials an arm, {result['epochs']} epochs; {machine_line(result)}"
    )
    yield ""
    yield "| arm | " + " | ".join(SHOWN) + " | CPU-seconds |"
    yield "|---" * (len(SHOWN) + 2) + "|"
    for arm in result["arms"]:
        cells = []
        for name in (*SHOWN, "cpu_s"):
            values = column(result, arm, name)
            spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4g}{spread}" if values else "")
        failed = [one["failed"] for one in result["arms"][arm]["runs"] if "failed" in one]
        yield f"| {arm} | " + " | ".join(cells) + " |" + (f" {len(failed)} failed: {failed[0]}" if failed else "")
    yield ""
    shuffled = [
        (column(result, "fixed", n), n)
        for n in ("shuffled_mse", "mean_mse", "jump_r2", "jump_identity", "jump_cocycle")
    ]
    yield "fixed: " + ", ".join(f"{name} {np.mean(values):.4g}" for values, name in shuffled if values)
    yield ""
    yield "| arm | against | number | difference | verdict |"
    yield "|---|---|---|---|---|"
    for one in result["verdicts"]:
        span = f" [{one['low']:+.4f}, {one['high']:+.4f}]" if "low" in one else ""
        yield f"| {one['arm']} | {one['against']} | {one['number']} | {one['mean']:+.4f}{span} | {one['verdict']} |"
