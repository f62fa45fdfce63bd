"""Which parameters are matrices to a Kronecker step, and which go by the diagonal.

diag    fewer than two axes: biases, gains, scalars
        embeddings: weights of torch's Embedding and EmbeddingBag, where the model is given
        gains of norms with several axes (LayerNorm, RMSNorm), where the model is given
        embeddings and heads by name, where names are given: a part of the dotted name matches NAMES
        a head that is tied to an embedding is the same parameter, and goes with it
kron    all others: first axis x all others together, so a convolution is (out, in / groups x kernel), a transposed
        one (in, out / groups x kernel)

Each row of an embedding, and of a head, is a vector of its own, seen as often as its token: a polar factor would give
rare and frequent ones the same step. Without names or model nothing tells an embedding from another matrix.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("*embed*", "wte", "wpe", "head", "*_head", "classifier")  # as transformers, nanoGPT and timm have them
ROWWISE = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """First axis x all others together."""
    return shape[0], shape[1:].numel()


def kinds_of(params: Sequence[Tensor], names: Sequence[str] | None, model: nn.Module | None) -> list[str]:
    """kron or diag for each parameter."""
    known = {id(p) for m in model.modules() if isinstance(m, ROWWISE) for p in m.parameters(False)} if model else set()
    return [
        "diag" if p.dim() < 2 or id(p) in known or (names and is_rowwise(names[i])) else "kron"
        for i, p in enumerate(params)
    ]


def is_rowwise(name: str) -> bool:
    """Whether a dotted name is that of an embedding or a head."""
    return any(fnmatch.fnmatchcase(part.lower(), pattern) for part in name.split(".") for pattern in NAMES)


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Param groups of all that is trained: matrices with weight decay, vectors without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
