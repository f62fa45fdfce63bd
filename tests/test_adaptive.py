"""A closed gate is the cheap optimizer, an open one the exact; the budget holds at every step; the gate resumes."""

import copy
import dataclasses
import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from constellation.errors import ConfigError
from constellation.optim.adaptive import AdaptiveMixedQIG
from constellation.optim.gate import AdaptiveConfig, get_recommended_config_for_phase
from constellation.optim.gate_costs import GateCosts
from constellation.optim.mixed import HybridGeometricOptimizer
from constellation.optim.registry import PhaseSchedule

X = torch.randint(0, 12, (20, 3), generator=torch.Generator().manual_seed(0))
Y = X.sum(1) % 4
NEVER = AdaptiveConfig(math.inf, math.inf, 0, False, False, False, False)
ALWAYS = AdaptiveConfig(force_ng_every_n_steps=1, max_overhead=0.0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.basin = nn.Embedding(12, 5, dtype=torch.float64)
            self.basin_norm = nn.Parameter(torch.ones(5, dtype=torch.float64))
            self.mlp = nn.Linear(5, 8, dtype=torch.float64)
            self.head = nn.Linear(8, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mlp(self.basin(x).mean(1) * self.basin_norm)))


class Clock:
    """Seconds that pass as told: `gap` in every backward pass, `product` in every look at the likelihood."""

    def __init__(self, product: float = 0.0, gap: float = 1.0, tick: float = 0.0):
        self.now, self.product, self.gap, self.tick = 0.0, product, gap, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def train(
    model: Model,
    optimizer: torch.optim.Optimizer,
    steps: int,
    clock: Clock | None = None,
    telemetry: Callable[[int], dict[str, Any]] | None = None,
    start: int = 0,
) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()

        def rows() -> Tensor:
            if clock is not None:
                clock.now += clock.product
            return model(X)

        if clock is not None:
            clock.now += clock.gap
        losses.append(float(loss.detach()))
        if isinstance(optimizer, AdaptiveMixedQIG):
            told = {"loss": losses[-1], **(telemetry(step) if telemetry else {})}
            optimizer.step(logits=rows, targets=Y, telemetry=told)
        elif isinstance(optimizer, HybridGeometricOptimizer):
            optimizer.step(logits=rows, targets=Y)
        else:
            optimizer.step()
    return losses


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rest", ["adamw", "diagonal_ng", "kron"])
def test_a_gate_that_never_opens_is_the_cheap_optimizer_bit_for_bit(exact: bool, rest: str) -> None:
    ours, theirs = Model(), Model()
    gated = AdaptiveMixedQIG(ours, 0.05, 0.02, exact, NEVER, rest_optimizer=rest)
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    cheap: torch.optim.Optimizer
    if rest == "adamw":
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        cheap = torch.optim.AdamW(groups, 0.02, fused=True)
    else:
        method = {"adamw": "adamw", "diagonal_ng": "diag", "kron": "kron"}[rest]
        other = "diag" if rest == "kron" else method
        if rest == "kron":  # the embedding goes by the diagonal
            matrices, vectors = matrices[1:], [matrices[0], *vectors]
        groups = [
            {"params": matrices, "method": method, "weight_decay": 0.01},
            {"params": vectors, "method": other, "fisher_decay": 0.95, "damping": 1e-8},
        ]
        cheap = HybridGeometricOptimizer(groups, lr_rest=0.02)
    assert train(ours, gated, 10) == train(theirs, cheap, 10)
    assert gated.get_stats()["natural_steps"] == 0.0


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rest", ["adamw", "diagonal_ng", "kron"])
def test_a_gate_that_is_always_open_is_the_hybrid_bit_for_bit(exact: bool, rest: str) -> None:
    ours, theirs = Model(), Model()
    gated = AdaptiveMixedQIG(ours, 0.05, 0.02, exact, ALWAYS, rest_optimizer=rest)
    hybrid = HybridGeometricOptimizer(theirs, 0.05, 0.02, use_exact_ng=exact, rest_optimizer=rest)
    assert train(ours, gated, 10) == train(theirs, hybrid, 10)
    assert gated.get_stats()["natural_steps"] == gated.get_stats()["ng_applications"] == 10.0


def test_a_schedule_puts_the_gate_of_its_phase_in_force() -> None:
    schedule = PhaseSchedule(middle=0.3, late=0.6, fine_tune=0.9, middle_gate="always", late_gate="never")
    free = AdaptiveConfig(max_overhead=0.0, kappa_every=0)
    optimizer = AdaptiveMixedQIG(Model(), 0.05, 0.02, True, free, schedule=schedule)
    natural = []
    for done in range(10):
        told = {"progress": done / 10, "kappa_eff": 45.0 if done == 9 else 35.0}
        natural.append(bool(optimizer.should_apply_ng(told, step=done + 1)))
    assert natural == [True] * 6 + [False] * 4, "early opens at kappa 30, fine_tune not at 45"
    with pytest.raises(ConfigError, match="progress"):
        optimizer.should_apply_ng({}, step=1)


def test_one_row_in_every_phase_is_that_phase_bit_for_bit() -> None:
    ours, theirs = Model(), Model()
    gate = dataclasses.replace(get_recommended_config_for_phase("late"), max_overhead=0.0)
    rows = PhaseSchedule(early_gate="late", middle_gate="late", late_gate="late", fine_tune_gate="late")
    scheduled = AdaptiveMixedQIG(ours, 0.05, 0.02, True, AdaptiveConfig(max_overhead=0.0), schedule=rows)
    fixed = AdaptiveMixedQIG(theirs, 0.05, 0.02, True, gate)
    told = lambda step: {"progress": step / 10, "kappa_eff": 40.0 + 2 * step}  # noqa: E731
    assert train(ours, scheduled, 10, telemetry=told) == train(theirs, fixed, 10, telemetry=told)
    assert 0 < scheduled.get_stats()["natural_steps"] == fixed.get_stats()["natural_steps"] < 10


def test_step_acts_on_the_decision_that_should_apply_ng_returned() -> None:
    model, config = Model(), AdaptiveConfig(force_ng_every_n_steps=0, max_overhead=0.0)
    optimizer = AdaptiveMixedQIG(model, 0.05, 0.02, True, config)
    for step, mood in enumerate(["STUCK", "calm", "EXPLORATION"]):
        decision = optimizer.should_apply_ng({"curiosity_regime": mood}, step)
        logits = model(X)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, Y).backward(retain_graph=decision)
        optimizer.step(logits=logits)
        assert optimizer.decision is decision and bool(decision) == (mood != "calm")
    assert optimizer.get_stats()["natural_steps"] == 2.0
    assert optimizer.get_stats()["natural_rate"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("product", [0.05, 3.0, 40.0])
@pytest.mark.parametrize("limit", [1.1, 1.3, 2.0])
def test_the_budget_holds_at_every_step_and_is_spent(product: float, limit: float) -> None:
    clock = Clock(product=product)
    model = Model()
    config = AdaptiveConfig(force_ng_every_n_steps=1, max_overhead=limit, kappa_every=0)
    optimizer = AdaptiveMixedQIG(model, 0.01, 0.01, True, config, clock=clock, cg_iters=8)
    for step in range(200):
        train(model, optimizer, 1, clock, start=step)
        gate = optimizer.param_groups[0]["gate"]  # the price of the first natural step is a guess, the others' known
        assert gate["extra_s"] <= max((limit - 1) * gate["cheap_s"], product) + 1e-9
    stats = optimizer.get_stats()
    assert stats["natural_seconds"] == pytest.approx(stats["natural_steps"] * product)
    earned, waited = (limit - 1) * 200 / product, 8 / (limit - 1)  # steps until 8 gradients are affordable
    assert 0.7 * min(200 - waited, earned) - 2 <= stats["natural_steps"] <= min(200, earned) + 1
    assert stats["natural_steps"] + stats["refused_steps"] == 200.0


def test_a_refused_step_says_what_it_would_have_cost() -> None:
    clock = Clock(product=100.0)
    model = Model()
    optimizer = AdaptiveMixedQIG(model, 0.01, 0.01, True, AdaptiveConfig(force_ng_every_n_steps=1), clock=clock)
    train(model, optimizer, 3, clock)
    assert optimizer.decision.reasons[0].startswith("forced") and "overhead would be" in optimizer.decision.reasons[1]


def test_own_kappa_is_64_times_the_curvature_over_its_reference() -> None:
    model = Model()
    config = AdaptiveConfig(force_ng_every_n_steps=0, max_overhead=0.0, kappa_every=1, min_kappa_for_ng=1e9)
    optimizer = AdaptiveMixedQIG(model, 0.01, 0.01, True, config)
    train(model, optimizer, 16)
    assert "kappa_eff" not in optimizer.get_stats()  # the calibration window
    reference = sorted(optimizer.param_groups[0]["gate"]["curvatures"])
    before = copy.deepcopy(model)
    train(model, optimizer, 1)
    block = [before.basin.weight, before.basin_norm]
    logits = before(X)
    g = torch.autograd.grad(nn.functional.cross_entropy(logits, Y), block, retain_graph=True)
    flat = torch.cat([t.flatten() for t in g])
    p = torch.softmax(logits.detach(), -1)
    jacobian = torch.stack([
        torch.cat([t.flatten() for t in torch.autograd.grad(o, block, retain_graph=True)]) for o in logits.flatten()
    ])  # fmt: skip
    jv = (jacobian @ flat).view(20, 4)
    q = float(((p * jv**2).sum() - ((p * jv).sum(1) ** 2).sum()) / 20 / (flat @ flat))
    assert optimizer.get_stats()["kappa_eff"] == pytest.approx(64 * q / ((reference[7] + reference[8]) / 2), rel=1e-9)


def test_told_kappa_wins_over_the_measured_one() -> None:
    model = Model()
    optimizer = AdaptiveMixedQIG(model, 0.01, 0.01, False, AdaptiveConfig(force_ng_every_n_steps=0))
    train(model, optimizer, 3, telemetry=lambda step: {"kappa_eff": 41.0 if step == 1 else 39.0})
    assert optimizer.get_stats()["natural_steps"] == 1.0 and not optimizer.param_groups[0]["gate"]["curvatures"]


def test_a_turned_gradient_is_stale() -> None:
    model = Model()
    config = AdaptiveConfig(*(math.inf, math.inf, 0, False, False, False, False), max_staleness=0.7, max_overhead=0)
    optimizer = AdaptiveMixedQIG(model, 0.05, 0.02, False, config)
    applied = []
    for step in range(60):
        train(model, optimizer, 1, start=step)
        applied.append(optimizer.decision.apply)
    assert applied[0] and not all(applied[:5]) and 2 <= sum(applied) < 30  # at once, then only when it has turned


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("stop", [2, 7, 18])
def test_parameters_and_gate_resume_bit_for_bit(exact: bool, stop: int) -> None:
    config = AdaptiveConfig(force_ng_every_n_steps=5, max_overhead=2.0, kappa_every=3, max_staleness=1.0)

    def made(model: Model, clock: Clock) -> AdaptiveMixedQIG:
        return AdaptiveMixedQIG(model, 0.05, 0.02, exact, config, clock=clock, rest_optimizer="kron")

    def telemetry(step: int) -> dict[str, Any]:
        return {"basin_distance": 0.7 if step % 7 == 3 else 0.1}

    clock = Clock(product=0.2)
    alone, model = Model(), Model()
    optimizer = made(alone, clock)
    losses = train(alone, optimizer, 24, clock, telemetry)
    clock = Clock(product=0.2)
    before = made(model, clock)
    train(model, before, stop, clock, telemetry)
    torch.save(before.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    resumed, clock = copy.deepcopy(model), Clock(product=0.2)
    after = made(resumed, clock)
    after.load_state_dict(torch.load(buffer, weights_only=True))
    assert train(resumed, after, 24 - stop, clock, telemetry, start=stop) == losses[stop:]
    ours, theirs = (o.param_groups[0]["gate"] for o in (after, optimizer))
    assert ours["natural_steps"] == theirs["natural_steps"] > 1 and ours["curvatures"] == theirs["curvatures"]


def test_nothing_moves_and_the_gate_remembers_nothing_when_gradients_are_damaged() -> None:
    model, before = Model(), Model()
    optimizer = AdaptiveMixedQIG(model, 0.05, 0.02, False, ALWAYS)
    nn.functional.cross_entropy(model(X), Y).backward()
    model.head.bias.grad = torch.full((4,), torch.nan, dtype=torch.float64)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert optimizer.outcome == "skipped" and optimizer.get_stats()["natural_steps"] == 0.0


def test_the_closure_may_return_loss_and_logits() -> None:
    model = Model()
    optimizer = AdaptiveMixedQIG(model, 0.05, 0.02, True, ALWAYS)

    def closure() -> Any:
        optimizer.zero_grad()
        logits = model(X)
        loss = nn.functional.cross_entropy(logits, Y)
        loss.backward(retain_graph=True)
        return loss, logits

    losses = [float(optimizer.step(closure).detach()) for _ in range(10)]
    assert losses[-1] < losses[0] and optimizer.get_stats()["natural_gain"] > 0


def test_impossible_requests_are_named() -> None:
    groups = [{"params": [torch.zeros(2, 2, requires_grad=True)], "method": "diag"}]
    with pytest.raises(ConfigError, match="named_parameters"):
        AdaptiveMixedQIG(groups)
    with pytest.raises(ConfigError, match="empty"):
        AdaptiveMixedQIG(Model(), basin="*memory*")
    with pytest.raises(ConfigError, match="needs logits"):
        model = Model()
        nn.functional.cross_entropy(model(X), Y).backward()
        AdaptiveMixedQIG(model, use_exact_ng=True, adaptive_config=ALWAYS).step()


def test_the_ledger_counts_a_pause_as_three_gaps_and_prices_a_nat() -> None:
    costs = GateCosts()
    for seconds in [1.0, 1.0, 1000.0]:
        costs.note_gap(seconds)
    assert costs.cheap_s == pytest.approx(5.0) and costs.gap_s == pytest.approx(1.2)
    for loss, natural in zip([4.0, 3.0, 2.9, 1.9], itertools.cycle([True, False]), strict=False):
        costs.note_loss(loss)
        costs.note_step(natural, 2.0 if natural else 0.5, 2.0 if natural else None)
    seen = costs.telemetry(8.0)
    assert costs.natural_gain == pytest.approx(1.0) and costs.cheap_gain == pytest.approx(0.1)
    assert seen["reduction_ratio"] == pytest.approx(0.5)
    assert seen["natural_s_per_nat"] == pytest.approx(3.2) and seen["cheap_s_per_nat"] == pytest.approx(17.0)
    assert costs.overhead == pytest.approx(1 + costs.extra_s / costs.cheap_s) and costs.extra_s == pytest.approx(3.5)


def test_a_natural_step_is_measured_where_the_parameters_have_moved_to() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1, dtype=torch.float64)
    x = torch.randn(20, 3, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [3.0]], dtype=torch.float64) + 0.5
    newton = {"likelihood": "gaussian", "max_kl": None, "levenberg_marquardt": True, "reduction": "sum"}
    free = AdaptiveConfig(force_ng_every_n_steps=1, max_overhead=0.0)
    optimizer = AdaptiveMixedQIG(model, 1.0, 0.1, True, free, basin=["*"], basin_options=newton)
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum() / 2
        loss.backward()
        optimizer.step(logits=lambda: model(x), targets=y, telemetry={"loss": float(loss.detach())})
        assert optimizer.outcome != "rejected"
    assert float((model(x) - y).detach().square().sum()) < 1e-6, "least squares: Gauss-Newton is there in a few steps"
