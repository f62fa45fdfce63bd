"""Autoencoders as baselines: plain, one-codebook VQ and FSQ, with a TopoEncoder's own encoder and renderer.

    plain   v = W encoder(x), x' = renderer(V v)                continuous, no bits are counted
    vq      v to the nearest of N J codes                       vector-quantize-pytorch: EMA, k-means start, dead codes
    fsq     every coordinate of v to one of a few levels        vector-quantize-pytorch; about N J codes in all

All are as wide as it takes to have at least the TopoEncoder's parameters.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from constellation.errors import ConfigError, RunError
from constellation.topo.networks import Renderer, Shape, encoder
from constellation.train.schedule import learning_rate

KINDS = ("plain", "vq", "fsq")
MOST_LEVELS = 16  # of a coordinate of FSQ


class Autoencoder(nn.Module):
    """One of KINDS, with `codes` codes."""

    def __init__(self, kind: str, network: str, shape: Shape, hidden: int, latent: int, codes: int):
        super().__init__()
        self.kind, self.codes = kind, codes
        levels = fsq_levels(codes)
        width = len(levels) if kind == "fsq" else latent
        self.encoder = encoder(network, shape, hidden)
        self.latent = nn.Linear(hidden, width)
        self.quantiser: Any = _quantiser(kind, width, codes, levels)
        self.back = nn.Linear(width, hidden)
        self.renderer = Renderer(network, shape, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Drawn images, points v (B, D), code numbers (B,), zeros for plain, and the commitment loss."""
        v = self.latent(self.encoder(x))
        index, pull = torch.zeros(len(x), dtype=torch.long), v.new_zeros(())
        z = v
        if self.kind == "vq":
            z, index, pull = self.quantiser(v[:, None])
            z, index, pull = z[:, 0], index[:, 0], pull.sum()
        elif self.kind == "fsq":
            z, index = self.quantiser(v[:, None])
            z, index = z[:, 0], index[:, 0].long()
        return self.renderer(self.back(z)), v, index, pull


def _quantiser(kind: str, width: int, codes: int, levels: list[int]) -> Any:
    if kind == "plain":
        return None
    try:
        from vector_quantize_pytorch import FSQ, VectorQuantize
    except ImportError:
        raise ConfigError(f"{kind} needs vector-quantize-pytorch: pip install 'constellation[topo]'") from None
    if kind == "fsq":
        return FSQ(levels=levels)
    return VectorQuantize(
        dim=width, codebook_size=codes, kmeans_init=True, threshold_ema_dead_code=1, commitment_weight=0.25, decay=0.9
    )


def fsq_levels(codes: int) -> list[int]:
    """Three or four numbers of levels, 3 at least, whose product is the nearest to `codes` from below."""
    best: tuple[int, ...] = (3, 3, 3)
    for count in (3, 4):
        for some in combinations_with_replacement(range(3, MOST_LEVELS + 1), count):
            if math.prod(best) < math.prod(some) <= codes:
                best = some
    return sorted(best, reverse=True)


def as_wide_as(size: int, kind: str, network: str, shape: Shape, latent: int, codes: int) -> int:
    """The least hidden width, in steps of 4, with at least `size` parameters, the codebook counted."""
    for hidden in range(8, 4096, 4):
        with torch.random.fork_rng(devices=[]):
            model = Autoencoder(kind, network, shape, hidden, latent, codes)
        count = sum(p.numel() for p in model.parameters()) + (codes * latent if kind == "vq" else 0)
        if count >= size:
            return hidden
    raise ConfigError(f"no width up to 4096 has {size} parameters")


def fit(model: Autoencoder, x: Tensor, *, epochs: int, batch: int, lr: float, seed: int, decay: float = 0.5) -> None:
    """Train with Adam and the schedule of a TopoEncoder, on error over variance and commitment."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    variance, batch = float((x - x.mean(0)).square().mean()), min(batch, len(x))
    per_epoch = len(x) // batch
    model.train()
    for epoch in range(epochs):
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(x)))
        for number in range(per_epoch):
            step = epoch * per_epoch + number
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, per_epoch * epochs, lr, 0.02, decay)
            some = x[order[number * batch : (number + 1) * batch]]
            drawn, _, _, pull = model(some)
            loss = F.mse_loss(drawn, some) / variance + pull
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        if not math.isfinite(float(loss.detach())):
            raise RunError(f"{model.kind}: loss {float(loss.detach())} in epoch {epoch}; lower its learning rate")
    model.eval()


@torch.no_grad()
def read(model: Autoencoder, x: NDArray[np.float32]) -> tuple[NDArray, NDArray[np.float32], NDArray[np.int64]]:
    """Drawn images, points (M, D) and codes (M,) of all images."""
    parts = [model(some)[:3] for some in torch.from_numpy(x).split(2000)]
    drawn, points, codes = (torch.cat(column).numpy() for column in zip(*parts))
    return drawn, points, codes


def numbers(model: Autoencoder, x: NDArray[np.float32]) -> dict[str, float]:
    """mse, and of a quantiser its empirical bits, bits at most and codes used."""
    drawn, _, codes = read(model, x)
    found = {"mse": float(np.square(drawn - x).mean()), "parameters": float(sum(p.numel() for p in model.parameters()))}
    if model.kind != "plain":
        p = np.bincount(codes) / len(codes)
        p = p[p > 0]
        most = model.codes if model.kind == "vq" else math.prod(fsq_levels(model.codes))
        found |= {"bits": float(-(p * np.log2(p)).sum()), "index_bits": math.log2(most), "codes_used": float(len(p))}
    return found
