"""BasinNaturalGrad: natural gradient with the exact Fisher information of a block of parameters.

    loss = cross_entropy(logits.flatten(0, -2), targets.flatten())
    loss.backward(retain_graph=True)
    optimizer.step(logits=logits, targets=targets)       or logits=lambda: model(x[:rows // 8]), cheaper

block.py has the formula and what becomes of a step that cannot be taken. Each group is one block, so several groups
are a block-diagonal F; all their steps are known before one moves.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from constellation.errors import ConfigError
from constellation.optim.block import (
    BASIN_SETTINGS,
    BasinOutcome,
    basin_step,
    check_basin,
    look_once,
    plan,
    take,
)
from constellation.optim.natural import Evidence, NaturalOptimizer
from constellation.optim.registry import BasinSettings

__all__ = ["BASIN_SETTINGS", "BasinNaturalGrad", "BasinOutcome", "basin_step", "check_basin"]


class BasinNaturalGrad(NaturalOptimizer):
    """Exact natural gradient. Parameters may be float16 or bfloat16; vectors of the solve are float32 or wider.

    Groups may override every setting of BASIN_SETTINGS. State lies with a group's first parameter: `step`, `solution`
    (the last x, flat), `damping`, `generator`, `looks`, numbers for get_stats, and where used `diagonal`, `matrix`,
    `factor`, `directions` and `products`.
    """

    wants = ("logits", "targets")

    def __init__(self, params: Any, lr: float = 1e-2, cg_iters: int = 10, damping: float = 1e-4, **settings: Any):
        unknown = sorted(set(settings) - set(BASIN_SETTINGS))
        if unknown:
            raise ConfigError(f"BasinNaturalGrad: unknown setting {unknown[0]!r}; known: {', '.join(BASIN_SETTINGS)}")
        defaults = {**BASIN_SETTINGS, "lr": lr, "cg_iters": cg_iters, "damping": damping, **settings}
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        self._blocks: list[BasinOutcome] = []
        self._moved_steps = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_blocks" not in self.__dict__:
            self._forget()
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            check_basin("BasinNaturalGrad", self.param_groups[-1])
        except ConfigError:
            self.param_groups.pop()
            raise

    def _advance(self, seen: Evidence) -> None:
        groups, logits = self.param_groups, seen.logits
        if len(groups) > 1:
            if seen.jacobian is not None or any(g["levenberg_marquardt"] or g["measure"] for g in groups):
                raise ConfigError("BasinNaturalGrad: jacobian, measure and levenberg_marquardt see one block; make one")
            logits = look_once(logits) if callable(logits) else logits  # one look serves all blocks
        plans = [plan(g["params"], self.state, g, logits, seen.targets, seen.jacobian) for g in groups]
        self._blocks = [p if isinstance(p, BasinOutcome) else take(p) for p in plans]
        self._moved_steps += any(b.moved for b in self._blocks)

    @property
    def outcome(self) -> str:
        """Of the last step: none, skipped, or the first block's that did not converge, else converged."""
        if self._outcome != "stepped":
            return self._outcome
        names = [b.outcome for b in self._blocks if b.outcome != "none"]
        return next((n for n in names if n != "converged"), names[0] if names else "none")

    def get_stats(self) -> dict[str, float]:
        """The last step's numbers: mean over blocks, sum for steps, seconds, reductions and KL."""
        moved = float(self._moved_steps)
        stats = {**super().get_stats(), "natural_steps": moved, "ng_applications": moved}
        seen = [b.stats for b in self._blocks if b.stats]
        summed = ("cg_steps", "seconds", "predicted_reduction", "actual_reduction", "kl_per_step")
        for name in sorted({name for s in seen for name in s}):
            values = [s[name] for s in seen if name in s]
            stats[name] = sum(values) if name in summed else sum(values) / len(values)
        stats["num_basin_params"] = float(sum(p.numel() for group in self.param_groups for p in group["params"]))
        return stats


def build(settings: BasinSettings, model: nn.Module) -> BasinNaturalGrad:
    """The whole model as one block."""
    params = [p for p in model.parameters() if p.requires_grad]
    return BasinNaturalGrad(params, lr=settings.lr, cg_iters=settings.cg_iters, damping=settings.cg_damping)
