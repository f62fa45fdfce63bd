"""The settings of a TopoEncoder, `topo.*` of the configuration: model, weights of the losses, controllers, training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from constellation.errors import ConfigError
from constellation.settings import Count, NotNegative, Part, Positive, Whole, says


@dataclass(frozen=True)
class Model:
    """Encoder, atlas and decoder (topo/model.py)."""

    encoder: Annotated[Literal["flat", "conv"], says("of the image: two layers over all pixels, or convolutions")] = (
        "flat"
    )
    hidden: Annotated[Count, says("H, width of encoder and renderer")] = 128
    latent: Annotated[Count, says("D, dimensions of a chart")] = 8
    charts: Annotated[Count, says("N, charts of the atlas")] = 10
    codes: Annotated[Count, says("J, codes of each chart's codebook")] = 21
    router: Annotated[
        Literal["plain", "covariant"], says("scores of charts: q.k / t, or k transported to the point, t in bounds")
    ] = "covariant"
    keys: Annotated[Count, says("channels of a router's query and keys")] = 8
    nuisance: Annotated[Whole, says("channels of the structured nuisance, charged in bits; 0: none")] = 0
    texture: Annotated[Whole, says("channels of the texture path, charged in bits; 0: none")] = 0
    rank: Annotated[Count, says("r, of the space that jumps between charts go through")] = 8


@dataclass(frozen=True)
class Loss:
    """Weights of the losses (topo/losses.py); 0: reported and not minimised."""

    reconstruction: Annotated[NotNegative, says("of the unexplained part of the pixels' variance")] = 1.0
    vq: Annotated[NotNegative, says("of codes and points that stay with each other")] = 1.0
    commitment: Annotated[NotNegative, says("share of the points' pull in it")] = 0.25
    routing_entropy: Annotated[NotNegative, says("of H(K|X), nats")] = 0.3
    diversity: Annotated[NotNegative, says("of log N - H(K), nats")] = 1.0
    consistency: Annotated[NotNegative, says("of KL(encoder's charts || decoder's), nats")] = 0.1
    variance: Annotated[NotNegative, says("of latent deviations below 1")] = 0.1
    chart_separation: Annotated[NotNegative, says("of chart means nearer than the margin")] = 0.1
    centre_separation: Annotated[NotNegative, says("of chart centres nearer than the margin")] = 0.05
    margin: Annotated[Positive, says("wanted distance of means and centres")] = 2.0
    centring: Annotated[NotNegative, says("of codebooks whose mean is not their chart's centre")] = 0.05
    residual: Annotated[NotNegative, says("of the mean square of points in their chart")] = 0.01
    window: Annotated[NotNegative, says("of relu(window_nats - I(X;K))^2")] = 0.5
    window_nats: Annotated[NotNegative, says("least I(X;K)")] = 0.5
    chart_code_entropy: Annotated[NotNegative, says("of log J - H(code | chart), nats")] = 0.1
    code_entropy: Annotated[NotNegative, says("of log NJ - H(chart, code), nats")] = 0.0
    disentangle: Annotated[NotNegative, says("of |Cov(charts, |nuisance|)|^2; needs model.nuisance")] = 0.1
    orthogonality: Annotated[NotNegative, says("of the variance of log singular values of the latents")] = 0.0
    rate: Annotated[NotNegative, says("of the bits of nuisance and texture, per pixel of the image")] = 1.0
    orbit: Annotated[NotNegative, says("of the symmetric KL of the charts of an image and of one moved a little")] = 1.0
    invariance: Annotated[NotNegative, says("of the mean square between their latents")] = 0.0
    jump: Annotated[NotNegative, says("of jumps that miss the other chart's coordinates, after jump_warmup")] = 0.1
    jump_warmup: Annotated[Part, says("part of the run without the jump's loss")] = 0.1
    supervised: Annotated[
        NotNegative, says("of the label's -log p(y|x) through the charts; 0: labels are not read")
    ] = 0.0
    purity: Annotated[NotNegative, says("of H(Y|K) under supervision, nats")] = 0.1
    balance: Annotated[NotNegative, says("of KL(charts' labels || labels) under supervision, nats")] = 0.01
    metric: Annotated[NotNegative, says("of latents of two classes nearer than the margin, under supervision")] = 0.01
    temperature: Annotated[Positive, says("T of p(y|k) = softmax(table / T)")] = 1.0


@dataclass(frozen=True)
class Adaptive:
    """Controllers of the training (constellation/control), off by default."""

    weights: Annotated[
        Literal["fixed", "setpoints", "precision"],
        says("of losses: as given; PI to the setpoints and a dual for the window; learned precisions"),
    ] = "fixed"
    rate: Annotated[Literal["schedule", "governor"], says("learning rate: the schedule, or governed")] = "schedule"
    balance: Annotated[NotNegative, says("u, step of the loss-free bias that evens charts; 0: none")] = 0.0
    commitment: Annotated[Literal["fixed", "balanced"], says("its share as given, or by gradient norms")] = "fixed"
    route_entropy: Annotated[Part, says("setpoint of H(K|X) / log N")] = 0.1
    usage_entropy: Annotated[Part, says("setpoint of H(K) / log N")] = 0.95
    code_entropy: Annotated[Part, says("setpoint of H(code | chart) / log J")] = 0.9
    integral: Annotated[NotNegative, says("K_I of the PI, per nat and epoch")] = 0.05
    proportional: Annotated[NotNegative, says("K_P of the PI, per nat")] = 0.1
    most: Annotated[Positive, says("greatest weight that a controller sets")] = 10.0
    cap: Annotated[NotNegative, says("governor: largest |d theta| / |theta| of a step; 0: none")] = 0.1


@dataclass(frozen=True)
class Train:
    """How it is trained (topo/train.py)."""

    epochs: Annotated[Count, says("passes over the training images")] = 150
    batch: Annotated[Count, says("images of a step")] = 100
    lr: Annotated[Positive, says("peak learning rate of Adam")] = 6e-3
    warmup: Annotated[Part, says("part of the run in which lr rises")] = 0.02
    decay: Annotated[Part, says("last part of the run, in which lr falls to zero, linearly")] = 0.5
    clip: Annotated[Positive, says("largest gradient norm")] = 5.0
    reset: Annotated[Part, says("a code used less than this share of an even one's is moved to a point; 0: never")] = (
        0.1
    )
    eval_every: Annotated[Whole, says("epochs between evaluations on held-out images; 0: at the end only")] = 10
    checkpoint_every: Annotated[Count, says("epochs between checkpoints")] = 10
    probe: Annotated[bool, says("a linear probe reads classes, where there are labels, and trains nothing else")] = True
    threads: Annotated[Count, says("CPU threads")] = 1
    seed: Annotated[Whole, says("initialisation, order of images")] = 0


@dataclass(frozen=True)
class Topo:
    """A TopoEncoder and its training; the dotted names behind `topo.`."""

    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    control: Adaptive = field(default_factory=Adaptive)
    train: Train = field(default_factory=Train)

    def check(self) -> None:
        """ConfigError, one line, where settings do not go together; ranges are checked before."""
        m, c = self.model, self.control
        if m.latent < 2 or m.charts < 2 or m.codes < 2:
            raise ConfigError(
                f"topo.model.latent={m.latent}, charts={m.charts}, codes={m.codes}: at least 2 of each are an atlas"
            )
        if m.keys % 2:
            raise ConfigError(f"topo.model.keys={m.keys}: an even number is wanted, keys are turned in planes")
        most, window = math.log(m.charts), self.loss.window_nats
        if self.loss.window and window >= most:
            raise ConfigError(
                f"topo.loss.window_nats={window:g}: I(X;K) is at most log N = {most:.3f} nats with {m.charts} charts; "
                "lower it, or topo.loss.window=0"
            )
        if c.weights == "setpoints":
            self._check_setpoints(most)

    def _check_setpoints(self, most: float) -> None:
        """H(K|X) <= H(K), and their difference is I(X;K), which the window bounds from below."""
        c, window = self.control, self.loss.window_nats
        information = (c.usage_entropy - c.route_entropy) * most
        if information < 0:
            raise ConfigError(
                f"topo.control.route_entropy={c.route_entropy:g}, usage_entropy={c.usage_entropy:g}: H(K|X) cannot "
                f"exceed H(K); set route_entropy at most {c.usage_entropy:g}"
            )
        if self.loss.window and information < window:
            bound = c.usage_entropy - window / most
            raise ConfigError(
                f"topo.control.route_entropy={c.route_entropy:g}, usage_entropy={c.usage_entropy:g}: I(X;K) would be "
                f"{information:.3f} nats, below topo.loss.window_nats={window:g}; set route_entropy at most {bound:.3f}"
            )
