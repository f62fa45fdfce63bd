"""The objective: named terms with weights, whose weighted sum is what is differentiated.

    total = sum_k w_k L_k(theta; batch)          w_k = 0: the term is reported and not differentiated

L_k is a mean over the sequences of the batch, so that micro-batches average. cross_entropy is always there, by
default alone and with weight 1. Any other term must have a gradient, and phi is none: it is measured, not optimised.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from constellation.config import PHI
from constellation.errors import ConfigError
from constellation.kernel.loss import linear_cross_entropy
from constellation.kernel.model import KernelLM
from constellation.telemetry.step import NUMBERS

CROSS_ENTROPY = "cross_entropy"
Number = TypeVar("Number", Tensor, float)


@dataclasses.dataclass(frozen=True)
class Forward:
    """One forward pass, which all terms share."""

    model: KernelLM
    inputs_BT: Tensor
    targets_BT: Tensor
    hidden_BTD: Tensor  # after the last norm, before the head
    chunk: int  # rows of logits that may exist at once


Term = Callable[[Forward], Tensor]


def cross_entropy(forward: Forward) -> Tensor:
    """Mean nats per token, at least 0."""
    return linear_cross_entropy(forward.hidden_BTD, forward.model.unembedding, forward.targets_BT, forward.chunk)


class Objective:
    """`terms` beside cross_entropy, each with its weight; cross_entropy's is 1 unless `weights` says otherwise.

    `weights` may be changed while the run goes on and is kept in its checkpoints.
    """

    def __init__(self, terms: Mapping[str, Term] | None = None, weights: Mapping[str, float] | None = None):
        self.terms: dict[str, Term] = {CROSS_ENTROPY: cross_entropy, **(terms or {})}
        self.weights: dict[str, float] = {CROSS_ENTROPY: 1.0, **(weights or {})}
        if phi := [name for name in self.terms if "phi" in re.split("[^a-z]+", name.lower())]:
            raise ConfigError(f"objective: {phi[0]!r} cannot be a term: {PHI}")
        if odd := sorted(self.terms.keys() ^ self.weights.keys()):
            raise ConfigError(f"objective: {odd[0]!r} needs both a term and a weight")
        if taken := sorted(self.terms.keys() & set(NUMBERS)):
            raise ConfigError(f"objective: a step reports its own {taken[0]!r}; choose another name for the term")

    def __call__(self, model: KernelLM, inputs_BT: Tensor, targets_BT: Tensor, chunk: int) -> dict[str, Tensor]:
        """Every term of one (micro-)batch, scalars; ConfigError when one is not."""
        forward = Forward(model, inputs_BT, targets_BT, model.hidden(inputs_BT), chunk)
        losses = {name: term(forward) for name, term in self.terms.items()}
        for name, loss in losses.items():
            if loss.dim():
                raise ConfigError(f"objective: {name!r} is of shape {tuple(loss.shape)}; a term is one number, a mean")
        return losses

    def total(self, losses: Mapping[str, Number]) -> Number:
        """The weighted sum of `losses`; ConfigError when every weight is 0."""
        parts = [
            loss if self.weights[name] == 1.0 else loss * self.weights[name]
            for name, loss in losses.items()
            if self.weights[name]
        ]
        if not parts:
            raise ConfigError("objective: every weight is 0, so there is nothing to minimise; give one term a weight")
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def refuse_idle(self, model: KernelLM, inputs_BT: Tensor, targets_BT: Tensor, chunk: int) -> None:
        """ConfigError naming a weighted auxiliary whose gradient is 0, at these weights and at others close by.

        Draws no random number of the run, leaves weights and gradients as they are.
        """
        names = [name for name, weight in self.weights.items() if weight and name != CROSS_ENTROPY]
        if not names:
            return
        with torch.random.fork_rng(), torch.enable_grad():
            losses = self(model, inputs_BT, targets_BT, chunk)
            idle = [name for name in names if not _has_gradient(losses[name], model)]
            if idle:
                beside = copy.deepcopy(model)
                with torch.no_grad():
                    for p in beside.parameters():
                        p.add_(0.01 * torch.randn_like(p))
                losses = self(beside, inputs_BT, targets_BT, chunk)
                idle = [name for name in idle if not _has_gradient(losses[name], beside)]
        if idle:
            raise ConfigError(
                f"objective: {idle[0]!r} has weight {self.weights[idle[0]]:g} and no gradient: nothing that is trained "
                "changes it; give it weight 0, to report it alone, or train what it depends on"
            )

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """ConfigError when the run was trained with other terms."""
        if state["weights"].keys() != self.weights.keys():
            names = [", ".join(sorted(weights)) for weights in (state["weights"], self.weights)]
            raise ConfigError(
                f"objective: the run was trained with {names[0]}, this one has {names[1]}; begin a new run"
            )
        self.weights = dict(state["weights"])


def _has_gradient(loss: Tensor, model: KernelLM) -> bool:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not loss.requires_grad:
        return False
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return any(g is not None and bool((g != 0).any()) for g in found)
