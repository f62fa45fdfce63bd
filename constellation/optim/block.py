"""One natural step of one block of parameters: what BasinNaturalGrad and the mixed optimizers take.

    (F + lambda) x = g + lambda mu x_prev            damping lambda; momentum mu as in SPRING (Goldshlager et al. 2024)
    step           = min(lr, sqrt(2 delta / x^T F x))    no step moves the model by more than delta nats (KL)
    theta         <- (1 - lr wd) theta - step x

F is the curvature of the model's likelihood in the parameters of a group (geometry/fisher.py: exact, sampled,
empirical or, not a Fisher information, the Hessian), solved by conjugate gradients, in sample space or densely
(geometry/solve.py). The step sees F through the logits, which share rows and scale with the loss: mean (or sum,
`reduction`) over rows of -log p(target | logits).

A noisy loss is held by `max_kl`. A loss that is the same every step may take `levenberg_marquardt`, with max_kl=None
and lr=1: lambda follows actual over predicted reduction, the step is halved until the loss falls, and undone when it
will not. Between refreshes, `refresh` steps apart, the solver's last knowledge of F serves: its matrix, its factor,
or the span of cg's directions, and no logits are needed.

Outcomes: converged and max_steps (a truncated solve) step; so does negative_curvature, as far as cg came before it, if
that points downhill, else nothing moves. singular, non_finite and rejected leave the parameters as they were.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.geometry.fisher import KINDS, FisherBlock, flatten, twice_differentiable, unflatten
from constellation.geometry.likelihood import LIKELIHOODS
from constellation.geometry.solve import METHODS, PASSES_LIMIT, Solution, cg, choose, dense, krylov, sample_space
from constellation.optim.natural import check_range

Logits = Tensor | Callable[[], Tensor]
BASIN_SETTINGS: dict[str, Any] = {  # of a group that basin_step serves
    "lr": 1e-2,
    "cg_iters": 10,  # products a solve may make
    "damping": 1e-4,  # lambda, unit of F: nats / theta^2
    "weight_decay": 0.0,  # decoupled
    "momentum": 0.0,  # mu of SPRING, [0, 1]
    "max_kl": 1e-2,  # delta, nats of the mean row (of the batch if reduction is sum); None: off
    "solver": "auto",  # auto | cg | sample_space | dense
    "kind": "exact",  # exact | sampled | empirical | hessian
    "likelihood": "softmax",  # softmax | gaussian | bernoulli
    "reduction": "mean",  # of the loss over rows: mean | sum
    "tolerance": 1e-6,  # relative residual at which cg stops
    "warm_start": 0.9,  # cg starts at this times its last answer; 0: at zero, one product less
    "precondition": False,  # cg by (diag F + lambda)^0.75 (Martens 2010), diag F an average of sampled labels
    "refresh": 1,  # steps for which one look at F serves
    "levenberg_marquardt": False,  # for losses without noise only
    "measure": False,  # loss and KL after the step by calling logits again; levenberg_marquardt always does
    "maximize": False,
    "seed": 0,  # of the sampled labels
}
RAISE, LOWER = 2.0, 0.2  # Levenberg-Marquardt: lambda times this where actual / predicted < 1/4, > 3/4
HALVINGS = 10  # of a Levenberg-Marquardt step before it is undone
DIAGONAL_DECAY = 0.95  # average of the preconditioner
CACHES = ("matrix", "factor", "directions", "products")  # what a solver leaves for the steps between refreshes
LOOK_EVERY = 10  # looks at F between two estimates of its diagonal that only get_stats() wants


@dataclass(frozen=True)
class BasinOutcome:
    """What a step of one block did; `stats` are those of get_stats() that apply."""

    outcome: str  # none (no gradients) | a solve.OUTCOMES | rejected
    moved: bool = False
    stats: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.outcome


def check_basin(who: str, group: dict[str, Any]) -> None:
    """ConfigError where a group cannot be served: no parameters, a value out of range, an excluded combination."""
    if not group["params"]:
        raise ConfigError(f"{who}: the basin group is empty; name the parameters of the exact block")
    check_range(who, lr=(group["lr"], math.inf), damping=(group["damping"], math.inf), momentum=(group["momentum"], 1))
    check_range(who, weight_decay=(group["weight_decay"], math.inf), warm_start=(group["warm_start"], 1))
    check_range(who, tolerance=(group["tolerance"], 1))
    choices = {"solver": METHODS, "kind": KINDS, "likelihood": LIKELIHOODS, "reduction": ("mean", "sum")}
    for name, known in choices.items():
        if group[name] not in known:
            raise ConfigError(f"{who}: {name}={group[name]!r}: choose one of {', '.join(known)}")
    for name in ("cg_iters", "refresh"):
        if group[name] < 1:
            raise ConfigError(f"{who}: {name}={group[name]} must be at least 1")
    if group["max_kl"] is not None and not 0 < group["max_kl"] < math.inf:
        raise ConfigError(f"{who}: max_kl={group['max_kl']} must be above 0, or None for off")
    if group["solver"] == "sample_space" and (group["kind"] == "hessian" or group["damping"] == 0):
        raise ConfigError(f"{who}: solver='sample_space' needs damping above 0 and a Fisher kind, not the Hessian")
    if group["precondition"] and group["kind"] not in ("exact", "sampled"):
        raise ConfigError(f"{who}: precondition=True samples labels; kind={group['kind']!r} does not")
    if group["levenberg_marquardt"] and (group["maximize"] or group["damping"] == 0):
        raise ConfigError(f"{who}: levenberg_marquardt needs damping above 0 and a loss that is minimised")


@torch.no_grad()
def basin_step(
    params: Sequence[Tensor],
    state: Any,
    group: dict[str, Any],
    logits: Logits | None,
    targets: Tensor | None = None,
    *,
    jacobian: Tensor | Callable[[], Tensor] | None = None,
) -> BasinOutcome:
    """One step of the formula above on the block `params`, whose gradients are whole and unscaled.

    Nothing that the logits were made with may have moved since: in a mixed optimizer this comes first.
    """
    planned = plan(params, state, group, logits, targets, jacobian)
    return planned if isinstance(planned, BasinOutcome) else take(planned)


@dataclass(frozen=True)
class StepPlan:
    """A step that is known and not yet taken: with several blocks all are known before one moves."""

    began: float
    params: list[Tensor]
    group: dict[str, Any]
    memory: dict[str, Any]
    outcome: str
    x: Tensor
    slope: float  # g^T x
    curved: float  # x^T F x
    damped: float  # x^T (F + lambda) x
    stats: dict[str, float]
    measure: Callable[[], tuple[float, float]] | None  # (loss that fell, KL from the model before), nats


def plan(
    params: Sequence[Tensor],
    state: Any,
    group: dict[str, Any],
    logits: Logits | None,
    targets: Tensor | None,
    jacobian: Tensor | Callable[[], Tensor] | None,
) -> StepPlan | BasinOutcome:
    """The step of a block, or why there is none; nothing moves but the memory of the solver."""
    began = time.perf_counter()
    moving = [p for p in params if p.grad is not None]
    if not moving:
        return BasinOutcome("none")
    g = flatten([p.grad for p in moving if p.grad is not None])
    g = -g if group["maximize"] else g
    memory = state[params[0]]
    if "solution" not in memory or memory["solution"].shape != g.shape:
        _remember(memory, g, group)
    looks = not any(name in memory for name in CACHES) or int(memory["step"]) % group["refresh"] == 0
    block = measure = None
    if looks or group["levenberg_marquardt"] or group["measure"]:
        block = _look(moving, group, memory, logits, targets, jacobian if looks else None, graph=looks)
    if block is not None and callable(logits) and (group["levenberg_marquardt"] or group["measure"]):
        measure = functools.partial(_measure, block, logits)
    solution, damping = _solve(block if looks else None, g, group, memory)
    x = solution.x.double()  # squares of huge vectors stay in range
    slope, curved = float(x @ g.double()), float(x @ solution.product.double())
    stats = {
        "cg_steps": float(solution.steps if solution.method == "cg" else 0),
        "cg_residual": solution.residual,
        "damping": damping,
        **{name: memory[name] for name in ("fisher_mean", "fisher_std", "condition_number") if name in memory},
    }
    damped = curved + damping * float(x @ x)
    return StepPlan(
        began, moving, group, memory, solution.outcome, solution.x, slope, curved, damped, stats, measure,
    )  # fmt: skip


def take(plan: StepPlan) -> BasinOutcome:
    """The planned step: parameters move, or the outcome says why not."""
    group, memory = plan.group, plan.memory

    def done(outcome: str, moved: bool, **stats: float) -> BasinOutcome:
        if moved:
            memory["solution"] = plan.x
            memory["step"] += 1
        return BasinOutcome(outcome, moved, {**plan.stats, **stats, "seconds": time.perf_counter() - plan.began})

    lost = plan.outcome in ("singular", "non_finite")
    if lost or (plan.outcome == "negative_curvature" and not (plan.slope > 0 and plan.damped > 0)):
        if group["levenberg_marquardt"]:
            memory["damping"] *= RAISE
        return done(plan.outcome, False)

    size = float(group["lr"])
    bound = plan.curved if plan.curved > 0 else plan.damped  # a Hessian may curve down where lambda holds it
    if group["max_kl"] is not None and bound > 0:
        size = min(size, math.sqrt(2 * group["max_kl"] / bound))

    def predicted() -> float:
        return size * plan.slope - size**2 * plan.curved / 2

    before = [p.clone() for p in plan.params] if group["levenberg_marquardt"] else []
    _move(plan.params, plan.x, size, group)
    stats = {"predicted_reduction": predicted(), "kl_per_step": size**2 * plan.curved / 2, "step_size": size}
    if plan.measure is None:
        return done(plan.outcome, True, **stats)
    actual, kl = plan.measure()
    if group["levenberg_marquardt"]:
        _follow(memory, actual, predicted())
        for _ in range(HALVINGS):
            if actual > 0 or plan.slope <= 0:
                break
            size /= 2
            torch._foreach_copy_(plan.params, before)
            _move(plan.params, plan.x, size, group)
            actual, kl = plan.measure()
        if not actual > 0 and plan.slope != 0:
            torch._foreach_copy_(plan.params, before)
            memory["solution"] = torch.zeros_like(plan.x)  # or momentum would bring the same step back for ever
            return done("rejected", False, **stats)
    measured = {"predicted_reduction": predicted(), "actual_reduction": actual, "kl_per_step": kl, "step_size": size}
    return done(plan.outcome, True, **measured)


def _remember(memory: dict[str, Any], g: Tensor, group: dict[str, Any]) -> None:
    """A block seen first, or with other parameters than before."""
    memory.clear()
    generator = torch.Generator(device=g.device).manual_seed(group["seed"])
    memory |= {
        "step": torch.zeros((), dtype=torch.float32),
        "solution": torch.zeros_like(g),
        "damping": float(group["damping"]),
        "generator": generator.get_state(),
        "looks": 0,
    }


def look_once(logits: Callable[[], Tensor]) -> Tensor:
    """Logits with a graph that can be differentiated twice."""
    with torch.enable_grad(), twice_differentiable():
        return logits()


def _look(
    params: list[Tensor],
    group: dict[str, Any],
    memory: dict[str, Any],
    logits: Logits | None,
    targets: Tensor | None,
    jacobian: Tensor | Callable[[], Tensor] | None,
    *,
    graph: bool,
) -> FisherBlock:
    if logits is None:
        raise ConfigError(
            f"a natural step of kind={group['kind']!r} needs logits: after loss.backward(retain_graph=True) call"
            " step(logits=logits), or pass a callable, or a closure that returns (loss, logits)"
        )
    if (group["levenberg_marquardt"] or group["measure"]) and (targets is None or not callable(logits)):
        raise ConfigError("measuring a step needs logits as a callable, to call again after it, and their targets")
    if callable(logits):
        outputs = look_once(logits) if graph and jacobian is None else logits()
    else:
        outputs = logits
    generator = torch.Generator(device=outputs.device)
    generator.set_state(memory["generator"].cpu())
    return FisherBlock(
        outputs, params, kind=group["kind"], likelihood=group["likelihood"], targets=targets, generator=generator,
        reduction=group["reduction"], jacobian=jacobian() if callable(jacobian) else jacobian,
    )  # fmt: skip


def _solve(
    block: FisherBlock | None, g: Tensor, group: dict[str, Any], memory: dict[str, Any]
) -> tuple[Solution, float]:
    """Solution and lambda; without a block from what an earlier one left in `memory`."""
    damping = float(memory["damping"] if group["levenberg_marquardt"] else group["damping"])
    previous = memory["solution"].to(g.device)
    right = g.add(previous, alpha=damping * group["momentum"]) if group["momentum"] else g
    if block is None:
        if "matrix" in memory:
            return dense(memory["matrix"], right, damping=damping), damping
        if "directions" in memory:
            return krylov(memory["directions"], memory["products"], right, damping=damping), damping
        around = group["momentum"] * previous
        return sample_space(memory["factor"], right, damping=damping, around=around, within=True), damping

    method = choose(block, damping) if group["solver"] == "auto" else group["solver"]
    keep = group["refresh"] > 1
    known: dict[str, Any] = {}
    diagonal = None
    # least squares: its residual spares the solvers the rounding of the gradient
    squares = group["likelihood"] == "gaussian" and group["kind"] == "exact" and block.targets is not None
    squares = squares and not group["maximize"]
    if method == "dense":
        cheap = block.jacobian is not None or block.rows <= max(2 * block.size, PASSES_LIMIT)
        rows = block.factor() if squares and cheap else None
        matrix = block.matrix() if rows is None else rows.mT @ rows
        diagonal = matrix.diagonal()
        residual = None if rows is None else block.residual()
        solution = dense(matrix, right, damping=damping, factor_RP=rows, residual=residual)
        known = {"matrix": matrix}
    elif method == "sample_space":
        factor = block.factor()
        diagonal = factor.square().sum(0)
        residual = block.residual() if squares else None
        around = group["momentum"] * previous
        solution = sample_space(factor, right, damping=damping, residual=residual, around=around, within=True)
        known = {"factor": factor}
    else:
        preconditioner = None
        if group["precondition"]:
            diagonal = block.diagonal(samples=1)[0]
            diagonal = diagonal.lerp(memory.get("diagonal", diagonal), DIAGONAL_DECAY)
            memory["diagonal"] = diagonal
            preconditioner = (diagonal + damping) ** 0.75
        elif group["kind"] in ("exact", "sampled") and memory["looks"] % LOOK_EVERY == 0:
            diagonal = block.diagonal(samples=1)[0]
        start = group["warm_start"] * previous if group["warm_start"] and bool(previous.any()) else None
        solution = cg(
            block.matvec, right, damping=damping, start=start, preconditioner=preconditioner,
            tolerance=group["tolerance"], max_steps=group["cg_iters"], keep=keep,
        )  # fmt: skip
        if solution.directions_KP is not None and solution.products_KP is not None:
            known = {"directions": solution.directions_KP, "products": solution.products_KP}
    for name in CACHES:
        memory.pop(name, None)
    if keep and solution.outcome in ("converged", "max_steps"):
        memory |= known
    if diagonal is not None:
        memory["fisher_mean"], memory["fisher_std"] = float(diagonal.mean()), float(diagonal.std(correction=0))
    if solution.spectrum[1] > 0:
        memory["condition_number"] = solution.condition_number
    assert block.generator is not None
    memory["looks"] += 1
    memory["generator"] = block.generator.get_state()
    return solution, damping


def _move(params: list[Tensor], x: Tensor, size: float, group: dict[str, Any]) -> None:
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - float(group["lr"]) * group["weight_decay"])
    torch._foreach_add_(params, unflatten(x, params), alpha=-size)


def _measure(block: FisherBlock, logits: Callable[[], Tensor]) -> tuple[float, float]:
    """(loss that fell, KL of the model from what it was), nats."""
    with twice_differentiable():  # the products that the block was made with
        now = logits()
    return block.loss_nats() - block.loss_nats(now), block.divergence_nats(now)


def _follow(memory: dict[str, Any], actual: float, predicted: float) -> None:
    """Damping after Levenberg (1944) and Marquardt (1963), from the whole step; lowered faster than raised, as
    Transtrum & Sethna (2012) advise for narrow valleys."""
    if not actual > predicted / 4:
        memory["damping"] *= RAISE
    elif actual > predicted * 3 / 4:
        memory["damping"] *= LOWER
