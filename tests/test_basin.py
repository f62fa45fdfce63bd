"""BasinNaturalGrad: the laws of a natural step, what it refuses, and that it resumes to the bit."""

import copy
import io
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from constellation.errors import ConfigError
from constellation.geometry.fisher import FisherBlock, flatten, jacobian_rows
from constellation.optim.basin import BASIN_SETTINGS, BasinNaturalGrad, basin_step

N, V = 24, 4
SOLVERS = ("cg", "sample_space", "dense")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, V)).to(dtype)


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = seeded(seed)
    return torch.randn(N, 3, generator=g, dtype=torch.float64).to(dtype), torch.randint(0, V, (N,), generator=g)


def backward(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    net.zero_grad()
    f = net(x)
    loss = F.cross_entropy(f, y)
    loss.backward(retain_graph=True)
    return loss.item(), f


def train(net: nn.Module, optimizer: BasinNaturalGrad, steps: int, first: int = 0) -> list[float]:
    losses = []
    for i in range(first, first + steps):
        x, y = batch(i, next(net.parameters()).dtype)
        loss, f = backward(net, x, y)
        optimizer.step(logits=f, targets=y)
        losses.append(loss)
    return losses


def weights(net: nn.Module) -> Tensor:
    return flatten(list(net.parameters()))


def exact_solver(**settings: Any) -> dict[str, Any]:
    return {"cg_iters": 400, "tolerance": 1e-15, "warm_start": 0.0, **settings}


# ---- laws of one step


def ill_conditioned(rows: int, size: int) -> Tensor:
    least = min(rows, size)
    u, v = (torch.linalg.qr(torch.randn(n, least, generator=seeded(n), dtype=torch.float64)).Q for n in (rows, size))
    x = u @ torch.diag(torch.logspace(0, -math.log10(7e5), least, dtype=torch.float64)) @ v.mT
    assert torch.linalg.cond(x) == pytest.approx(7e5, rel=1e-6)
    return x


@pytest.mark.parametrize(("solver", "rows", "size"), [("dense", 60, 12), ("sample_space", 12, 60)])
def test_one_exact_step_solves_linear_least_squares(solver: str, rows: int, size: int) -> None:
    x = ill_conditioned(rows, size)
    y = x @ torch.randn(size, 1, generator=seeded(), dtype=torch.float64) + (rows > size)
    best = x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    w = torch.zeros(size, 1, dtype=torch.float64, requires_grad=True)
    optimizer = BasinNaturalGrad(
        [w], lr=1.0, damping=0.0 if solver == "dense" else 1e-20, max_kl=None, solver=solver, likelihood="gaussian",
        reduction="sum",
    )  # fmt: skip
    f = x @ w
    ((f - y).square().sum() / 2).backward(retain_graph=True)
    optimizer.step(logits=f, targets=y)
    assert optimizer.outcome == "converged"
    excess = (x @ w - best).square().sum() / (f - best).square().sum()  # of the loss, over the excess before
    assert excess < 1e-12


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_one_exact_step_is_exact_in_the_parameters_of_a_tame_least_squares(condition: float) -> None:
    u, v = (torch.linalg.qr(torch.randn(n, 6, generator=seeded(n), dtype=torch.float64)).Q for n in (30, 6))
    x = u @ torch.diag(torch.linspace(1, 1 / condition, 6, dtype=torch.float64)) @ v.mT
    truth = torch.randn(6, 1, generator=seeded(), dtype=torch.float64)
    w = torch.zeros(6, 1, dtype=torch.float64, requires_grad=True)
    for solver in SOLVERS[0], SOLVERS[2]:
        with torch.no_grad():
            w.zero_()
        w.grad = None
        optimizer = BasinNaturalGrad(
            [w], **exact_solver(lr=1.0, damping=0.0, max_kl=None, solver=solver, likelihood="gaussian")
        )
        f = x @ w
        ((f - x @ truth).square().sum() / 2 / len(x)).backward(retain_graph=True)
        optimizer.step(logits=f)
        assert (w - truth).norm() / truth.norm() < condition**2 * 1e-14


@given(st.sampled_from(["cg", "dense"]), st.sampled_from(["exact", "sampled"]), st.integers(0, 2**20))
@settings(max_examples=20, deadline=None)
def test_steps_are_covariant_under_a_change_of_coordinates(solver: str, kind: str, seed: int) -> None:
    g = seeded(seed)
    x, y = torch.randn(40, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (40,), generator=g)
    b = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64)).Q
    b = b * torch.linspace(0.5, 2, 8, dtype=torch.float64)
    for trust in (None, 1e-3):  # without damping, which is not covariant
        theta = (0.3 * torch.randn(8, generator=g, dtype=torch.float64)).requires_grad_()
        phi = torch.linalg.solve(b, theta.detach()).requires_grad_()
        for leaf, into in ((theta, torch.eye(8, dtype=torch.float64)), (phi, b)):
            optimizer = BasinNaturalGrad(
                [leaf], **exact_solver(lr=0.5, damping=0.0, max_kl=trust, solver=solver, kind=kind, seed=seed)
            )
            f = F.pad(x @ (into @ leaf).view(4, 2), (0, 1))  # the last logit is fixed, so that F is regular
            F.cross_entropy(f, y).backward(retain_graph=True)
            optimizer.step(logits=f)
            assert optimizer.outcome in ("converged", "max_steps")
        assert (theta - b @ phi).norm() / theta.norm() < 1e-9


def test_all_solvers_take_the_same_step() -> None:
    x, y = batch()
    ends = []
    for solver in (*SOLVERS, "auto"):
        net = model()
        _, f = backward(net, x, y)
        BasinNaturalGrad(net.parameters(), **exact_solver(lr=0.3, solver=solver)).step(logits=f, targets=y)
        ends.append(weights(net) - weights(model()))
    assert all((e - ends[0]).norm() / ends[0].norm() < 1e-8 for e in ends)


def test_the_step_is_the_formula() -> None:
    net, (x, y) = model(), batch()
    _, f = backward(net, x, y)
    params = list(net.parameters())
    g, fisher = flatten([p.grad for p in params if p.grad is not None]), FisherBlock(f, params).matrix()
    before, previous = weights(net), torch.zeros(len(fisher), dtype=torch.float64)
    optimizer = BasinNaturalGrad(
        params, lr=0.2, damping=0.1, weight_decay=0.3, momentum=0.9, max_kl=None, solver="dense"
    )
    for _ in range(2):
        _, f = backward(net, x, y)
        g, fisher = flatten([p.grad for p in params if p.grad is not None]), FisherBlock(f, params).matrix()
        previous = torch.linalg.solve(fisher + 0.1 * torch.eye(len(g), dtype=torch.float64), g + 0.09 * previous)
        before = (1 - 0.2 * 0.3) * before - 0.2 * previous
        optimizer.step(logits=f)
        assert (weights(net) - before).norm() < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_trust_region_bounds_the_measured_divergence(solver: str) -> None:
    net, (x, y) = model(), batch()
    _, f = backward(net, x, y)
    optimizer = BasinNaturalGrad(net.parameters(), lr=1e6, damping=1e-3, max_kl=1e-6, solver=solver)
    optimizer.step(logits=f, targets=y)
    with torch.no_grad():
        log_p, log_q = f.log_softmax(-1), net(x).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert kl == pytest.approx(1e-6, rel=0.05)
    assert optimizer.get_stats()["kl_per_step"] == pytest.approx(1e-6, rel=1e-9)


@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_predicted_reduction_is_the_actual_one_to_second_order(size: float) -> None:
    net, (x, y) = model(), batch()
    loss, _ = backward(net, x, y)
    optimizer = BasinNaturalGrad(net.parameters(), lr=size, damping=0.1, measure=True, max_kl=None)
    optimizer.step(logits=lambda: net(x), targets=y)
    stats = optimizer.get_stats()
    assert stats["actual_reduction"] == pytest.approx(loss - F.cross_entropy(net(x), y).item(), abs=1e-14)
    assert stats["actual_reduction"] == pytest.approx(stats["predicted_reduction"], rel=2 * size)
    assert stats["kl_per_step"] > 0


def test_maximize_climbs_where_minimize_descends() -> None:
    (x, y), ends = batch(), []
    for sign, maximize in ((1, False), (-1, True)):
        net = model()
        f = net(x)
        (sign * F.cross_entropy(f, y)).backward(retain_graph=True)
        BasinNaturalGrad(net.parameters(), lr=0.3, maximize=maximize).step(logits=f)
        ends.append(weights(net))
    assert torch.equal(*ends)


# ---- curvature that comes in other ways


def test_a_callable_a_closure_and_living_logits_give_one_step() -> None:
    (x, y), ends = batch(), []
    for way in ("tensor", "callable", "closure", "jacobian"):
        net = model()
        optimizer = BasinNaturalGrad(net.parameters(), lr=0.3, damping=0.01, solver="dense")
        names, params = [n for n, _ in net.named_parameters()], list(net.parameters())

        def closure() -> tuple[Tensor, Tensor]:
            optimizer.zero_grad()  # noqa: B023
            f = net(x)  # noqa: B023
            loss = F.cross_entropy(f, y)
            loss.backward(retain_graph=True)
            return loss, f

        def one(p: tuple[Tensor, ...], row: Tensor) -> Tensor:
            return torch.func.functional_call(net, dict(zip(names, p, strict=True)), (row,))  # noqa: B023

        if way == "closure":
            assert optimizer.step(closure).item() == pytest.approx(F.cross_entropy(model()(x), y).item())
        else:
            _, f = backward(net, x, y)
            rows = jacobian_rows(one, params, x) if way == "jacobian" else None
            optimizer.step(logits=(lambda: net(x)) if way == "callable" else f, targets=y, jacobian=rows)  # noqa: B023
        ends.append(weights(net))
    assert all((e - ends[0]).norm() < 1e-12 for e in ends)


def test_a_sub_batch_gives_the_curvature_and_the_whole_batch_the_gradient() -> None:
    net, (x, y) = model(), batch()
    before = weights(net)
    _, _ = backward(net, x, y)
    params = list(net.parameters())
    fisher = FisherBlock(net(x[:3]), params).matrix()
    g = flatten([p.grad for p in params if p.grad is not None])
    optimizer = BasinNaturalGrad(params, lr=1.0, damping=0.5, max_kl=None, solver="dense")
    optimizer.step(logits=lambda: net(x[:3]))
    expected = before - torch.linalg.solve(fisher + 0.5 * torch.eye(len(g), dtype=torch.float64), g)
    assert (weights(net) - expected).norm() < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_between_refreshes_the_last_look_serves_without_logits(solver: str) -> None:
    net = model()
    optimizer = BasinNaturalGrad(net.parameters(), lr=0.1, damping=0.05, refresh=3, solver=solver)
    looks = 0
    losses = []
    for i in range(9):
        x, y = batch(0)
        loss, f = backward(net, x, y)
        losses.append(loss)
        looks += i % 3 == 0
        before = weights(net)
        optimizer.step(logits=f if i % 3 == 0 else None, targets=y)
        assert not torch.equal(before, weights(net))
    assert int(optimizer.state[next(net.parameters())]["looks"]) == looks == 3
    assert losses[-1] < losses[0]


def test_for_the_same_gradient_a_dense_look_back_is_the_look_itself() -> None:
    x, y = batch()
    ends = []
    for refresh in (1, 100):
        net = model()
        optimizer = BasinNaturalGrad(net.parameters(), lr=0.0, refresh=refresh, solver="dense")
        for _ in range(2):
            _, f = backward(net, x, y)
            optimizer.step(logits=f)
        ends.append(optimizer.state[next(net.parameters())]["solution"])
    assert (ends[0] - ends[1]).norm() / ends[0].norm() < 1e-12


def test_several_groups_are_a_block_diagonal_fisher() -> None:
    net, (x, y) = model(), batch()
    both = [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters()), "lr": 0.1}]
    optimizer = BasinNaturalGrad(both, lr=0.3, damping=0.01, solver="dense")
    _, f = backward(net, x, y)
    optimizer.step(logits=f)
    for part, rate in ((0, 0.3), (2, 0.1)):
        alone = model()
        _, f = backward(alone, x, y)
        BasinNaturalGrad(alone[part].parameters(), lr=rate, damping=0.01, solver="dense").step(logits=f)
        assert (weights(alone[part]) - weights(net[part])).norm() < 1e-13


def test_warm_start_lowers_the_residual_left_after_few_iterations() -> None:
    residuals = {}
    for warm in (0.0, 0.9):
        net, (x, y) = model(), batch()
        optimizer = BasinNaturalGrad(net.parameters(), lr=1e-3, damping=1e-3, cg_iters=4, warm_start=warm, solver="cg")
        for _ in range(6):
            _, f = backward(net, x, y)
            optimizer.step(logits=f)
        residuals[warm] = optimizer.get_stats()["cg_residual"]
    assert residuals[0.9] < 0.7 * residuals[0.0]


@pytest.mark.parametrize("settings", [
    {"solver": "cg"}, {"solver": "cg", "precondition": True}, {"solver": "dense", "kind": "sampled", "damping": 0.1},
    {"solver": "sample_space", "kind": "empirical", "damping": 0.1}, {"solver": "sample_space", "momentum": 0.9},
    {"solver": "cg", "kind": "hessian", "damping": 1.0},
])  # fmt: skip
def test_every_way_trains(settings: dict[str, Any]) -> None:
    net, (x, y) = model(), batch()
    optimizer = BasinNaturalGrad(net.parameters(), **{"lr": 0.5, "damping": 1e-2, **settings})
    for _ in range(25):
        loss, f = backward(net, x, y)
        optimizer.step(logits=f, targets=y)
    assert loss < 0.9 * F.cross_entropy(model()(x), y).item()


# ---- Levenberg-Marquardt


def fit_curve(**settings: Any) -> tuple[list[float], BasinNaturalGrad]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    y = torch.sin(4 * x)
    optimizer = BasinNaturalGrad(
        net.parameters(), lr=1.0, likelihood="gaussian", max_kl=None, levenberg_marquardt=True, **settings
    )
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        f = net(x)
        ((f - y).square().sum() / 2 / len(x)).backward()
        optimizer.step(logits=lambda: net(x), targets=y)
        losses.append((net(x) - y).square().mean().item() / 2)
    return losses, optimizer


@pytest.mark.parametrize("solver", ["dense", "sample_space"])
def test_levenberg_marquardt_never_climbs_and_fits_a_curve(solver: str) -> None:
    losses, optimizer = fit_curve(damping=1e-2, solver=solver)
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert losses[-1] < 1e-6
    assert optimizer.get_stats()["damping"] < 1e-2


def test_a_step_that_cannot_lower_the_loss_is_undone_and_damped_more() -> None:
    net, (x, y) = model(), batch()
    optimizer = BasinNaturalGrad(net.parameters(), lr=1.0, max_kl=None, levenberg_marquardt=True)
    _, _ = backward(net, x, y)
    for p in net.parameters():
        assert p.grad is not None
        p.grad.neg_()  # uphill, whatever the size
    before = weights(net)
    optimizer.step(logits=lambda: net(x), targets=y)
    assert optimizer.outcome == "rejected" and torch.equal(weights(net), before)
    assert optimizer.state[next(net.parameters())]["damping"] > 1e-4


def test_momentum_does_not_outlive_a_rejected_step() -> None:
    losses, optimizer = fit_curve(damping=1e-2, momentum=0.9, solver="dense")
    assert losses[-1] < losses[0] / 100 and optimizer.get_stats()["natural_steps"] > 30


# ---- conventions of torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [
    {"solver": "cg", "kind": "sampled"}, {"solver": "cg", "precondition": True, "momentum": 0.9},
    {"solver": "dense", "refresh": 3}, {"solver": "cg", "refresh": 3}, {"solver": "sample_space", "kind": "sampled"},
])  # fmt: skip
def test_resumes_to_the_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    straight = model(dtype=dtype)
    optimizer = BasinNaturalGrad(straight.parameters(), lr=0.1, damping=1e-2, **settings)
    train(straight, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(straight, optimizer, 5, first=4)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = model(seed=1, dtype=dtype)
    resumed.load_state_dict(saved["model"])
    again = BasinNaturalGrad(resumed.parameters(), lr=7.0)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, 5, first=4)
    assert torch.equal(weights(straight), weights(resumed))
    a, b = (o.state[next(iter(o.state))] for o in (optimizer, again))
    assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert a["solution"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_levenberg_marquardt_resumes_its_damping() -> None:
    ends = []
    for cut in (False, True):
        net, (x, y) = model(), batch()
        optimizer = BasinNaturalGrad(net.parameters(), lr=1.0, max_kl=None, levenberg_marquardt=True)
        for i in range(6):
            if cut and i == 3:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = BasinNaturalGrad(net.parameters())
                optimizer.load_state_dict(state)
            backward(net, x, y)
            optimizer.step(logits=lambda: net(x), targets=y)  # noqa: B023
        ends.append(weights(net))
    assert torch.equal(*ends)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    (x, y), ends = batch(), []
    for parts in (1, 4):
        net = model()
        for rows, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(net(rows), labels) / parts).backward()
        BasinNaturalGrad(net.parameters(), lr=0.3).step(logits=lambda: net(x))  # noqa: B023
        ends.append(weights(net))
    assert (ends[0] - ends[1]).norm() < 1e-10


def test_schedulers_drive_the_rate() -> None:
    net = model()
    optimizer = BasinNaturalGrad(net.parameters(), lr=0.5, max_kl=None)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    train(net, optimizer, 1)
    assert optimizer.get_stats()["step_size"] == 0.5
    schedule.step()
    train(net, optimizer, 1)
    assert optimizer.get_stats()["step_size"] == pytest.approx(0.05)


def test_a_group_added_later_moves() -> None:
    net = model()
    optimizer = BasinNaturalGrad(net[2].parameters(), lr=0.3)
    train(net, optimizer, 1)
    still = weights(net[0])
    assert torch.equal(still, weights(model()[0]))
    optimizer.add_param_group({"params": list(net[0].parameters())})
    train(net, optimizer, 1)
    assert not torch.equal(still, weights(net[0]))
    assert optimizer.get_stats()["num_basin_params"] == len(weights(net))


def test_grad_scaler_changes_nothing_but_skips_overflow() -> None:
    (x, y), ends = batch(dtype=torch.float32), []
    for scaled in (False, True):
        net = model(dtype=torch.float32)
        optimizer = BasinNaturalGrad(net.parameters(), lr=0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        f = net(x)
        scaler.scale(F.cross_entropy(f, y)).backward(retain_graph=True)
        scaler.step(optimizer, logits=f)
        scaler.update()
        ends.append(weights(net))
    assert torch.equal(*ends)  # powers of two
    optimizer.zero_grad()
    f = net(x)
    scaler.scale(F.cross_entropy(f, y)).backward(retain_graph=True)
    next(net.parameters()).grad[0] = torch.inf  # type: ignore[index]
    scaler.step(optimizer, logits=f)
    scaler.update()
    assert optimizer.outcome == "skipped" and torch.equal(weights(net), ends[1])
    assert scaler.get_scale() == 2.0**9


def test_bf16_parameters_follow_their_float32_twins() -> None:
    twins = [model(dtype=torch.float32), model(dtype=torch.bfloat16)]
    for net in twins:
        train(net, BasinNaturalGrad(net.parameters(), lr=0.3, damping=1e-2), 5)
    moved = weights(twins[0]) - weights(model(dtype=torch.float32))
    assert (weights(twins[1]) - weights(twins[0])).norm() < 0.2 * moved.norm()


def test_a_copied_optimizer_goes_on() -> None:
    net = model()
    optimizer = BasinNaturalGrad(net.parameters(), lr=0.3)
    train(net, optimizer, 2)
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    assert train(twin, twin_optimizer, 2, first=2) == train(net, optimizer, 2, first=2)


def test_without_gradients_nothing_happens_and_logits_are_not_needed() -> None:
    net = model()
    optimizer = BasinNaturalGrad(net.parameters())
    optimizer.step()
    assert optimizer.outcome == "none" and torch.equal(weights(net), weights(model()))
    assert optimizer.get_stats()["natural_steps"] == 0


def test_it_reports_what_it_did() -> None:
    for solver in SOLVERS:
        net = model()
        optimizer = BasinNaturalGrad(net.parameters(), lr=0.3, solver=solver, measure=True)
        x, y = batch()
        backward(net, x, y)
        optimizer.step(logits=lambda: net(x), targets=y)  # noqa: B023
        stats = optimizer.get_stats()
        assert {
            "fisher_mean", "fisher_std", "condition_number", "cg_steps", "cg_residual", "predicted_reduction",
            "actual_reduction", "kl_per_step", "seconds", "natural_steps", "ng_applications", "num_basin_params",
        } <= stats.keys()  # fmt: skip
        assert all(type(v) is float for v in stats.values())
        assert stats["natural_steps"] == 1 and stats["cg_steps"] == (10 if solver == "cg" else 0)
        if solver != "cg":
            assert stats["fisher_mean"] == pytest.approx(
                FisherBlock(model()(x), list(model().parameters())).matrix().trace().item() / len(weights(net)), abs=1
            )


def test_the_functional_core_takes_the_step_of_the_class() -> None:
    (x, y), nets = batch(), [model(), model()]
    _, f = backward(nets[0], x, y)
    BasinNaturalGrad(nets[0].parameters(), lr=0.3).step(logits=f)
    _, f = backward(nets[1], x, y)
    params, state = list(nets[1].parameters()), {p: {} for p in nets[1].parameters()}
    done = basin_step(params, state, {**BASIN_SETTINGS, "params": params, "lr": 0.3}, f, None)
    assert done.moved and str(done) == "converged"
    assert torch.equal(weights(nets[0]), weights(nets[1]))


def test_a_compiled_model_gives_its_curvature_through_the_module_it_was_made_from() -> None:
    net, (x, y) = model(), batch()
    compiled = torch.compile(net, backend="aot_eager")
    optimizer = BasinNaturalGrad(net.parameters(), lr=0.3, solver="cg")
    f = compiled(x)
    F.cross_entropy(f, y).backward(retain_graph=True)
    with pytest.raises(ConfigError, match=r"runs the module before torch.compile"):
        optimizer.step(logits=f)
    assert torch.equal(weights(net), weights(model()))
    optimizer.step(logits=lambda: net(x))
    plain = model()
    backward(plain, x, y)
    BasinNaturalGrad(plain.parameters(), lr=0.3, solver="cg").step(logits=lambda: plain(x))
    assert (weights(net) - weights(plain)).norm() < 1e-12


# ---- what is refused


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_leave_everything_as_it_was(bad: float) -> None:
    net = model()
    optimizer = BasinNaturalGrad(net.parameters(), lr=0.3)
    train(net, optimizer, 2)
    before, state = weights(net), copy.deepcopy(optimizer.state_dict())
    x, y = batch(5)
    _, f = backward(net, x, y)
    next(net.parameters()).grad[0, 0] = bad  # type: ignore[index]
    optimizer.step(logits=f, targets=y)
    assert optimizer.outcome == "skipped" and torch.equal(weights(net), before)
    assert str(optimizer.state_dict()) == str(state)


@pytest.mark.parametrize("solver", SOLVERS)
def test_curvature_that_is_not_finite_is_an_outcome(solver: str) -> None:
    net, (x, y) = model(), batch()
    optimizer = BasinNaturalGrad(net.parameters(), lr=0.3, solver=solver)
    backward(net, x, y)
    optimizer.step(logits=lambda: net(x * torch.inf))
    assert optimizer.outcome == "non_finite" and torch.equal(weights(net), weights(model()))
    assert optimizer.get_stats()["natural_steps"] == 0
    backward(net, x, y)
    optimizer.step(logits=lambda: net(x))
    assert optimizer.get_stats()["natural_steps"] == 1


def test_a_singular_block_without_damping_is_an_outcome() -> None:
    net, (x, y) = model(), batch()
    optimizer = BasinNaturalGrad(net.parameters(), damping=0.0, solver="dense")  # softmax does not see a constant
    _, f = backward(net, x, y)
    optimizer.step(logits=f)
    assert optimizer.outcome == "singular" and torch.equal(weights(net), weights(model()))


def test_negative_curvature_is_not_followed() -> None:
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[5.0]], dtype=torch.float64)
    for solver in ("cg", "dense"):
        with torch.no_grad():
            w.copy_(torch.tensor([1.0, 1.0]))
        w.grad = None
        optimizer = BasinNaturalGrad([w], lr=1.0, damping=0.0, max_kl=None, kind="hessian", likelihood="gaussian",
                                     solver=solver)  # fmt: skip
        f = (w[0] * w[1]).view(1, 1)  # near a saddle: H = [[1, -3], [-3, 1]], g = (-4, -4)
        ((f - y).square().sum() / 2).backward(retain_graph=True)
        optimizer.step(logits=f, targets=y)
        assert optimizer.outcome == "negative_curvature"
        assert torch.equal(w.detach(), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_and_tiny_gradients_give_finite_steps_within_the_trust_region(scale: float) -> None:
    net, (x, y) = model(dtype=torch.float32), batch(dtype=torch.float32)
    optimizer = BasinNaturalGrad(net.parameters(), lr=1.0, max_kl=1e-3)
    _, f = backward(net, x, y)
    for p in net.parameters():
        assert p.grad is not None
        p.grad.mul_(scale)
    optimizer.step(logits=f)
    assert torch.isfinite(weights(net)).all() and optimizer.outcome in ("converged", "max_steps")
    assert optimizer.get_stats()["kl_per_step"] <= 1.001e-3


def test_zero_gradients_leave_the_parameters() -> None:
    net, (x, y) = model(), batch()
    _, f = backward(net, x, y)
    net.zero_grad(set_to_none=False)
    optimizer = BasinNaturalGrad(net.parameters())
    optimizer.step(logits=f)
    assert optimizer.outcome == "converged" and torch.equal(weights(net), weights(model()))


def test_impossible_requests_say_the_way_out() -> None:
    net, (x, y) = model(), batch()
    for words, broken in {
        "lr=-1": {"lr": -1.0},
        "damping=nan": {"damping": float("nan")},
        "solver='lu': choose one of auto": {"solver": "lu"},
        "kind='fisher'": {"kind": "fisher"},
        "max_kl=0": {"max_kl": 0.0},
        "cg_iters=0": {"cg_iters": 0},
        "refresh=0": {"refresh": 0},
        "unknown setting 'dampign'": {"dampign": 1.0},
        "needs damping above 0": {"solver": "sample_space", "damping": 0.0},
        "samples labels": {"precondition": True, "kind": "empirical"},
        "a loss that is minimised": {"levenberg_marquardt": True, "maximize": True},
    }.items():
        with pytest.raises(ConfigError, match=words):
            BasinNaturalGrad(net.parameters(), **broken)
    with pytest.raises(ConfigError, match="basin group is empty"):
        BasinNaturalGrad([{"params": list(net.parameters())}, {"params": []}])
    optimizer = BasinNaturalGrad(net.parameters())
    with pytest.raises(ConfigError, match="kind='banana'"):
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "kind": "banana"})
    assert len(optimizer.param_groups) == 1
    _, f = backward(net, x, y)
    with pytest.raises(ConfigError, match=r"needs logits: after loss.backward\(retain_graph=True\)"):
        optimizer.step()
    with pytest.raises(ConfigError, match="logits as a callable"):
        BasinNaturalGrad(net.parameters(), measure=True).step(logits=f, targets=y)
    assert torch.equal(weights(net), weights(model()))


@pytest.mark.gpu
def test_it_trains_on_a_gpu() -> None:
    net, (x, y) = model(dtype=torch.float32).cuda(), (t.cuda() for t in batch(dtype=torch.float32))
    optimizer = BasinNaturalGrad(net.parameters(), lr=0.3, kind="sampled", damping=1e-2)
    for _ in range(10):
        loss, f = backward(net, x, y)
        optimizer.step(logits=f, targets=y)
    assert loss < F.cross_entropy(model(dtype=torch.float32).cuda()(x), y).item()


def test_logits_of_sequences_are_rows_in_a_row():
    torch.manual_seed(0)
    x_BTD, y_BT = torch.randn(2, 3, 4), torch.tensor([[0, 1, -100], [2, 1, 0]])
    ends = []
    for flat in (False, True):
        layer = torch.nn.Linear(4, 5)
        torch.nn.init.constant_(layer.bias, 0)
        torch.nn.init.eye_(layer.weight)
        optimizer = BasinNaturalGrad(layer.parameters(), lr=0.1)
        logits = layer(x_BTD.flatten(0, 1) if flat else x_BTD)
        torch.nn.functional.cross_entropy(logits.flatten(0, -2), y_BT.flatten()).backward(retain_graph=True)
        optimizer.step(logits=logits, targets=y_BT.flatten() if flat else y_BT)
        ends.append(layer.weight.detach().clone())
    assert (ends[0] != torch.eye(5, 4)).any()
    torch.testing.assert_close(ends[0], ends[1])
