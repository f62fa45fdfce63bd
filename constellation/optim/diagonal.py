"""DiagonalNG: natural gradient with the diagonal of the Fisher information.

    F_i <- a F_i + (1 - a) f_i            f from the source, below; bias-corrected
    m_i <- b m_i + (1 - b) g_i            EMA of the gradient, bias-corrected
    theta_i <- (1 - lr wd) theta_i - lr m_i / (F_i^power + damping)

power = 1 divides by the Fisher diagonal, the natural gradient of Amari (1998) restricted to a diagonal
metric. The step is then inversely proportional to the scale of the loss: unscale first (GradScaler's scale
is taken out here). power = 1/2 is the original design's QIGDiagonalNG: RMSprop when b = 0 and nothing is corrected,
Adam (Kingma & Ba 2015) otherwise. It does not see the scale of the loss and runs in torch's fused kernel.

    source    f_i
    batch     B g_i^2, g the gradient of the batch mean and B `batch_size`: at B = 1 what Adam averages
    sampled   N h_i^2, h the gradient of the mean loss against N labels drawn from the model; its mean is the
              Fisher diagonal (Liu et al. 2024). Needs step(logits=...), looks every `refresh` steps
    exact     the Fisher diagonal itself, from step(logits=...), every `refresh` steps
    given     whatever step(curvature=[...]) hands over, one tensor a parameter; None leaves F as it is
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.optim.elementwise import adamw_step, diagonal_step
from constellation.optim.kinds import decayed
from constellation.optim.natural import Evidence, NaturalOptimizer, check_range
from constellation.optim.registry import DiagonalSettings, QIGDiagonalSettings

__all__ = ["DiagonalNG", "QIGDiagonalNG", "adamw_step", "diagonal_step", "exact_diagonal", "sampled_diagonal"]

SOURCES = ("batch", "sampled", "exact", "given")


class DiagonalNG(NaturalOptimizer):
    """Diagonal natural gradient. State per parameter: `step`, `fisher`, and `momentum` where b > 0.

    foreach=None takes the fastest way, False the formula parameter by parameter. capturable keeps every number on the
    device and checks nothing.
    """

    wants = ("logits",)
    state_kind = ("source",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        fisher_decay: float = 0.95,  # a
        damping: float = 1e-4,  # lambda, the unit of F^power
        momentum: float = 0.9,  # b
        power: float = 1.0,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        source: str = "batch",
        batch_size: float = 1.0,  # B
        refresh: int = 1,  # steps between looks at the likelihood
        seed: int = 0,  # of the drawn labels
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        check_finite: bool = True,
    ):
        who = type(self).__name__
        check_range(
            who, lr=(lr, math.inf), fisher_decay=(fisher_decay, 1), damping=(damping, math.inf), momentum=(momentum, 1)
        )
        check_range(who, power=(power, 1), weight_decay=(weight_decay, math.inf), batch_size=(batch_size, math.inf))
        if source not in SOURCES or refresh < 1:
            raise ConfigError(f"{who}: source={source!r}, refresh={refresh}; choose {', '.join(SOURCES)}, at least 1")
        if differentiable and foreach:
            raise ConfigError(f"{who}: differentiable=True has no list path; leave foreach unset")
        defaults = {
            "lr": lr, "fisher_decay": fisher_decay, "damping": damping, "momentum": momentum, "power": power,
            "weight_decay": weight_decay, "bias_correction": bias_correction, "source": source,
            "batch_size": batch_size, "refresh": refresh,
            "seed": seed, "foreach": foreach, "maximize": maximize, "capturable": capturable,
            "differentiable": differentiable, "check_finite": check_finite,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _advance(self, seen: Evidence) -> None:
        looks: list[dict[Tensor, Tensor] | None]
        curvature = seen.curvature  # a tensor for each parameter, None where unknown
        if curvature is not None:
            params = [p for group in self.param_groups for p in group["params"]]
            if len(curvature) != len(params):
                raise ConfigError(
                    f"curvature: {len(curvature)} tensors for {len(params)} parameters; None where unknown"
                )
            given = {p: f for p, f in zip(params, curvature, strict=True) if f is not None}
            looks = [given for _ in self.param_groups]
        else:  # all looks before any step: the graph needs the parameters as they were
            looks = [None if g["source"] == "batch" else self._look(g, seen.logits) for g in self.param_groups]
        for group, looked in zip(self.param_groups, looks, strict=True):
            diagonal_step(group["params"], self.state, group, looked)

    def _look(self, group: dict[str, Any], logits: Tensor | Callable[[], Tensor] | None) -> dict[Tensor, Tensor]:
        """Curvature of the group's parameters from the likelihood; nothing between two looks."""
        params = [p for p in group["params"] if p.grad is not None]
        step = int(self.state[params[0]].get("step", 0)) if params else 1
        if step % group["refresh"] or group["source"] == "given":
            return {}
        if logits is None:
            raise ConfigError(f"source={group['source']!r} needs step(logits=...) at step {step}; or source='batch'")
        with torch.enable_grad():
            rows_NV = logits() if callable(logits) else logits
            if group["source"] == "exact":
                from constellation.geometry.fisher import FisherBlock

                return dict(zip(params, exact_diagonal(FisherBlock, rows_NV, params), strict=True))
            generator = torch.Generator(rows_NV.device).manual_seed(1_000_003 * group["seed"] + step)
            return dict(zip(params, sampled_diagonal(rows_NV, params, generator), strict=True))


class QIGDiagonalNG(DiagonalNG):
    """The original design's diagonal optimizer, g / (sqrt F + damping): torch.optim.RMSprop at weight_decay = 0.

    Bit for bit with foreach=True; the default, torch's fused kernel, rounds in another order. Not a natural
    gradient, which divides by F: that is DiagonalNG. Weight decay is decoupled, RMSprop's is not.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        fisher_decay: float = 0.99,
        damping: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.0,  # of the gradient, before the division; RMSprop's is after it
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        check_finite: bool = True,
    ):
        super().__init__(
            params, lr, fisher_decay, damping, momentum, 0.5, weight_decay, bias_correction=False, foreach=foreach,
            maximize=maximize, capturable=capturable, differentiable=differentiable,
            check_finite=check_finite,
        )  # fmt: skip


def build(settings: DiagonalSettings, model: torch.nn.Module) -> DiagonalNG:
    s = settings
    return DiagonalNG(
        decayed(model, s.weight_decay),
        lr=s.lr,
        fisher_decay=s.fisher_decay,
        damping=s.damping,
        momentum=s.momentum,
        power=s.power,
    )


def build_qig(settings: QIGDiagonalSettings, model: torch.nn.Module) -> QIGDiagonalNG:
    s = settings
    groups = decayed(model, s.weight_decay)
    return QIGDiagonalNG(groups, lr=s.lr, fisher_decay=s.fisher_decay, damping=s.damping, momentum=s.momentum)


def sampled_diagonal(logits: Tensor, params: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """N h^2 for each parameter, h the gradient of the mean loss against labels drawn from softmax(logits (..., V))."""
    rows_NV = logits.flatten(0, -2)
    drawn_N = torch.multinomial(rows_NV.detach().float().softmax(-1), 1, generator=generator)[:, 0]
    loss = torch.nn.functional.cross_entropy(rows_NV, drawn_N)
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    n = rows_NV.shape[0]
    return [torch.zeros_like(p) if g is None else n * g.square() for p, g in zip(params, grads, strict=True)]


def exact_diagonal(block: Any, logits: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The diagonal of the mean Fisher of softmax(logits), shaped like the parameters."""
    flat, _ = block(logits.flatten(0, -2), params, kind="exact").diagonal()
    return [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]
