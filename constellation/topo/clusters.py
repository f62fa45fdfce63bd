"""Clusters as baselines: k-means and Gaussian mixtures on pixels or codes, an N2D-like pipeline, VaDE.

All are fitted on training images and name held-out ones; none sees a label.
    n2d    autoencoder, manifold embedding of its codes (Isomap, which embeds new points too), Gaussian mixture
           (McConville et al. 2021, with UMAP there)
    vade   a Gaussian mixture as the prior of a variational autoencoder, begun with an autoencoder and its mixture
           (Jiang et al. 2017)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from constellation.errors import ConfigError
from constellation.topo.autoencoders import Autoencoder
from constellation.train.schedule import learning_rate

NEIGHBOURS, EMBEDDED, LANDMARKS = 10, 5, 1500  # of Isomap: neighbours, dimensions, images it is fitted on
FLOOR = 1e-3  # added to variances of mixtures


def kmeans(train: NDArray, test: NDArray, clusters: int, seed: int) -> NDArray[np.int64]:
    """Clusters of `test`; ten starts, the best kept."""
    found = _sklearn("cluster").KMeans(clusters, n_init=10, random_state=seed).fit(train)
    return np.asarray(found.predict(test), np.int64)


def mixture(train: NDArray, test: NDArray, clusters: int, seed: int) -> NDArray[np.int64]:
    """Clusters of `test` by a Gaussian mixture; full covariances up to 32 dimensions, diagonal ones above."""
    return np.asarray(_mixture(train, clusters, seed).predict(test), np.int64)


def _mixture(train: NDArray, clusters: int, seed: int) -> Any:
    kind = "full" if train.shape[1] <= 32 else "diag"
    model = _sklearn("mixture").GaussianMixture(
        clusters, covariance_type=kind, reg_covar=FLOOR, n_init=3, random_state=seed
    )
    return model.fit(np.asarray(train, np.float64))


def n2d(train: NDArray, test: NDArray, clusters: int, seed: int) -> NDArray[np.int64]:
    """Clusters of `test` from codes of an autoencoder."""
    some = np.random.default_rng(seed).permutation(len(train))[:LANDMARKS]
    embedding = _sklearn("manifold").Isomap(n_neighbors=NEIGHBOURS, n_components=EMBEDDED).fit(train[some])
    return mixture(embedding.transform(train), embedding.transform(test), clusters, seed)


class VaDE(nn.Module):
    """q(z|x) = N(m(x), e^s(x)), p(z) = sum_c pi_c N(mu_c, e^{s_c}); begun from a plain autoencoder."""

    def __init__(self, start: Autoencoder, clusters: int):
        super().__init__()
        self.body = start
        d = start.latent.out_features
        self.spread = nn.Linear(start.latent.in_features, d)
        self.mean = nn.Parameter(torch.zeros(clusters, d))
        self.log_variance = nn.Parameter(torch.zeros(clusters, d))
        self.log_prior = nn.Parameter(torch.full((clusters,), -math.log(clusters)))
        with torch.no_grad():
            self.spread.weight.mul_(0.1)
            self.spread.bias.fill_(-3.0)

    def begin(self, points: NDArray, seed: int) -> None:
        """The mixture of the autoencoder's codes."""
        clusters = len(self.mean)
        found = _sklearn("mixture").GaussianMixture(
            clusters, covariance_type="diag", reg_covar=FLOOR, n_init=3, random_state=seed
        ).fit(np.asarray(points, np.float64))  # fmt: skip
        with torch.no_grad():
            self.mean.copy_(torch.from_numpy(found.means_))
            self.log_variance.copy_(torch.from_numpy(found.covariances_).log())
            self.log_prior.copy_(torch.from_numpy(found.weights_).log())

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.body.encoder(x)
        return self.body.latent(f), self.spread(f).clamp(-10, 5)

    def responsibility(self, z: Tensor) -> Tensor:
        """p(c | z), (B, C)."""
        square = (z[:, None] - self.mean).square() / self.log_variance.exp() + self.log_variance
        return torch.softmax(torch.log_softmax(self.log_prior, 0) - 0.5 * square.sum(2), 1)

    def loss(self, x: Tensor, noise: float) -> Tensor:
        """Negative evidence bound in nats per image, pixels Gaussian with variance `noise`."""
        m, s = self.parts(x)
        z = m + (0.5 * s).exp() * torch.randn_like(m)
        drawn = self.body.renderer(self.body.back(z))
        c = self.responsibility(z)
        pixels = (drawn - x).square().flatten(1).sum(1) / (2 * noise)
        within = self.log_variance + (s.exp()[:, None] + (m[:, None] - self.mean).square()) / self.log_variance.exp()
        prior = torch.log_softmax(self.log_prior, 0)
        choice = (c * (c.clamp(min=1e-10).log() - prior)).sum(1)
        return (pixels + 0.5 * (c * within.sum(2)).sum(1) - 0.5 * (1 + s).sum(1) + choice).mean()


def vade(
    start: Autoencoder, train: Tensor, test: Tensor, clusters: int, *, epochs: int, batch: int, lr: float, seed: int
) -> tuple[NDArray[np.int64], float]:
    """Clusters of `test` and its mean square error; `start` is a trained plain autoencoder and is changed."""
    torch.manual_seed(seed)
    model = VaDE(start, clusters)
    with torch.no_grad():
        points = torch.cat([model.parts(some)[0] for some in train.split(2000)])
        noise = float((start(train[:2000])[0] - train[:2000]).square().mean())
    model.begin(points.numpy(), seed)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    batch, per_epoch = min(batch, len(train)), len(train) // min(batch, len(train))
    for epoch in range(epochs):
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(train)))
        for number in range(per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * per_epoch + number, per_epoch * epochs, lr, 0.02, 0.5)
            optimizer.zero_grad(set_to_none=True)
            model.loss(train[order[number * batch : (number + 1) * batch]], noise).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
    with torch.no_grad():
        m, _ = model.parts(test)
        drawn = model.body.renderer(model.body.back(m))
        return model.responsibility(m).argmax(1).numpy(), float((drawn - test).square().mean())


def _sklearn(part: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"sklearn.{part}")
    except ImportError:
        raise ConfigError("baselines need scikit-learn: pip install 'constellation[topo]'") from None
