"""What a TopoEncoder is measured by on images: error, bits, charts and codes used, clusters, jumps, the probe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from constellation.topo.images import Split
from constellation.topo.losses import entropy
from constellation.topo.model import TopoEncoder
from constellation.topo.scores import scores

AT_ONCE = 2000  # images of a pass


@dataclass(frozen=True, eq=False)
class Read:
    """All images of a part as they were read, in order."""

    chart_M: NDArray[np.int64]
    code_M: NDArray[np.int64]
    weight_MN: NDArray[np.float32]
    point_MD: NDArray[np.float32]  # v
    code_point_MD: NDArray[np.float32]  # z
    drawn: NDArray[np.float32]
    bits: float  # of nuisance and texture, mean


@torch.no_grad()
def read(model: TopoEncoder, x: NDArray[np.float32], bias: Tensor | None = None, seed: int = 0) -> Read:
    """Every image read and drawn again; the channels' noise is drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[tuple[Tensor, ...]] = []
    for some in torch.from_numpy(x).split(AT_ONCE):
        seen = model.encode(some, bias)
        drawn, _ = model.decode(seen.placed.nearest_BD, model.sent(seen, generator))
        placed = seen.placed
        parts.append(
            (placed.chart_B, placed.code_B, seen.weight_BN, seen.v_BD, placed.nearest_BD, drawn, seen.rate_bits_B)
        )
    whole: list[Any] = [torch.cat(column).numpy() for column in zip(*parts)]
    chart, code, weight, point, code_point, drawn, bits = whole
    return Read(chart, code, weight, point, code_point, drawn, float(bits.mean()))


def evaluate(model: TopoEncoder, part: Split, bias: Tensor | None = None) -> dict[str, float]:
    """Numbers by name; those against labels where there are any.

    mse                 mean square error of a pixel, [0, 1]
    shuffled_mse        the same when every image is drawn from another image's chart and code, its channels its own
    mean_mse            of the mean image of the part: what no code at all explains
    bits, index_bits    empirical entropy of (chart, code) and channels; log2(N J) and channels
    route_entropy, usage_entropy, information    H(K|X), H(K), I(X;K) of the weights, nats
    charts_used, codes_used                      that at least one image chose
    jump_r2             1 - squared error of jumps into the second chart / that of the best constant for each pair
    jump_identity       mean square of L_ii(u) - u over that of u
    jump_cocycle        mean square of L_jk L_ij(u) - L_ik(u) over that of L_ik(u) about its mean
    """
    r = read(model, part.x, bias)
    m = model.config
    counts = np.bincount(r.chart_M * m.codes + r.code_M, minlength=m.charts * m.codes)
    p = counts[counts > 0] / counts.sum()
    order = np.random.default_rng(0).permutation(len(part.x))
    w = torch.from_numpy(r.weight_MN)
    usage = float(entropy(w.mean(0)))
    route = float(entropy(w).mean())
    found = {
        "mse": float(np.square(r.drawn - part.x).mean()),
        "shuffled_mse": float(np.square(_redrawn(model, part.x, r, order) - part.x).mean()),
        "mean_mse": float(np.square(part.x - part.x.mean(0)).mean()),
        "bits": float(-(p * np.log2(p)).sum()) + r.bits,
        "index_bits": math.log2(m.charts * m.codes) + r.bits,
        "route_entropy": route, "usage_entropy": usage, "information": usage - route,
        "charts_used": float((counts.reshape(m.charts, -1).sum(1) > 0).sum()), "codes_used": float((counts > 0).sum()),
        **jumps(model, r),
    }  # fmt: skip
    if part.y is not None:
        found |= scores(r.chart_M, part.y)
        with torch.no_grad():
            said = model.probe(torch.from_numpy(r.code_point_MD)).argmax(1).numpy()
            through = (w @ torch.softmax(model.table, 1)).argmax(1).numpy()
        found["probe_accuracy"] = float((said == part.y).mean())
        found["chart_accuracy"] = float((through == part.y).mean())
    return found


@torch.no_grad()
def _redrawn(model: TopoEncoder, x: NDArray[np.float32], r: Read, order: NDArray[np.int64]) -> NDArray[np.float32]:
    """Every image drawn from the code of image order[i]; what its own channels carry stays its own."""
    generator = torch.Generator().manual_seed(0)
    points, parts = torch.from_numpy(r.code_point_MD[order]), []
    for some, point in zip(torch.from_numpy(x).split(AT_ONCE), points.split(AT_ONCE), strict=True):
        parts.append(model.decode(point, model.sent(model.encode(some), generator))[0])
    whole: NDArray[np.float32] = torch.cat(parts).numpy()
    return whole


@torch.no_grad()
def jumps(model: TopoEncoder, r: Read) -> dict[str, float]:
    """How jumps between an image's likeliest charts do (`evaluate`)."""
    v, w = torch.from_numpy(r.point_MD), torch.from_numpy(r.weight_MN)
    top = w.topk(min(3, w.shape[1]), 1).indices
    i, j, k = top[:, 0], top[:, 1], top[:, -1]
    centres = model.atlas.centres
    u, target = v - centres[i], v - centres[j]
    over = model.jumps(u, i, j)
    pair = i * len(centres) + j
    sums = torch.zeros(len(centres) ** 2, u.shape[1]).index_add_(0, pair, target)
    best = (sums / torch.bincount(pair, minlength=len(sums)).clamp(min=1)[:, None])[pair]
    straight = model.jumps(u, i, k)
    spread = (straight - straight.mean(0)).square().sum().clamp(min=1e-12)
    return {
        "jump_r2": 1 - float((over - target).square().sum() / (best - target).square().sum().clamp(min=1e-12)),
        "jump_identity": float((model.jumps(u, i, i) - u).square().sum() / u.square().sum().clamp(min=1e-12)),
        "jump_cocycle": float((model.jumps(over, j, k) - straight).square().sum() / spread),
    }
