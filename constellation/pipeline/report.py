"""Validation report of a run: what was wanted, what was measured, what it cost. No Ray here.

    RUN/report/validation_report.json   everything below as data
    RUN/report/report.md, report.html   the same to read
    RUN/report/*.png                    loss, basin distance, integration, coupling over length, regimes

Targets are the original design's: basin distance below .15, phi above .7, beta .44 +- .1 with R^2 above .9. They are
printed with a verdict each; no target is the project's claim. Distance and phi are measured anew, on the held-out
windows of telemetry; curves are the run's own training_telemetry.jsonl where there is one. The fit is

    J(L) = J(L_ref) (1 + beta ln(L / L_ref))        L_ref = kernel.coupling_ref, by least squares over lengths

with the 95 % interval of a bootstrap over windows, beside an untrained model of the same shape. A beta of .44 means
"as the length grows by e, J grows by .44 of its value at L_ref" and depends on L_ref.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from constellation.artifacts.run import read_telemetry
from constellation.errors import ArtifactError
from constellation.kernel.model import KernelLM
from constellation.pipeline.prepare import Plan, open_plan
from constellation.plots.figure import Axes, draw
from constellation.plots.panel import Curve
from constellation.regime.detector import ORDER, detect_regime
from constellation.roster import OCEAN
from constellation.storage.atomic import read_object, write_bytes, write_json
from constellation.telemetry.collective import collective_phi
from constellation.telemetry.coupling import coupling
from constellation.telemetry.integration import integration
from constellation.telemetry.monitor import Windows, basin_distance, read
from constellation.train import checkpoint
from constellation.train.measuring import windows_of
from router.decide.fisher_rao import INTEGRATION

TARGETS = {"basin_distance": "< 0.15", "phi": "> 0.7", "beta": "0.44 +- 0.1", "r_squared": "> 0.90"}
WINDOWS, SHORTEST, DRAWS, RESAMPLES = 16, 16, 8, 1000


@dataclass(frozen=True)
class BetaFit:
    """J over length, and the line through it."""

    lengths: list[int]
    coupling_rad: list[float]
    beta: float
    low: float
    high: float
    r_squared: float

    @property
    def matches(self) -> bool:
        """Whether the whole interval lies in .34 .. .54."""
        return self.low >= 0.34 and self.high <= 0.54


def beta_fit(model: KernelLM, windows: Windows) -> BetaFit:
    """Lengths double from 16 to the context; J of each window is a mean over 8 resampled tokens."""
    context, ref = windows.inputs_ST.shape[1], model.config.coupling_ref
    lengths = [SHORTEST * 2**i for i in range(20) if SHORTEST * 2**i <= context]
    if len(lengths) < 2:
        raise ArtifactError(f"kernel.context={context}: a fit over length needs at least {2 * SHORTEST}")
    j_LS = np.stack([
        np.mean([coupling(model, windows.inputs_ST[:, -length:], seed=draw).numpy() for draw in range(DRAWS)], 0)
        for length in lengths
    ])  # fmt: skip
    x_L = np.log(np.array(lengths) / ref)

    def fitted(j_L: NDArray[np.float64]) -> tuple[float, float]:
        slope, at_ref = np.polyfit(x_L, j_L, 1)
        rest = ((j_L - slope * x_L - at_ref) ** 2).sum()
        return float(slope / at_ref), float(1 - rest / max(((j_L - j_L.mean()) ** 2).sum(), 1e-300))

    generator = np.random.default_rng(0)
    drawn = [
        fitted(j_LS[:, generator.integers(j_LS.shape[1], size=j_LS.shape[1])].mean(1))[0] for _ in range(RESAMPLES)
    ]
    beta, r_squared = fitted(j_LS.mean(1))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return BetaFit(lengths, j_LS.mean(1).tolist(), beta, float(low), float(high), r_squared)


def report(run: Path) -> dict[str, Any]:
    """Measure, draw and write; returns what validation_report.json holds."""
    plan = open_plan(run)
    roles = [role for role in plan.config.models if checkpoint.steps_on_disk(plan.folder(role))]
    if not roles:
        raise ArtifactError(f"{run} holds no checkpoint; train it first: constellation train --run {run}")
    windows = windows_of(plan.dev, plan.config.kernel.context, WINDOWS)
    windows.check(plan.config.kernel.width)
    models = {role: checkpoint.load_model(plan.folder(role)) for role in roles}
    readings = {role: read(model, windows) for role, model in models.items()}
    rows = [_model_row(plan, role, readings, windows) for role in roles]
    first = models[roles[0]]
    fits = {"trained": beta_fit(first, windows), "untrained": beta_fit(KernelLM(first.config, seed=1), windows)}
    kernels = [role for role in roles if role != OCEAN]
    together = None
    if len(kernels) > 1:
        together = asdict(collective_phi(torch.stack([readings[role].sqrt_p_NV for role in kernels])))
    result = {
        "run": str(run), "status": _status(plan, roles), "models": rows, "beta_of": roles[0],
        "beta": {name: {**asdict(fit), "matches": fit.matches} for name, fit in fits.items()},
        "collective": together, "results": _against(rows, fits["trained"], fits["untrained"]),
        "runtime_s": sum(row["runtime_s"] or 0.0 for row in rows), "tokens": sum(row["tokens"] or 0 for row in rows),
    }  # fmt: skip
    if len(kernels) == len(plan.config.kernels) and plan.router.is_dir():  # what mode=phi weighs by
        phis = {row["role"]: row["phi"] for row in rows if row["role"] in kernels}
        write_json(plan.router / INTEGRATION, {"phi": phis, "windows": WINDOWS})
    place = run / "report"
    result["plots"] = [file.name for file in _drawn(plan, roles, rows, fits, place)]
    write_json(place / "validation_report.json", result)
    text = "\n".join(_markdown(result))
    write_bytes(place / "report.md", (text + "\n").encode())
    write_bytes(place / "report.html", _html(text).encode())
    return result


def _model_row(plan: Plan, role: str, readings: Mapping[str, Any], windows: Windows) -> dict[str, Any]:
    seen, page = readings[role], {}
    file = plan.folder(role) / "summary.json"
    if file.exists():
        page = read_object(file)
    whole = integration(seen.hidden_ND)
    far = None
    if role != OCEAN and OCEAN in readings:
        far = basin_distance(seen.sqrt_p_NV, readings[OCEAN].sqrt_p_NV)
    lines = read_telemetry(plan.folder(role))
    counts = [sum(line.get("regime") == name for line in lines) for name in ORDER]
    return {
        "role": role, "held_out_nats": float(seen.nats_ST.mean()), "phi": whole.phi, "phi_null_nats": whole.null,
        "differentiation": whole.differentiation, "phi_degenerate": whole.degenerate,
        "regime": None if whole.degenerate else detect_regime(whole.phi)[0], "basin_distance": far,
        "dev_bits_per_byte": page.get("best_dev_bits_per_byte"), "status": page.get("status", "unfinished"),
        "runtime_s": page.get("runtime_s"), "tokens": page.get("tokens"), "measurements": len(lines),
        "regimes": dict(zip(ORDER, counts, strict=True)),
    }  # fmt: skip


def _status(plan: Plan, roles: Sequence[str]) -> str:
    """SUCCESS where every model is trained to its end, FAILED where one failed, else PARTIAL; no word on targets."""
    pages = [read_object(f) for role in roles if (f := plan.folder(role) / "summary.json").exists()]
    if any(page.get("status") == "failed" for page in pages):
        return "FAILED"
    done = len(pages) == len(plan.config.models) and all(page.get("status") == "done" for page in pages)
    return "SUCCESS" if done else "PARTIAL"


def _against(rows: Sequence[Mapping[str, Any]], fit: BetaFit, untrained: BetaFit) -> list[dict[str, Any]]:
    """The original design's key results, each with its target and what is to be said."""
    distances = [row["basin_distance"] for row in rows if row["basin_distance"] is not None]
    far = float(np.median(distances)) if distances else None
    phi = float(np.median([row["phi"] for row in rows]))
    excluded = untrained.high < 0.34 or untrained.low > 0.54
    words = "met" if fit.matches and excluded else "not met" if not fit.matches else "not met: the control is there too"
    return [
        {"name": "basin distance to OCEAN, median of kernels, rad", "value": far, "target": TARGETS["basin_distance"],
         "verdict": "not measured" if far is None else "met" if far < 0.15 else "not met"},
        {"name": "integration phi, median of models", "value": phi, "target": TARGETS["phi"],
         "verdict": "met" if phi > 0.7 else "not met"},
        {"name": f"beta of J(L), interval {fit.low:.2f} .. {fit.high:.2f}", "value": fit.beta,
         "target": TARGETS["beta"], "verdict": words},
        {"name": "R^2 of that fit", "value": fit.r_squared, "target": TARGETS["r_squared"],
         "verdict": "met" if fit.r_squared > 0.9 else "not met"},
    ]  # fmt: skip


def _drawn(
    plan: Plan, roles: Sequence[str], rows: Sequence[Mapping[str, Any]], fits: Mapping[str, BetaFit], place: Path
) -> list[Path]:
    """The figures that there is something for."""
    lines = {role: read_telemetry(plan.folder(role)) for role in roles}

    def along(name: str, unit: str) -> tuple[Curve, ...]:
        found = []
        for role, told in lines.items():
            points = [(line["step"], line[name]) for line in told if name in line]
            if points:
                x, y = np.array(points, float).T
                found.append(Curve(role, x, y, "step", unit))
        return tuple(found)

    wanted = {
        "loss": (along("held_out_nats", "nats"), "held-out loss"),
        "basin_distance_curve": (along("basin_distance", "rad"), "basin distance to OCEAN"),
        "integration_depth_curve": (along("phi", "1"), "integration phi"),
        "beta_function_fit": (
            tuple(Curve(f"{name}: beta {fit.beta:.2f}", np.array(fit.lengths, float), np.array(fit.coupling_rad),
                        "tokens", "rad") for name, fit in fits.items()), "coupling J(L)"),
    }  # fmt: skip
    drawn = [
        draw([Axes(curves, title, log_x=name == "beta_function_fit")], place / f"{name}.png")
        for name, (curves, title) in wanted.items() if curves
    ]  # fmt: skip
    counts = [sum(row["regimes"][name] for row in rows) for name in ORDER]
    if sum(counts):
        shares = Curve("share of measurements", np.arange(3.0), np.array(counts) / sum(counts), "", "1")
        drawn.append(draw([Axes((shares,), "regimes", points=True, ticks=ORDER)], place / "regime_distribution.png"))
    return drawn


def _markdown(result: Mapping[str, Any]) -> list[str]:
    def number(value: Any) -> str:
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"

    lines = [
        f"# Training report: {Path(result['run']).name}", "", "## Summary", "",
        f"- Status: {result['status']} ({len(result['models'])} models)", f"- Training tokens: {result['tokens']:,}",
        f"- Training time: {result['runtime_s']:.0f} s, of all models together; cost: the hours of your machine", "",
        "## Key results", "", "| quantity | measured | target of the original design | verdict |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {r['name']} | {number(r['value'])} | {r['target']} | {r['verdict']} |" for r in result["results"]]
    null = result["beta"]["untrained"]
    lines += ["", f"An untrained model of the same shape has beta {null['beta']:.2f} [{null['low']:.2f}, "
              f"{null['high']:.2f}]."]  # fmt: skip
    if result["collective"]:
        c = result["collective"]
        lines += ["", f"Collective phi of the kernels {c['phi']:.3f} (shuffled null {c['null']:.3f} nats)."]
    lines += ["", "## Models", "", "| model | phi | null, nats | differentiation | regime | D to OCEAN, rad |"
              " nats/token | bits/byte | tokens | seconds |", "|" + "---|" * 10]  # fmt: skip
    columns = ("phi", "phi_null_nats", "differentiation", "regime", "basin_distance", "held_out_nats",
               "dev_bits_per_byte", "tokens", "runtime_s")  # fmt: skip
    for row in result["models"]:
        cells = [row[c] if isinstance(row[c], str) else number(row[c]) for c in columns]
        lines.append(f"| {row['role']} | {' | '.join(cells)} |")
    lines += ["", "## Plots", ""] + [f"![{Path(name).stem}]({name})" for name in result["plots"]]
    return lines


def _html(markdown: str) -> str:
    """The headings, lists, tables and pictures that a report has, as a page."""
    body: list[str] = []
    table = False
    for line in markdown.splitlines():
        if table and not line.startswith("|"):
            body, table = [*body, "</table>"], False
        if line.startswith("|---"):
            continue
        if line.startswith("|"):
            tag = "td" if table else "th"
            body += [] if table else ["<table>"]
            table = True
            cells = "".join(f"<{tag}>{html.escape(cell.strip())}</{tag}>" for cell in line.strip("|").split("|"))
            body.append(f"<tr>{cells}</tr>")
        elif line.startswith("!["):
            name, _, file = line[2:-1].partition("](")
            body.append(f'<img src="{html.escape(file)}" alt="{html.escape(name)}">')
        elif line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            body.append(f"<h{level}>{html.escape(line[level + 1 :])}</h{level}>")
        elif line:
            body.append(f"<p>{html.escape(line.removeprefix('- '))}</p>")
    style = (
        "body{font-family:sans-serif;margin:2em;max-width:70em}td,th{padding:.2em .8em;text-align:left}img{width:45%}"
    )
    page = "\n".join([*body, "</table>"] if table else body)
    return f"<!doctype html><meta charset=utf-8><title>Training report</title><style>{style}</style>\n{page}\n"
