"""Coupling J and curvature kappa of one model at one context length, document by document.

J(L)      mean over pairs j < i < L of d_FR(p_i(x), p_i(x with token j resampled)), radians in [0, pi]: an
          intervention. j is drawn in proportion to the i that follow it, the new token from the text's other
          tokens; all i > j are read. 0 for a model that ignores its context
kappa(L)  g^T F g / g^T g of the window's mean cross-entropy, g its gradient in all parameters, F the Fisher
          information of its rows (geometry/fisher.py): curvature along the gradient, nats per unit of theta^2
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from constellation.geometry import simplex
from constellation.geometry.fisher import flatten, twice_differentiable
from constellation.kernel.model import KernelLM
from constellation.telemetry.kappa import curvature_along

ROWS = 512  # distributions held at once


def stretched(model: KernelLM, length: int) -> KernelLM:
    """The same weights with tables for `length` positions, which may be more than it was trained with."""
    config = dataclasses.replace(model.config, context=max(length, model.config.context))
    longer = KernelLM(config, seed=None)
    longer.load_state_dict(model.state_dict())
    return longer.eval()


@torch.no_grad()
def coupling(
    model: KernelLM, window_L: NDArray[np.int64], unigram_V: NDArray[np.float64], draws: int, seed: int
) -> float:
    """J of one window, by `draws` interventions."""
    generator, length = np.random.default_rng(seed), len(window_L)
    after = np.arange(length - 1, 0, -1, dtype=np.float64)  # how many i follow j
    total = 0.0
    clean = _hidden(model, window_L)
    for j in generator.choice(length - 1, size=draws, p=after / after.sum()):
        changed = window_L.copy()
        others = unigram_V.copy()
        others[window_L[j]] = 0.0
        changed[j] = generator.choice(len(others), p=others / others.sum())
        total += _mean_distance(model, clean[j + 1 :], _hidden(model, changed)[j + 1 :])
    return total / draws


def curvature(model: KernelLM, window_L: NDArray[np.int64]) -> float:
    """kappa of one window, whose last token is a target alone; 0 where the gradient vanishes."""
    params = [p for p in model.parameters() if p.requires_grad]
    tokens = torch.from_numpy(window_L)[None]
    with torch.enable_grad(), twice_differentiable():
        logits = model(tokens[:, :-1])[0]
        loss = F.cross_entropy(logits, tokens[0, 1:])
        found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        gradient = flatten([torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)])
        size = torch.linalg.vector_norm(gradient)
        return curvature_along(gradient / size, logits, params) if float(size) else 0.0


def _hidden(model: KernelLM, window_L: NDArray[np.int64]) -> Tensor:
    return model.hidden(torch.from_numpy(window_L)[None])[0]


def _mean_distance(model: KernelLM, a_ND: Tensor, b_ND: Tensor) -> float:
    total = 0.0
    for a, b in zip(a_ND.split(ROWS), b_ND.split(ROWS), strict=True):
        p, q = (torch.softmax(model.logits(h).double(), -1) for h in (a, b))
        total += float(simplex.distance(p, q).sum())
    return total / len(a_ND)
