"""Figures of a topo run, drawn without a display: atlas, codes, reconstructions, jumps, samples, traces."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from constellation.artifacts.signal import Signal, read_signals
from constellation.errors import ConfigError
from constellation.storage.atomic import write_bytes
from constellation.topo.evaluate import Read, read
from constellation.topo.images import Images
from constellation.topo.model import TopoEncoder
from constellation.topo.saved import load

SHOWN = 1500  # points of the atlas
GRID = 160  # points of a side, of the decision regions
ROWS = 12  # images beside their reconstructions, codes of a chart


def report(run: Path, out: Path) -> list[Path]:
    """All figures of `run` into `out`, as PNG; ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # noqa: F401
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'constellation[plots]'") from None
    model, images, bias = load(run)
    seen = read(model, images.test.x, bias)
    signals = read_signals(run / "signals.npz")
    pages: dict[str, Callable[[Any], None]] = {
        "atlas": lambda figure: atlas(figure, model, images, seen),
        "codes": lambda figure: codes(figure, model, seen),
        "reconstructions": lambda figure: reconstructions(figure, images, seen),
        "jumps": lambda figure: jumps(figure, model, seen),
        "samples": lambda figure: samples(figure, model, seen),
        "traces": lambda figure: traces(figure, signals),
    }
    return [_page(out / f"{name}.png", draw) for name, draw in pages.items()]


def _page(file: Path, draw: Callable[[Any], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    draw(figure)
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110)
    write_bytes(file, held.getvalue())
    return file


def plane(points_MD: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean (D,) and the two directions (2, D) of greatest variance; the identity's where D = 2."""
    mean = points_MD.mean(0).astype(np.float64)
    if points_MD.shape[1] == 2:
        return np.zeros(2), np.eye(2)
    _, _, directions = np.linalg.svd(points_MD - mean, full_matrices=False)
    return mean, directions[:2]


def atlas(figure: Any, model: TopoEncoder, images: Images, seen: Read) -> None:
    """Held-out points in the plane of their two principal directions, by chart and by class.

    The background is the chart that the router gave to the image nearest in that plane: where its decisions change.
    """
    mean, directions = plane(seen.point_MD)
    at = (seen.point_MD - mean) @ directions.T
    centres_ND = model.atlas.centres.detach().numpy()
    centres = (centres_ND - mean) @ directions.T
    low, high = np.minimum(at.min(0), centres.min(0)) - 0.5, np.maximum(at.max(0), centres.max(0)) + 0.5
    x, y = (np.linspace(low[i], high[i], GRID) for i in range(2))
    from scipy.spatial import cKDTree

    grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    near = seen.chart_M[cKDTree(at).query(grid)[1]].reshape(GRID, GRID)
    edge = np.zeros(near.shape, bool)
    edge[1:] |= near[1:] != near[:-1]
    edge[:, 1:] |= near[:, 1:] != near[:, :-1]
    some = np.random.default_rng(0).permutation(len(at))[:SHOWN]
    labels = images.test.y
    for place, colour, title in zip(
        figure.subplots(1, 1 if labels is None else 2, squeeze=False).flat,
        (seen.chart_M, labels),
        ("chart of each held-out image, and of the nearest one", "class of each"),
    ):
        place.pcolormesh(
            x, y, near, cmap="tab10" if model.config.charts <= 10 else "tab20", alpha=0.15, shading="nearest"
        )
        place.pcolormesh(x, y, np.where(edge, 1.0, np.nan), cmap="gray", shading="nearest", vmin=0, vmax=2)
        shade = np.asarray(colour)[some]
        place.scatter(*at[some].T, c=shade, cmap="tab10" if shade.max() < 10 else "tab20", s=7, lw=0)
        place.scatter(*centres.T, marker="x", c="black", s=40)
        for n, centre in enumerate(centres):
            place.annotate(str(n), centre, fontsize=9, xytext=(4, 4), textcoords="offset points")
        place.set_title(title, fontsize=10)
        place.set_xlabel("first principal direction of v")
        place.set_ylabel("second")


def codes(figure: Any, model: TopoEncoder, seen: Read) -> None:
    """How often every code of every chart is used on held-out images, and every chart."""
    m = model.config
    counts = np.bincount(seen.chart_M * m.codes + seen.code_M, minlength=m.charts * m.codes).reshape(m.charts, m.codes)
    left, right = figure.subplots(1, 2, width_ratios=[4, 1], sharey=True)
    shown = left.imshow(counts, aspect="auto", cmap="viridis")
    figure.colorbar(shown, ax=left, label="held-out images")
    left.set_xlabel("code")
    left.set_ylabel("chart")
    left.set_yticks(range(m.charts))
    left.set_title(f"{(counts > 0).sum()} of {counts.size} codes used", fontsize=10)
    right.barh(range(m.charts), counts.sum(1))
    right.axvline(len(seen.chart_M) / m.charts, color="grey", lw=0.8)
    right.set_title("images of a chart; line: even", fontsize=10)


def reconstructions(figure: Any, images: Images, seen: Read) -> None:
    """Held-out images above what is drawn from their code, beside the error of a pixel."""
    places = figure.subplots(4, ROWS)
    for column in range(2 * ROWS):
        row, at = 2 * (column // ROWS), column % ROWS
        if column < len(images.test):
            _image(places[row, at], images.test.x[column])
            _image(places[row + 1, at], seen.drawn[column])
            places[row + 1, at].set_title(f"{seen.chart_M[column]}.{seen.code_M[column]}", fontsize=8)
        else:
            places[row, at].axis("off")
            places[row + 1, at].axis("off")
    error = float(np.square(seen.drawn - images.test.x).mean())
    figure.suptitle(f"held-out images, and below each what is drawn from chart.code; mean square error {error:.4g}")


@torch.no_grad()
def jumps(figure: Any, model: TopoEncoder, seen: Read) -> None:
    """Where jumps land against where they should, and the error of every pair of charts beside a constant's."""
    v, w = torch.from_numpy(seen.point_MD), torch.from_numpy(seen.weight_MN)
    top = w.topk(2, 1).indices
    i, j = top[:, 0], top[:, 1]
    centres = model.atlas.centres
    target = (v - centres[j]).numpy()
    over = model.jumps(v - centres[i], i, j).numpy()
    left, right = figure.subplots(1, 2)
    left.scatter(target.ravel()[:6000], over.ravel()[:6000], s=3, alpha=0.4, lw=0)
    span = [float(target.min()), float(target.max())]
    left.plot(span, span, color="grey", lw=0.8)
    left.set_xlabel("coordinate in the second chart")
    left.set_ylabel("where the jump from the first lands")
    left.set_title("all coordinates of held-out images", fontsize=10)
    n = len(centres)
    table = np.full((n, n), math.nan)
    for a in range(n):
        for b in range(n):
            mine = ((i == a) & (j == b)).numpy()
            if mine.sum() > 2:
                spread = np.square(target[mine] - target[mine].mean(0)).sum()
                table[a, b] = 1 - np.square(over[mine] - target[mine]).sum() / max(float(spread), 1e-12)
    shown = right.imshow(table, vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(shown, ax=right, label="1 - error / error of the best constant")
    right.set_xlabel("to chart")
    right.set_ylabel("from chart")
    right.set_title("pairs that three images have as likeliest two", fontsize=10)


@torch.no_grad()
def samples(figure: Any, model: TopoEncoder, seen: Read) -> None:
    """What is drawn from every chart's codes, the most used first; a row a chart."""
    m = model.config
    counts = np.bincount(seen.chart_M * m.codes + seen.code_M, minlength=m.charts * m.codes).reshape(m.charts, m.codes)
    wide = min(ROWS, m.codes)
    places: Any = figure.subplots(m.charts, wide, squeeze=False)
    for n in range(m.charts):
        order: Any = np.argsort(-counts[n], kind="stable")[:wide].tolist()
        drawn, _ = model.decode(model.atlas.centres[n] + model.atlas.codes[n, order])
        for place, picture, j in zip(places[n], drawn.numpy(), order):
            _image(place, picture)
            place.set_title(str(counts[n, j]), fontsize=6, pad=1)
        places[n, 0].set_ylabel(f"chart {n}", fontsize=8)
    figure.suptitle("drawn from chart and code; above each how many held-out images chose it")


def traces(figure: Any, signals: dict[str, Signal]) -> None:
    """Losses, entropies with their setpoints, weights, rate, held-out numbers, against steps."""
    entropies = ("routing_entropy", "diversity", "chart_code_entropy", "held_route_entropy", "held_usage_entropy",
                 "held_information")  # fmt: skip
    groups: dict[str, list[str]] = {
        "losses": [n for n in ("reconstruction", "vq", "consistency", "orbit", "jump", "probe") if n in signals],
        "entropies, nats; dashed: setpoint": [n for n in entropies if n in signals],
        "weights that are controlled": [n for n in signals if n.startswith("weight_") or n == "commitment"],
        "rate": [n for n in ("lr", "rate_factor") if n in signals],
        "held out": [n for n in ("held_mse", "held_shuffled_mse") if n in signals],
        "held out, against labels": [
            n for n in ("held_accuracy", "held_nmi", "held_ari", "held_probe_accuracy") if n in signals
        ],
    }
    changing = [n for n in groups["weights that are controlled"] if np.ptp(signals[n].values) > 0]
    groups["weights that are controlled"] = changing
    groups = {title: names for title, names in groups.items() if names}
    places = figure.subplots(2, -(-len(groups) // 2), squeeze=False)
    for place in list(places.flat)[len(groups) :]:
        place.set_visible(False)
    for place, (title, names) in zip(places.flat, groups.items()):
        for colour, name in enumerate(names[:10]):
            own = signals[name]
            place.plot(
                own.step, own.values, label=name, lw=1.2, color=f"C{colour}", marker="o" if len(own.step) < 3 else None
            )
            if own.truth is not None:
                place.axhline(float(own.truth), color=f"C{colour}", ls="--", lw=0.8)
        place.set_title(title, fontsize=10)
        place.set_xlabel("steps")
        place.grid(alpha=0.25)
        if title.startswith(("losses", "rate")):
            place.set_yscale("log")
        place.legend(fontsize=7)


def _image(place: Any, picture: NDArray[np.float32]) -> None:
    grey = picture.shape[0] == 1
    place.imshow(picture[0] if grey else picture.transpose(1, 2, 0), cmap="gray" if grey else None, vmin=0, vmax=1)
    place.set_xticks([])
    place.set_yticks([])
