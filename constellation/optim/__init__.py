"""Natural-gradient optimizers, one file each; `build` makes the one that a config names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from constellation.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from constellation.config import Optim


_HOME = {  # public name -> file
    "AdaptiveConfig": "gate",
    "DiagonalNG": "diagonal",
    "KroneckerNG": "kronecker",
    "get_recommended_config_for_phase": "gate",
}


def __getattr__(name: str) -> Any:
    """Public names are loaded when asked for: the package itself imports no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_HOME, "build"])


def build(config: Optim, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `config` over all parameters of `model`; weight decay on matrices alone.

    `kronecker_ng` and `diagonal_ng` are natural gradients, `adamw` is torch's own, the control.
    """
    import torch

    from constellation.optim.diagonal import DiagonalNG
    from constellation.optim.kronecker import KroneckerNG

    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.name == "kronecker_ng":
        return KroneckerNG(
            _kronecker_groups(model, config.weight_decay), lr=config.lr, momentum=config.kronecker_momentum,
            alpha=config.fisher_decay, eps=config.damping, diagonal_momentum=config.momentum,
        )  # fmt: skip
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.name == "diagonal_ng":
        return DiagonalNG(
            groups, lr=config.lr, alpha=config.fisher_decay, eps=config.damping, momentum=config.momentum,
            power=config.power,
        )  # fmt: skip
    if config.name == "adamw":
        betas = (config.momentum, config.fisher_decay)
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=max(config.damping, 1e-8), fused=True)
    raise ConfigError(f"optim.name={config.name!r}: choose kronecker_ng, diagonal_ng or adamw")


def _kronecker_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Linear weights by Kronecker factors; embeddings and vectors by the diagonal."""
    import torch

    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "method": "diag", "weight_decay": 0.0},
    ]
