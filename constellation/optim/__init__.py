"""Natural-gradient optimizers, one file each; `build` makes the one that a config names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from constellation.optim.registry import Settings, row

if TYPE_CHECKING:
    import torch

    from constellation.optim.adaptive import AdaptiveMixedQIG as AdaptiveMixedQIG
    from constellation.optim.basin import BasinNaturalGrad as BasinNaturalGrad
    from constellation.optim.diagonal import DiagonalNG as DiagonalNG
    from constellation.optim.diagonal import QIGDiagonalNG as QIGDiagonalNG
    from constellation.optim.gate import AdaptiveConfig as AdaptiveConfig
    from constellation.optim.gate import get_recommended_config_for_phase as get_recommended_config_for_phase
    from constellation.optim.kronecker import KroneckerNG as KroneckerNG
    from constellation.optim.mixed import HybridGeometricOptimizer as HybridGeometricOptimizer
    from constellation.optim.scaled import CurvatureScaledSGD as CurvatureScaledSGD
    from constellation.optim.simple import SimpleFisherOptimizer as SimpleFisherOptimizer

_HOME = {  # public name -> file
    "AdaptiveConfig": "gate",
    "AdaptiveMixedQIG": "adaptive",
    "BasinNaturalGrad": "basin",
    "CurvatureScaledSGD": "scaled",
    "DiagonalNG": "diagonal",
    "HybridGeometricOptimizer": "mixed",
    "KroneckerNG": "kronecker",
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


def build(settings: Settings, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `settings` are of (registry.py), over all parameters of `model`.

    Weight decay is on matrices alone. ConfigError where no optimizer has the name.
    """
    module, _, function = row(settings.name).builder.partition(":")
    optimizer: torch.optim.Optimizer = getattr(importlib.import_module(module), function)(settings, model)
    return optimizer
