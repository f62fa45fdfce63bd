"""The models and data of `bench optim`'s tasks that are not the kernel's: basin block, digits, valleys, Poisson.

Everything is a function of a seed; nothing is downloaded.
"""

from __future__ import annotations

import gzip
import math
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from constellation.errors import DataError
from constellation.geometry.fisher import jacobian_rows
from constellation.kernel.model import KernelLM


class FactorisedEmbedding(nn.Module):
    """Token t -> B c_t: coordinates c (V, n) in the basin, a map B (D, n) to the model; `weight` = c B^T (V, D)."""

    def __init__(self, vocab: int, coordinates: int, width: int, generator: torch.Generator):
        super().__init__()
        self.basin_coords = nn.Parameter(torch.empty(vocab, coordinates).normal_(0, 1, generator=generator))
        self.basin_to_model = nn.Linear(coordinates, width, bias=False)
        with torch.no_grad():  # entries of the product keep the kernel's scale, width^-1/2
            self.basin_to_model.weight.normal_(0, (coordinates * width) ** -0.5, generator=generator)

    @property
    def weight(self) -> Tensor:
        return F.linear(self.basin_coords, self.basin_to_model.weight)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        out: Tensor = self.basin_to_model(F.embedding(tokens_BT, self.basin_coords))
        return out


def factorise(model: KernelLM, coordinates: int, seed: int) -> None:
    """Give `model` an embedding (and tied head) of rank `coordinates`."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    block = FactorisedEmbedding(config.vocab_size, coordinates, config.width, generator)
    model.embedding = block  # type: ignore[assignment]


def autoencoder(pixels: int, seed: int) -> nn.Module:
    """pixels - 256 - 128 - 64 - 12 - 64 - 128 - 256 - logits, tanh (after Hinton & Salakhutdinov 2006)."""
    widths = [pixels, 256, 128, 64, 12, 64, 128, 256, pixels]
    generator, layers = torch.Generator().manual_seed(seed), list[nn.Module]()
    for i, (a, b) in enumerate(pairwise(widths)):
        layer = nn.Linear(a, b)
        with torch.no_grad():
            layer.weight.normal_(0, a**-0.5, generator=generator)
            layer.bias.zero_()
        layers += [layer] if i == len(widths) - 2 else [layer, nn.Tanh()]
    return nn.Sequential(*layers)


def read_digits(folder: Path | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(train, dev) binary images (N, pixels): scikit-learn's digits, or a folder of IDX image files (.gz or not)."""
    if folder is None:
        from sklearn.datasets import load_digits

        images = load_digits().data / 16
    else:
        files = sorted(p for p in folder.glob("*idx3-ubyte*"))
        if not files:
            raise DataError(f"--digits {folder}: no *idx3-ubyte* file in it; leave the option out for built-in digits")
        images = np.concatenate([_read_idx(p) for p in files])[:10_000] / 255
    images = (images > 0.5).astype(np.float32)[np.random.default_rng(0).permutation(len(images))]
    held = len(images) // 6
    return images[held:], images[:held]


def _read_idx(path: Path) -> NDArray[np.uint8]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    magic, count, rows, columns = struct.unpack(">IIII", data[:16])
    if magic != 2051 or len(data) != 16 + count * rows * columns:
        raise DataError(f"{path}: not an IDX file of images; give MNIST's *-images-idx3-ubyte[.gz]")
    return np.frombuffer(data, np.uint8, offset=16).reshape(count, rows * columns)


def logistic_data(seed: int, rows: int = 1000, features: int = 30) -> tuple[Tensor, Tensor, float]:
    """x (N, D), labels (N,) and the least mean nats; x's singular values fall over three decades, in a rotated basis.

    Labels are drawn from a planted model whose logits have unit variance, so the optimum is finite.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64)).Q
    scale = torch.logspace(0, -3, features, dtype=torch.float64)
    planted = torch.randn(features, generator=generator, dtype=torch.float64) / math.sqrt(features)
    y = (torch.rand(rows, generator=generator, dtype=torch.float64) < torch.sigmoid(x @ planted)).long()
    w = torch.zeros(features, dtype=torch.float64)
    for _ in range(30):  # Newton in the well-conditioned basis: the optimum does not depend on the basis
        p = torch.sigmoid(x @ w)
        w += torch.linalg.solve((x * (p * (1 - p))[:, None]).T @ x, x.T @ (y - p))
    optimum = float(F.binary_cross_entropy_with_logits(x @ w, y.double()))
    return (x * scale) @ rotation.T, y, optimum


class Valley(nn.Module):
    """Residuals 10 (x_{i+1} - x_i^2) and 1 - x_i of Rosenbrock's chained valley, from about (-1.2, 1, -1.2, ...)."""

    def __init__(self, seed: int, dims: int = 16):
        super().__init__()
        start = torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat(dims // 2)
        noise = torch.randn(dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.x = nn.Parameter(start + 0.05 * noise)

    def forward(self, nothing: Tensor) -> Tensor:
        return torch.cat((10 * (self.x[1:] - self.x[:-1] ** 2), 1 - self.x[:-1]))[:, None]

    def jacobian(self) -> Tensor:
        """d residuals / d x, (R, 1, dims)."""
        step, diagonal = torch.eye(len(self.x), dtype=self.x.dtype), torch.diag(20 * self.x.detach())
        return torch.cat((10 * step[1:] - diagonal[:-1], -step[:-1]))[:, None]


class Poisson(nn.Module):
    """-Laplace u = f on the unit square, u = 0 on its edge, u = sin(pi x) sin(pi y); a tanh network 2-32-32-1.

    `forward(points)` are the residuals (N + M, 1): (Laplace u + f) / sqrt(N) inside, 10 u / sqrt(M) on the edge, so
    that |r|^2 is a mean. Laplace u is carried forward through the layers with value and gradient (Li et al. 2023).
    """

    INSIDE, EDGE = 400, 100
    points: Tensor

    def __init__(self, seed: int, width: int = 32):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.layers = nn.ParameterList(
            p for a, b in pairwise([2, width, width, 1]) for p in (normal(b, a, scale=a**-0.5), normal(b, scale=0.1))
        )
        inside = torch.rand(self.INSIDE, 2, generator=generator, dtype=torch.float64)
        edge = torch.rand(self.EDGE, 2, generator=generator, dtype=torch.float64)
        side = torch.randint(0, 4, (self.EDGE,), generator=generator)
        edge[torch.arange(self.EDGE), side // 2] = (side % 2).double()
        self.register_buffer("points", torch.cat((inside, edge)))

    def forward(self, points: Tensor) -> Tensor:
        layers, n = tuple(self.layers), self.INSIDE
        return torch.cat((_inside(*layers, points[:n]), _edge(*layers, points[n:])))[:, None]

    def jacobian(self) -> Tensor:
        """d residuals / d parameters, (N + M, 1, P): points do not mix, so one vectorised pass."""
        params, n = tuple(self.layers), self.INSIDE
        parts = (_inside, self.points[:n]), (_edge, self.points[n:])
        return torch.cat([jacobian_rows(lambda p, x, f=f: f(*p, x[None]), params, x) for f, x in parts])

    @torch.no_grad()
    def error(self) -> float:
        """Relative L2 distance from the solution on a 51 x 51 grid."""
        axis = torch.linspace(0, 1, 51, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
        exact = solution(grid)
        return float((_field(*self.layers, grid)[0] - exact).norm() / exact.norm())


def _field(*layers_and_points: Tensor) -> tuple[Tensor, Tensor]:
    """u and Laplace u at points (N, 2), each (N,); before the points the weights and biases in turn."""
    *layers, x_N2 = layers_and_points
    value, slope, laplace = x_N2, torch.eye(2, dtype=x_N2.dtype).expand(len(x_N2), 2, 2), torch.zeros_like(x_N2)
    for i in range(0, len(layers), 2):
        w, b = layers[i], layers[i + 1]
        value, slope, laplace = value @ w.T + b, slope @ w.T, laplace @ w.T
        if i < len(layers) - 2:
            value = torch.tanh(value)
            first = 1 - value * value
            laplace = first * laplace - 2 * value * first * slope.square().sum(1)
            slope = first[:, None] * slope
    return value[:, 0], laplace[:, 0]


def _inside(*layers_and_points: Tensor) -> Tensor:
    _, laplace = _field(*layers_and_points)
    return (laplace + 2 * math.pi**2 * solution(layers_and_points[-1])) / math.sqrt(Poisson.INSIDE)


def _edge(*layers_and_points: Tensor) -> Tensor:
    u, _ = _field(*layers_and_points)
    return 10 * u / math.sqrt(Poisson.EDGE)


def solution(x_N2: Tensor) -> Tensor:
    return torch.sin(math.pi * x_N2[:, 0]) * torch.sin(math.pi * x_N2[:, 1])
