"""Ollivier-Ricci curvature of the graph of nearest neighbours among points whose distances are known.

    kappa(x, y) = 1 - W1(m_x, m_y) / d(x, y)      m_x uniform on the k = 4 nearest neighbours of x, y one of them

W1 between two uniform measures of equal size is the cheapest assignment; of 4! = 24 all are tried. 1 where the
neighbours are shared (a clique), 0 on a flat grid, negative where they lie further apart than the points (a tree's
branching), after Ollivier (2009). Points at distance 0 have no edge.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

NEIGHBOURS = 4


def ollivier_ricci(distance_NN: Tensor) -> Tensor:
    """kappa of every edge, (E,), E <= 4 N; each at most 1. Empty for fewer than 6 points."""
    n = len(distance_NN)
    if n < NEIGHBOURS + 2:
        return distance_NN.new_zeros(0)
    away_NN = distance_NN + torch.diag(distance_NN.new_full((n,), float("inf")))
    near_NK = away_NN.topk(NEIGHBOURS, largest=False, sorted=True).indices
    x_E = torch.arange(n, device=distance_NN.device).repeat_interleave(NEIGHBOURS)
    y_E = near_NK.flatten()
    cost_EKK = distance_NN[near_NK[x_E][:, :, None], near_NK[y_E][:, None, :]]
    orders_PK = torch.tensor(list(itertools.permutations(range(NEIGHBOURS))), device=distance_NN.device)
    w1_E = cost_EKK[:, torch.arange(NEIGHBOURS, device=distance_NN.device), orders_PK].mean(-1).amin(-1)
    d_E = distance_NN[x_E, y_E]
    return 1 - w1_E[d_E > 0] / d_E[d_E > 0]
