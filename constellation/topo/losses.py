"""The losses of a TopoEncoder, each a function of one batch as it was seen; all are scalars, at least 0.

H is entropy in nats, over soft weights, so that it has a gradient: K a chart, J a code, w (B, N) the encoder's weights
of charts, s (B, N, J) soft codes, softmax(-d^2 / mean d^2) within each chart. LOSSES names them as `topo.loss.*` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from constellation.topo.model import Encoded, TopoEncoder
from constellation.topo.settings import Loss

TINY = 1e-8
JUMPING = 64  # images of a batch that jumps are trained on


def entropy(p: Tensor, dim: int = -1) -> Tensor:
    """-sum p log p, nats, from 0 of one-hot to log n of uniform."""
    return -(p * p.clamp(min=TINY).log()).sum(dim)


@dataclass(frozen=True, eq=False)
class Seen:
    """One batch: the images, what they were read as, what was drawn again."""

    model: TopoEncoder
    settings: Loss
    x: Tensor
    y: Tensor | None
    encoded: Encoded
    drawn: Tensor
    back_BN: Tensor  # the decoder's weights of charts
    variance: float  # of the training pixels about their mean image
    view: tuple[Tensor, Tensor] | None = None  # weights and points of the moved images

    @cached_property
    def usage_N(self) -> Tensor:
        """p(K), (N,)."""
        return self.encoded.weight_BN.mean(0)

    @cached_property
    def soft_codes_BNJ(self) -> Tensor:
        d = self.encoded.placed.distance_BNJ
        return torch.softmax(-d / d.detach().amin(2, keepdim=True).mean().clamp(min=TINY), 2)

    @cached_property
    def joint_NJ(self) -> Tensor:
        """p(chart, code), (N, J)."""
        return (self.encoded.weight_BN[:, :, None] * self.soft_codes_BNJ).mean(0)

    @cached_property
    def class_BY(self) -> Tensor:
        """p(y | x) = sum_k w_k p(y | k), (B, Y)."""
        return self.encoded.weight_BN @ self.class_NY

    @cached_property
    def class_NY(self) -> Tensor:
        return torch.softmax(self.model.table / self.settings.temperature, 1)


def reconstruction(seen: Seen) -> Tensor:
    """Mean square error over the pixels' variance: 1 is what the mean image explains, 0 all of it."""
    return (seen.drawn - seen.x).square().mean() / seen.variance


def vq(seen: Seen) -> Tensor:
    """|sg v - z|^2 + commitment |v - sg z|^2, mean over dimensions (van den Oord et al. 2017)."""
    v, z = seen.encoded.v_BD, seen.encoded.placed.nearest_BD
    return F.mse_loss(z, v.detach()) + seen.settings.commitment * F.mse_loss(v, z.detach())


def routing_entropy(seen: Seen) -> Tensor:
    """H(K|X), [0, log N]."""
    return entropy(seen.encoded.weight_BN).mean()


def diversity(seen: Seen) -> Tensor:
    """log N - H(K), [0, log N]."""
    return math.log(len(seen.usage_N)) - entropy(seen.usage_N)


def information(seen: Seen) -> Tensor:
    """I(X; K) = H(K) - H(K|X), [0, log N]; what `window` bounds."""
    return entropy(seen.usage_N) - entropy(seen.encoded.weight_BN).mean()


def window(seen: Seen) -> Tensor:
    """relu(window_nats - I(X;K))^2."""
    return F.relu(seen.settings.window_nats - information(seen)).square()


def consistency(seen: Seen) -> Tensor:
    """KL(encoder's charts || decoder's)."""
    w = seen.encoded.weight_BN
    return (w * (w.clamp(min=TINY).log() - seen.back_BN.clamp(min=TINY).log())).sum(1).mean().clamp(min=0)


def variance(seen: Seen) -> Tensor:
    """Mean over dimensions of relu(1 - standard deviation of v) (Bardes et al. 2022)."""
    return F.relu(1 - (seen.encoded.v_BD.var(0) + 1e-4).sqrt()).mean()


def _apart(points_ND: Tensor, margin: float) -> Tensor:
    """Mean over pairs of relu(margin - distance)^2."""
    n = len(points_ND)
    square = (points_ND[:, None] - points_ND[None]).square().sum(2) + 1e-6
    pairs = F.relu(margin - square.sqrt()).square() * (1 - torch.eye(n))
    return pairs.sum() / (n * (n - 1))


def chart_separation(seen: Seen) -> Tensor:
    """Of the mean points of charts, those nearer than the margin."""
    w = seen.encoded.weight_BN
    means_ND = (w.T @ seen.encoded.v_BD) / (w.sum(0)[:, None] + TINY)
    return _apart(means_ND, seen.settings.margin)


def centre_separation(seen: Seen) -> Tensor:
    """The same of the charts' centres."""
    return _apart(seen.model.atlas.centres, seen.settings.margin)


def centring(seen: Seen) -> Tensor:
    """Mean square of each codebook's mean: codes are coordinates around their centre."""
    return seen.model.atlas.codes.mean(1).square().mean()


def residual(seen: Seen) -> Tensor:
    """Mean square of v - c in the chosen chart."""
    return seen.encoded.placed.local_BD.square().mean()


def chart_code_entropy(seen: Seen) -> Tensor:
    """log J - H(J|K), [0, log J]."""
    p_NJ = seen.joint_NJ
    return math.log(p_NJ.shape[1]) - (entropy(p_NJ.flatten()) - entropy(p_NJ.sum(1))).clamp(min=0)


def code_entropy(seen: Seen) -> Tensor:
    """log NJ - H(K, J), [0, log NJ]."""
    return math.log(seen.joint_NJ.numel()) - entropy(seen.joint_NJ.flatten())


def disentangle(seen: Seen) -> Tensor:
    """|Cov(w, |m|)|^2: the nuisance's size tells nothing of the chart."""
    size = (seen.encoded.nuisance_BC.square().sum(1) + TINY).sqrt()
    w = seen.encoded.weight_BN
    return ((w - w.mean(0)) * (size - size.mean())[:, None]).mean(0).square().sum()


def orthogonality(seen: Seen) -> Tensor:
    """Variance of the log singular values of v less its mean: 0 when all directions are used alike."""
    v = seen.encoded.v_BD - seen.encoded.v_BD.mean(0)
    covariance = v.T @ v / len(v) + 1e-6 * torch.eye(v.shape[1])
    return (0.5 * torch.linalg.eigvalsh(covariance).clamp(min=TINY).log()).var()


def rate(seen: Seen) -> Tensor:
    """Nats of nuisance and texture per pixel of the image."""
    return seen.encoded.rate_bits_B.mean() * math.log(2) / seen.x[0].numel()


def orbit(seen: Seen) -> Tensor:
    """(KL(w || w') + KL(w' || w)) / 2 between an image and one that was moved (Hu et al. 2017, IMSAT)."""
    assert seen.view is not None
    w, other = seen.encoded.weight_BN, seen.view[0]
    gap = w.clamp(min=TINY).log() - other.clamp(min=TINY).log()
    return 0.5 * ((w - other) * gap).sum(1).mean()


def invariance(seen: Seen) -> Tensor:
    """Mean square between the points of an image and of one that was moved."""
    assert seen.view is not None
    return F.mse_loss(seen.view[1], seen.encoded.v_BD)


def jump(seen: Seen) -> Tensor:
    """Jumps into the second chart that miss its coordinates, L_ii that are not 1, L_jk L_ij that are not L_ik.

    i, j, k are the three likeliest charts of an image, where charts overlap; JUMPING images. Trains the jumps alone.
    """
    jumps, centres = seen.model.jumps, seen.model.atlas.centres.detach()
    v = seen.encoded.v_BD.detach()[:JUMPING]
    top = seen.encoded.weight_BN.detach()[:JUMPING].topk(min(3, len(centres)), 1).indices
    i, j, k = top[:, 0], top[:, 1], top[:, -1]
    u = v - centres[i]
    between = jumps.enter(u, i)
    over = jumps.leave(between, j)
    miss = F.mse_loss(over, v - centres[j])
    same = F.mse_loss(jumps.leave(between, i), u)
    round_about = F.mse_loss(jumps(over, j, k), jumps.leave(between, k))
    return miss + same + round_about


def supervised(seen: Seen) -> Tensor:
    """-log p(y | x) through the charts, nats."""
    assert seen.y is not None
    return F.nll_loss(seen.class_BY.clamp(min=TINY).log(), seen.y)


def purity(seen: Seen) -> Tensor:
    """H(Y|K) under p(y|k) and the batch's use of charts, nats."""
    return (seen.usage_N * entropy(seen.class_NY)).sum()


def balance(seen: Seen) -> Tensor:
    """KL(mean p(y|x) || labels of the batch), nats."""
    assert seen.y is not None
    said = seen.class_BY.mean(0)
    true = torch.bincount(seen.y, minlength=len(said)) / len(seen.y)
    return (said * (said.clamp(min=TINY).log() - true.clamp(min=1e-3).log())).sum().clamp(min=0)


def metric(seen: Seen) -> Tensor:
    """Of points of different classes, those nearer than the margin: mean relu(margin - distance)^2."""
    assert seen.y is not None
    v = seen.encoded.v_BD
    differ = seen.y[:, None] != seen.y[None]
    distance = ((v[:, None] - v[None]).square().sum(2) + 1e-6).sqrt()
    return (F.relu(seen.settings.margin - distance).square() * differ).sum() / differ.sum().clamp(min=1)


LOSSES: dict[str, Callable[[Seen], Tensor]] = {
    one.__name__: one
    for one in (
        reconstruction, vq, routing_entropy, diversity, consistency, variance, chart_separation, centre_separation,
        centring, residual, window, chart_code_entropy, code_entropy, disentangle, orthogonality, rate, orbit,
        invariance, jump, supervised, purity, balance, metric,
    )
}  # fmt: skip
VIEWS = ("orbit", "invariance")
LABELS = ("supervised", "purity", "balance", "metric")


def weights_of(settings: Loss, nuisance: int, texture: int) -> dict[str, float]:
    """Weight of each loss that can act: without a nuisance nothing is disentangled, without supervision no label read.

    Those of weight 0 are left out.
    """
    found = {name: float(getattr(settings, name)) for name in LOSSES}
    if not nuisance:
        found["disentangle"] = 0.0
    if not nuisance + texture:
        found["rate"] = 0.0
    if not settings.supervised:
        found |= dict.fromkeys(LABELS, 0.0)
    return {name: weight for name, weight in found.items() if weight}
