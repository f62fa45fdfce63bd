"""The optimizers of `bench optim`, one row each: ours and the peers, built the same way.

Every row is made from (problem, lr, knob). `lr` is drawn log-uniformly around the row's documented default.
`knob` in [0, 1] is the second number drawn: the memory of the average of squared gradients, 10 to 1000 steps, 1 / (1 -
beta); the momentum, 5 to 30 steps, of those that take a polar factor; the damping, a tenth to ten times the default,
of the exact one.
Weight decay is 0 for all. Where an optimizer is meant for the weights of linear maps alone (Muon, Kronecker factors),
embeddings and vectors go to AdamW(fused) at the same rate, or to DiagonalNG in our own.
heavyball compiles its steps by default: minutes on a CPU, and a hundred trials would each pay it; it runs
uncompiled here (`compile_mode = None`), as the packages that never compile do. The step-cost table says so too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from constellation.experiments.optim_tasks import TaskProblem

Optimizer = Any  # torch.optim.Optimizer, or Several


class Several:
    """Optimizers that step together over disjoint parameters."""

    def __init__(self, *members: torch.optim.Optimizer):
        self.members = members

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for member in self.members for group in member.param_groups]

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad()


@dataclass(frozen=True)
class Contestant:
    """One optimizer."""

    name: str
    source: str  # "ours" or the package
    lr: float  # documented default, the unit of the search
    build: Callable[[TaskProblem, float, float], Optimizer]
    sees: bool = False  # step(logits=..., targets=...): it forms curvature from the likelihood
    gate: bool = False  # step(telemetry={"loss": ...}) too
    rate: str = "linear"  # linear: up, then down to zero | flat: up, as schedule-free asks | none: always lr, untuned
    cost: float = 1.0  # CPU time of a training step over AdamW's on small models, for the estimate alone
    trials: int | None = None  # fewer trials than the others
    claim: str = ""  # its row of the original design's table


def memory(knob: float) -> float:
    """beta of an average over 10 ** (1 + 2 knob) steps: 10 at 0, 1000 at 1."""
    return float(1 - 10 ** -(1 + 2 * knob))


def inertia(knob: float) -> float:
    """Momentum over 5 steps at 0, 30 at 1."""
    return float(1 - 0.2 * 6**-knob)


def around(default: float, knob: float) -> float:
    """A tenth of `default` at 0, ten times it at 1."""
    return float(default * 10 ** (2 * knob - 1))


def matrices(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """(weights of linear maps, all the rest); where there is no nn.Linear, every matrix."""
    linear: list[Tensor] = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    linear = linear or [p for p in model.parameters() if p.dim() == 2]
    taken = {id(p) for p in linear}
    return linear, [p for p in model.parameters() if id(p) not in taken]


def _all(problem: TaskProblem) -> list[Tensor]:
    return list(problem.model.parameters())


def _fused(params: list[Tensor], lr: float, knob: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, memory(knob)), weight_decay=0.0, fused=True)


def _with_adamw(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], problem: TaskProblem, lr: float, knob: float
) -> Any:
    linear, rest = matrices(problem.model)
    if not rest:
        return make(linear)
    return Several(make(linear), _fused(rest, lr, knob)) if linear else _fused(rest, lr, knob)


def _adamw(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    return _fused(_all(problem), lr, knob)


def _qig_diagonal(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    from constellation.optim import QIGDiagonalNG

    return QIGDiagonalNG(_all(problem), lr=lr, fisher_decay=memory(knob))


def _qig_bare(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    from constellation.optim import QIGDiagonalNG

    return QIGDiagonalNG(_all(problem), lr=lr, fisher_decay=memory(knob), check_finite=False)


def _diagonal_bare(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    from constellation.optim import DiagonalNG

    return DiagonalNG(_all(problem), lr=lr, fisher_decay=memory(knob), power=1.0, check_finite=False)


def _diagonal(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    from constellation.optim import DiagonalNG

    sampled: dict[str, Any] = {"source": "sampled", "refresh": 5} if problem.likelihood == "softmax" else {}
    return DiagonalNG(_all(problem), lr=lr, fisher_decay=memory(knob), power=1.0, **sampled)


def _simple(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    from constellation.optim import SimpleFisherOptimizer

    return SimpleFisherOptimizer(_all(problem), lr=lr, damping=around(1e-8, knob))


def _kronecker(variant: str) -> Callable[[TaskProblem, float, float], Optimizer]:
    def build(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
        from constellation.optim import KroneckerNG

        linear, rest = matrices(problem.model)
        groups: list[dict[str, Any]] = [{"params": linear}, {"params": rest, "method": "diag"}]
        own: dict[str, Any] = {"momentum": inertia(knob)} if "muon" in variant else {"fisher_decay": memory(knob)}
        return KroneckerNG([g for g in groups if g["params"]], lr=lr, variant=variant, **own)

    return build


def _exact_ng(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    from constellation.optim import BasinNaturalGrad

    return BasinNaturalGrad(
        _all(problem), lr=1.0, damping=around(1e-3, knob), likelihood=problem.likelihood, max_kl=None,
        levenberg_marquardt=True, reduction="sum" if problem.likelihood == "gaussian" else "mean",
    )  # fmt: skip


def _hybrid(exact: bool) -> Callable[[TaskProblem, float, float], Optimizer]:
    def build(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
        from constellation.optim import HybridGeometricOptimizer

        return HybridGeometricOptimizer(
            problem.model, lr_ng=10 * lr, lr_rest=lr, use_exact_ng=exact, weight_decay=0.0,
            rest_options={"betas": (0.9, memory(knob))},
        )  # fmt: skip

    return build


def _adaptive(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    from constellation.optim import AdaptiveMixedQIG

    return AdaptiveMixedQIG(
        problem.model, lr_ng=10 * lr, lr_rest=lr, use_exact_ng=True, weight_decay=0.0,
        rest_options={"betas": (0.9, memory(knob))},
    )  # fmt: skip


def _scaled(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    from constellation.optim import CurvatureScaledSGD

    return CurvatureScaledSGD(_all(problem), lr=lr, momentum=0.9, smooth=memory(knob))


def _muon(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    def muon(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Muon(params, lr=lr, momentum=inertia(knob), weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    return _with_adamw(muon, problem, lr, 0.3)  # 40 steps: the middle of what wins elsewhere


def _pytorch_optimizer_soap(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    from pytorch_optimizer import SOAP

    def soap(params: list[Tensor]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = SOAP(params, lr=lr, betas=(0.95, memory(knob)), weight_decay=0.0)
        return made

    return _with_adamw(soap, problem, lr, knob)


def _heavyball() -> Any:
    import heavyball
    import heavyball.utils

    heavyball.utils.compile_mode = None
    return heavyball


def _heavyball_soap(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    beta = memory(knob)

    def soap(params: list[Tensor]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = _heavyball().SOAP(params, lr=lr, betas=(0.9, beta), weight_decay=0.0)
        return made

    return _with_adamw(soap, problem, lr, knob)


def _heavyball_psgd(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    def psgd(params: list[Tensor]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = _heavyball().PSGDKron(params, lr=lr, weight_decay=0.0)
        return made

    return _with_adamw(psgd, problem, lr, knob)


def _schedulefree(problem: TaskProblem, lr: float, knob: float) -> Optimizer:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(_all(problem), lr=lr, betas=(0.9, memory(knob)), weight_decay=0.0)


BASELINE = "adamw"
ROWS = {
    row.name: row
    for row in (
        Contestant("adamw", "torch AdamW(fused)", 1e-3, _adamw, claim="AdamW (baseline)"),
        Contestant("qig_diagonal", "ours", 1e-3, _qig_diagonal, cost=1.0, claim="QIGDiagonalNG"),
        Contestant("diagonal", "ours", 1e-3, _diagonal, sees=True, cost=1.2),
        Contestant("qig_diagonal_bare", "ours, check_finite=False", 1e-3, _qig_bare),  # these two for their cost alone
        Contestant("diagonal_bare", "ours, check_finite=False", 1e-3, _diagonal_bare),
        Contestant("simple_fisher", "ours", 1e-3, _simple, cost=1.0),
        Contestant("curvature_scaled", "ours", 1e-3, _scaled, cost=1.1),
        Contestant("kron_muon", "ours", 1e-3, _kronecker("muon"), cost=1.3),
        Contestant("kron_soap", "ours", 1e-3, _kronecker("soap"), cost=1.4),
        Contestant("kron_kl_shampoo", "ours", 1e-3, _kronecker("kl_shampoo"), cost=1.4),
        Contestant("kron_soap_muon", "ours", 1e-3, _kronecker("soap_muon"), cost=1.6),
        Contestant("exact_ng", "ours", 1.0, _exact_ng, sees=True, rate="none", cost=10.0, trials=5),
        Contestant("hybrid_diagonal", "ours", 1e-3, _hybrid(False), cost=1.1, claim="MixedQIG (diagonal)"),
        Contestant("hybrid_exact", "ours", 1e-3, _hybrid(True), sees=True, cost=4.5, claim="MixedQIG (exact)"),
        Contestant("adaptive", "ours", 1e-3, _adaptive, sees=True, gate=True, cost=1.3, claim="AdaptiveMixedQIG"),
        Contestant("muon", "torch Muon + AdamW", 1e-3, _muon, cost=1.3),
        Contestant("pytorch_optimizer_soap", "pytorch_optimizer SOAP + AdamW", 3e-3, _pytorch_optimizer_soap, cost=1.4),
        Contestant("heavyball_soap", "heavyball SOAP + AdamW", 3e-3, _heavyball_soap, cost=2.5),
        Contestant("heavyball_psgd", "heavyball PSGDKron + AdamW", 1e-3, _heavyball_psgd, cost=2.5),
        Contestant("schedulefree", "schedulefree AdamW", 2.5e-3, _schedulefree, rate="flat", cost=1.1),
    )
}


def ours() -> Iterator[str]:
    return (name for name, row in ROWS.items() if row.source == "ours")
