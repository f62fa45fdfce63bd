"""What a model's outputs say about its targets: p(y | f) for a row f of V outputs, and its Fisher metric.

softmax    one class of V, p = softmax f              score p - e_y                   metric diag p - p p^T
gaussian   V reals of unit variance, mean f           score f - y                     metric 1
bernoulli  V independent bits, p = sigmoid f          score p - y                     metric diag p (1 - p)

The score is the gradient of -log p(y | f) in f; the metric H = E_{y ~ p} score score^T is also the Hessian of
-log p(y | f), because f are natural parameters (Amari 1998; Martens 2020, section 9). S is a root, H = S S^T; for
softmax S = diag(sqrt p) - p sqrt(p)^T. Every function takes rows on the leading axes and V on the last; means m are
what `mean` gives. Another scale than these (a weighted residual, a variance) is a factor on the outputs: a loss
sum_n c_n |f_n - y_n|^2 / 2 is `gaussian` on the outputs sqrt(c_n) f_n and targets sqrt(c_n) y_n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from constellation.errors import ConfigError


class Likelihood(ABC):
    """p(y | f). Shapes: f, m, w (..., V); y (...) class numbers for softmax, else (..., V); results as said."""

    @abstractmethod
    def mean(self, f: Tensor) -> Tensor:
        """m = E[y | f], (..., V)."""

    @abstractmethod
    def metric(self, m: Tensor, w: Tensor) -> Tensor:
        """H w, (..., V)."""

    @abstractmethod
    def root(self, m: Tensor, w: Tensor) -> Tensor:
        """S w, (..., V)."""

    @abstractmethod
    def root_transposed(self, m: Tensor, w: Tensor) -> Tensor:
        """S^T w, (..., V)."""

    @abstractmethod
    def score(self, m: Tensor, y: Tensor) -> Tensor:
        """Gradient of -log p(y | f) in f, (..., V)."""

    @abstractmethod
    def residual(self, m: Tensor, y: Tensor) -> Tensor:
        """The shortest r with S r = score, (..., V): what least squares calls the residual."""

    @abstractmethod
    def draw(self, m: Tensor, generator: torch.Generator | None) -> Tensor:
        """y ~ p(y | f), one for each row."""

    @abstractmethod
    def loss_nats(self, f: Tensor, y: Tensor) -> Tensor:
        """-log p(y | f) up to a constant in f, (...)."""

    @abstractmethod
    def divergence_nats(self, f: Tensor, g: Tensor) -> Tensor:
        """KL(p(. | f) || p(. | g)), (...), >= 0."""


class Softmax(Likelihood):
    """One class of V. A class of probability 0 has no part in S and H; a target there has a residual of its own."""

    def mean(self, f: Tensor) -> Tensor:
        return f.softmax(-1)

    def metric(self, m: Tensor, w: Tensor) -> Tensor:
        mw = m * w
        return mw.addcmul_(m, mw.sum(-1, keepdim=True), value=-1)

    def root(self, m: Tensor, w: Tensor) -> Tensor:
        sw = m.sqrt() * w
        return sw - m * sw.sum(-1, keepdim=True)

    def root_transposed(self, m: Tensor, w: Tensor) -> Tensor:
        return m.sqrt() * (w - (m * w).sum(-1, keepdim=True))

    def score(self, m: Tensor, y: Tensor) -> Tensor:
        return m.scatter_add(-1, y[..., None], m.new_full((), -1).expand(*y.shape, 1))

    def residual(self, m: Tensor, y: Tensor) -> Tensor:
        s = m.sqrt()
        own = s.gather(-1, y[..., None]).clamp_min(torch.finfo(m.dtype).tiny)
        return s.scatter_add(-1, y[..., None], -1 / own)  # s - e_y / s_y: orthogonal to s, the null vector of S

    def draw(self, m: Tensor, generator: torch.Generator | None) -> Tensor:
        # a race of exponential clocks of rates m; unlike torch.multinomial it has no limit on V and no wait on a GPU
        return (m / torch.empty_like(m).exponential_(generator=generator)).argmax(-1)

    def loss_nats(self, f: Tensor, y: Tensor) -> Tensor:
        return f.logsumexp(-1) - f.gather(-1, y[..., None])[..., 0]

    def divergence_nats(self, f: Tensor, g: Tensor) -> Tensor:
        log_p, log_q = f.log_softmax(-1), g.log_softmax(-1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


class Gaussian(Likelihood):
    """V reals of unit variance around f."""

    def mean(self, f: Tensor) -> Tensor:
        return f

    def metric(self, m: Tensor, w: Tensor) -> Tensor:
        return w

    root = root_transposed = metric

    def score(self, m: Tensor, y: Tensor) -> Tensor:
        return m - y

    residual = score

    def draw(self, m: Tensor, generator: torch.Generator | None) -> Tensor:
        return m + torch.randn(m.shape, generator=generator, dtype=m.dtype, device=m.device)

    def loss_nats(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).square().sum(-1) / 2

    def divergence_nats(self, f: Tensor, g: Tensor) -> Tensor:
        return (f - g).square().sum(-1) / 2


class Bernoulli(Likelihood):
    """V independent bits of probability sigmoid f; y may be any numbers in [0, 1]."""

    def mean(self, f: Tensor) -> Tensor:
        return f.sigmoid()

    def metric(self, m: Tensor, w: Tensor) -> Tensor:
        return m * (1 - m) * w

    def root(self, m: Tensor, w: Tensor) -> Tensor:
        return (m * (1 - m)).sqrt() * w

    root_transposed = root

    def score(self, m: Tensor, y: Tensor) -> Tensor:
        return m - y

    def residual(self, m: Tensor, y: Tensor) -> Tensor:
        return (m - y) / (m * (1 - m)).sqrt().clamp_min(torch.finfo(m.dtype).tiny)

    def draw(self, m: Tensor, generator: torch.Generator | None) -> Tensor:
        return (torch.rand(m.shape, generator=generator, dtype=m.dtype, device=m.device) < m).to(m.dtype)

    def loss_nats(self, f: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(f, y.to(f.dtype), reduction="none").sum(-1)

    def divergence_nats(self, f: Tensor, g: Tensor) -> Tensor:
        p = f.sigmoid()
        return (p * (F.logsigmoid(f) - F.logsigmoid(g)) + (1 - p) * (F.logsigmoid(-f) - F.logsigmoid(-g))).sum(-1)


LIKELIHOODS: dict[str, Likelihood] = {"softmax": Softmax(), "gaussian": Gaussian(), "bernoulli": Bernoulli()}


def likelihood(name: str) -> Likelihood:
    """The likelihood called `name`: softmax, gaussian or bernoulli."""
    if name not in LIKELIHOODS:
        raise ConfigError(f"likelihood={name!r}: choose one of {', '.join(LIKELIHOODS)}")
    return LIKELIHOODS[name]
