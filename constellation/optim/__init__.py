"""Natural-gradient optimizers, one file each; `build` makes the one that a config names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from constellation.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from constellation.config import Optim


def build(config: Optim, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `config` over all parameters of `model`; weight decay on matrices alone.

    `diagonal_ng` is the natural gradient with diagonal Fisher, `adamw` torch's own, the control.
    """
    import torch

    from constellation.optim.diagonal import DiagonalNG

    parameters = [p for p in model.parameters() if p.requires_grad]
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
    raise ConfigError(f"optim.name={config.name!r}: choose diagonal_ng or adamw")
