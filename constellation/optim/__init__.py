"""Natural-gradient optimizers, one file each; `build` makes the one that a config names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from constellation.config import OPTIMIZERS
from constellation.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from constellation.config import Optim
    from constellation.optim.adaptive import AdaptiveMixedQIG as AdaptiveMixedQIG
    from constellation.optim.basin import BasinNaturalGrad as BasinNaturalGrad
    from constellation.optim.diagonal import DiagonalNG as DiagonalNG
    from constellation.optim.diagonal import QIGDiagonalNG as QIGDiagonalNG
    from constellation.optim.gate import AdaptiveConfig as AdaptiveConfig
    from constellation.optim.gate import get_recommended_config_for_phase as get_recommended_config_for_phase
    from constellation.optim.hybrid import HybridGeometricOptimizer as HybridGeometricOptimizer
    from constellation.optim.hybrid import MixedQIGOptimizer as MixedQIGOptimizer
    from constellation.optim.kronecker import KroneckerNG as KroneckerNG
    from constellation.optim.scaled import CurvatureScaledSGD as CurvatureScaledSGD
    from constellation.optim.simple import SimpleFisherOptimizer as SimpleFisherOptimizer

_HOME = {  # public name -> file
    "AdaptiveConfig": "gate",
    "AdaptiveMixedQIG": "adaptive",
    "BasinNaturalGrad": "basin",
    "CurvatureScaledSGD": "scaled",
    "DiagonalNG": "diagonal",
    "HybridGeometricOptimizer": "hybrid",
    "KroneckerNG": "kronecker",
    "MixedQIGOptimizer": "hybrid",
    "QIGDiagonalNG": "diagonal",
    "SimpleFisherOptimizer": "simple",
    "get_recommended_config_for_phase": "gate",
}
__all__ = ["build", *_HOME]


def __getattr__(name: str) -> Any:
    """Public names are loaded when asked for: the package itself imports no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def build(config: Optim, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `config` over all parameters of `model`; weight decay on matrices alone.

    kronecker_ng        Kronecker factors on linear layers, the diagonal on embeddings and vectors; `variant`
    diagonal_ng         the Fisher diagonal, `power`
    qig_diagonal_ng     the seeds' RMSprop
    basin_ng            the exact Fisher matrix of the whole model as one block
    mixed_qig           a natural step on the parameters `basin` names, `rest_optimizer` on the others
    adaptive_mixed_qig  the same behind a `gate`
    simple_fisher       the seeds' soft sign, a baseline
    curvature_sgd       a learning rate for every parameter from a `curvature` diagonal
    adamw               torch's own, the control
    """
    if config.name not in _BUILDERS:
        raise ConfigError(f"optim.name={config.name!r}: choose one of {', '.join(OPTIMIZERS)}")
    return _BUILDERS[config.name](config, model)


def _kronecker(config: Optim, model: torch.nn.Module) -> torch.optim.Optimizer:
    from constellation.optim.kronecker import KroneckerNG

    return KroneckerNG(
        _kronecker_groups(model, config.weight_decay), lr=config.lr, momentum=config.kronecker_momentum,
        alpha=config.fisher_decay, eps=config.damping, diagonal_momentum=config.momentum, variant=config.variant,
        ns_precision=config.ns_precision,
    )  # fmt: skip


def _diagonal(config: Optim, model: torch.nn.Module) -> torch.optim.Optimizer:
    from constellation.optim.diagonal import DiagonalNG

    return DiagonalNG(
        _groups(model, config.weight_decay), lr=config.lr, alpha=config.fisher_decay, eps=config.damping,
        momentum=config.momentum, power=config.power,
    )  # fmt: skip


def _qig_diagonal(config: Optim, model: torch.nn.Module) -> torch.optim.Optimizer:
    from constellation.optim.diagonal import QIGDiagonalNG

    return QIGDiagonalNG(
        _groups(model, config.weight_decay), lr=config.lr, alpha=config.fisher_decay, eps=config.damping,
        momentum=config.momentum,
    )  # fmt: skip


def _basin(config: Optim, model: torch.nn.Module) -> torch.optim.Optimizer:
    from constellation.optim.basin import BasinNaturalGrad

    params = [p for p in model.parameters() if p.requires_grad]
    return BasinNaturalGrad(params, lr=config.lr, cg_iters=config.cg_iters, damping=config.cg_damping)


def _hybrid(config: Optim, model: torch.nn.Module) -> torch.optim.Optimizer:
    from constellation.optim.hybrid import HybridGeometricOptimizer

    return HybridGeometricOptimizer(model, **_mixed(config))


def _adaptive(config: Optim, model: torch.nn.Module) -> torch.optim.Optimizer:
    from constellation.optim.adaptive import AdaptiveMixedQIG

    return AdaptiveMixedQIG(model, **_mixed(config), adaptive_config=config.gate)


def _simple(config: Optim, model: torch.nn.Module) -> torch.optim.Optimizer:
    from constellation.optim.simple import SimpleFisherOptimizer

    return SimpleFisherOptimizer(_groups(model, config.weight_decay), lr=config.lr, eps=config.damping)


def _scaled(config: Optim, model: torch.nn.Module) -> torch.optim.Optimizer:
    from constellation.optim.scaled import CurvatureScaledSGD

    lr = config.lr * (1 - config.momentum)  # its momentum sums gradients, `lr` is meant for their average
    return CurvatureScaledSGD(
        _groups(model, config.weight_decay), lr, config.exponent, source=config.curvature, eps=config.damping,
        momentum=config.momentum, refresh=config.refresh, probes=config.probes,
    )  # fmt: skip


def _adamw(config: Optim, model: torch.nn.Module) -> torch.optim.Optimizer:
    import torch

    groups, betas = _groups(model, config.weight_decay), (config.momentum, config.fisher_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=max(config.damping, 1e-8), fused=True)


_BUILDERS: dict[str, Callable[[Optim, torch.nn.Module], torch.optim.Optimizer]] = {
    "kronecker_ng": _kronecker,
    "diagonal_ng": _diagonal,
    "qig_diagonal_ng": _qig_diagonal,
    "basin_ng": _basin,
    "mixed_qig": _hybrid,
    "adaptive_mixed_qig": _adaptive,
    "simple_fisher": _simple,
    "curvature_sgd": _scaled,
    "adamw": _adamw,
}


def _mixed(config: Optim) -> dict[str, Any]:
    """Settings that the mixed optimizers share."""
    diagonal = {"alpha": config.fisher_decay, "eps": config.damping, "momentum": config.momentum, "power": config.power}
    rest = {
        "adamw": {"betas": (config.momentum, config.fisher_decay), "eps": max(config.damping, 1e-8)},
        "diagonal_ng": diagonal,
        "kron": {
            "variant": config.variant, "momentum": config.kronecker_momentum, "alpha": config.fisher_decay,
            "eps": config.damping, "ns_precision": config.ns_precision,
        },
    }  # fmt: skip
    return {
        "lr_ng": config.lr_ng, "lr_rest": config.lr, "cg_iters": config.cg_iters, "damping": config.cg_damping,
        "use_exact_ng": config.use_exact_ng, "rest_optimizer": config.rest_optimizer,
        "weight_decay": config.weight_decay, "basin": config.basin.split(","),
        "basin_options": {} if config.use_exact_ng else diagonal, "rest_options": rest[config.rest_optimizer],
    }  # fmt: skip


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _kronecker_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Linear weights by Kronecker factors; embeddings and vectors by the diagonal."""
    import torch

    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        {"params": matrices, "method": "kron", "weight_decay": weight_decay},
        {"params": rest, "method": "diag", "weight_decay": 0.0},
    ]
