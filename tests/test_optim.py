"""DiagonalNG and QIGDiagonalNG against closed forms and torch's own optimizers."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from constellation.errors import ConfigError
from constellation.optim import build
from constellation.optim.diagonal import DiagonalNG, QIGDiagonalNG, adamw_step, sampled_diagonal
from constellation.optim.elementwise import BLOCK

ADAM = {"power": 0.5, "damping": 1e-8}


def run(
    make: Any, steps: int = 20, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (7, 5)
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    optimizer = make([x])
    target = torch.randn(shape, generator=generator).to(dtype)
    for i in range(steps):
        optimizer.zero_grad()
        ((x - target) ** 2 * (1 + i % 3)).sum().backward()
        optimizer.step()
    return x.detach()


def test_power_half_is_adamw_bit_for_bit() -> None:
    ours = run(lambda p: DiagonalNG(p, lr=0.1, fisher_decay=0.95, momentum=0.9, weight_decay=0.1, **ADAM))
    theirs = run(lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, fused=True))
    assert torch.equal(ours, theirs)


def test_power_half_is_adam_bit_for_bit() -> None:
    ours = run(lambda p: DiagonalNG(p, lr=0.1, fisher_decay=0.99, maximize=True, **ADAM))
    assert torch.equal(ours, run(lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), maximize=True, fused=True)))


@pytest.mark.parametrize("shape", [(7, 5), (3, BLOCK)], ids=["small", "cut into blocks"])
@pytest.mark.parametrize("kwargs", [{}, {"lr": 0.1, "fisher_decay": 0.9, "damping": 1e-3}, {"maximize": True}])
def test_qig_is_rmsprop_bit_for_bit(shape: tuple[int, ...], kwargs: dict[str, Any]) -> None:
    ours = run(lambda p: QIGDiagonalNG(p, **kwargs, foreach=True), shape=shape)
    in_torch = {"fisher_decay": "alpha", "damping": "eps"}
    its = {"lr": 1e-3, **{in_torch.get(name, name): value for name, value in kwargs.items()}}
    theirs = run(lambda p: torch.optim.RMSprop(p, **its), shape=shape)
    assert torch.equal(ours, theirs)
    fused = run(lambda p: QIGDiagonalNG(p, **kwargs), 20, torch.float64, shape)
    listed = run(lambda p: QIGDiagonalNG(p, **kwargs, foreach=True), 20, torch.float64, shape)
    assert torch.allclose(fused, listed, rtol=0, atol=1e-12)  # another order of the same operations


def test_adamw_step_is_adamw_bit_for_bit() -> None:
    class Bare(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                adamw_step(group["params"], self.state, group)

    settings = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    assert torch.equal(run(lambda p: Bare(p, settings)), run(lambda p: torch.optim.AdamW(p, **settings, fused=True)))


@pytest.mark.parametrize("shape", [(7, 5), (3, BLOCK), (50, 3000)])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"power": 0.5}, {"power": 0.7}, {"momentum": 0.0}, {"bias_correction": False}, {"batch_size": 5.0},
     {"weight_decay": 0.1, "maximize": True}, {"power": 0.5, "foreach": True}, {"power": 0.5, "bias_correction": False},
     {"power": 0.5, "momentum": 0.0, "bias_correction": False}, {"power": 0.5, "momentum": 0.0, "maximize": True}],
    ids=str,
)  # fmt: skip
def test_every_path_is_the_plain_formula(kwargs: dict[str, Any], shape: tuple[int, ...]) -> None:
    fast = run(lambda p: DiagonalNG(p, lr=1e-2, **kwargs), 5, torch.float64, shape)
    plain = run(lambda p: DiagonalNG(p, lr=1e-2, **{**kwargs, "foreach": False}), 5, torch.float64, shape)
    assert torch.allclose(fast, plain, rtol=0, atol=1e-12)


@given(st.floats(1e-3, 1e3), st.floats(-1e3, 1e3).filter(lambda g: abs(g) > 1e-3), st.floats(0, 1))
def test_the_first_step_in_closed_form(batch: float, g: float, power: float) -> None:
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    x.grad = torch.full_like(x, g)
    DiagonalNG([x], lr=1.0, power=power, damping=1e-3, batch_size=batch).step()
    assert x.item() == pytest.approx(-g / ((batch * g * g) ** power + 1e-3), rel=1e-9)


def test_power_one_divides_by_the_fisher_diagonal() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = DiagonalNG([x], lr=0.5, power=1.0, damping=0.0)
    (x * torch.tensor([4.0, 0.25])).sum().backward()  # g = (4, 1/4), F = g^2, step = g / F = 1 / g
    optimizer.step()
    assert torch.allclose(x, torch.tensor([1 - 0.5 / 4, 2 - 0.5 * 4]))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_power_half_does_not_see_the_scale_of_the_loss(scale: float) -> None:
    def after(factor: float, power: float) -> torch.Tensor:
        x = torch.tensor([1.0, -2.0], requires_grad=True)
        optimizer = DiagonalNG([x], lr=0.1, damping=0.0, power=power)
        for _ in range(5):
            optimizer.zero_grad()
            (factor * (x**4).sum()).backward()
            optimizer.step()
        return x.detach()

    assert torch.allclose(after(1.0, 0.5), after(scale, 0.5), rtol=1e-5)
    assert not torch.allclose(after(1.0, 1.0), after(scale, 1.0), rtol=1e-1)


def model_of(seed: int = 0) -> tuple[torch.nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(4, 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model, torch.randn(6, 4, generator=generator, dtype=torch.float64)


def enumerated(model: torch.nn.Linear, x: torch.Tensor) -> list[torch.Tensor]:
    """The Fisher diagonal by its definition: mean over rows of sum_y p(y) (d log p(y) / d theta)^2."""
    params = list(model.parameters())
    total = [torch.zeros_like(p) for p in params]
    for row in x:
        logp = model(row).log_softmax(-1)
        for value in logp:
            for t, g in zip(total, torch.autograd.grad(value, params, retain_graph=True), strict=True):
                t += value.exp().detach() * g**2 / len(x)
    return total


def test_the_sampled_diagonal_is_unbiased() -> None:
    model, x = model_of()
    logits, params = model(x), list(model.parameters())
    draws = [
        torch.cat([t.flatten() for t in sampled_diagonal(logits, params, torch.Generator().manual_seed(i))])
        for i in range(800)
    ]
    looks, truth = torch.stack(draws), torch.cat([t.flatten() for t in enumerated(model, x)])
    z = (looks.mean(0) - truth) / (looks.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < 4.5  # 15 entries


def test_the_exact_source_is_the_fisher_diagonal() -> None:
    pytest.importorskip("constellation.geometry.fisher")
    model, x = model_of()
    optimizer = DiagonalNG(model.parameters(), source="exact", refresh=2)
    logits = model(x)
    torch.nn.functional.cross_entropy(logits, torch.zeros(6, dtype=torch.long)).backward(retain_graph=True)
    optimizer.step(logits=logits)
    for p, truth in zip(model.parameters(), enumerated(model_of()[0], x), strict=True):
        assert torch.allclose(optimizer.state[p]["fisher"] / (1 - 0.95), truth, atol=1e-12)
    before = [optimizer.state[p]["fisher"].clone() for p in model.parameters()]
    optimizer.step()  # between two looks nothing is asked for
    assert all(torch.equal(optimizer.state[p]["fisher"], b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(ConfigError, match="logits"):
        optimizer.step()


@pytest.mark.parametrize("foreach", [None, False])
def test_a_given_curvature_is_divided_by(foreach: bool | None) -> None:
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = DiagonalNG([x, y], lr=1.0, damping=0.0, source="given", foreach=foreach)
    x.grad, y.grad = torch.tensor([2.0, 2.0]), torch.tensor([0.0])
    optimizer.step(curvature=[torch.tensor([1.0, 4.0]), None])
    assert torch.allclose(x, torch.tensor([-2.0, -0.5])) and torch.equal(y, torch.zeros(1))


def test_a_sampled_run_resumes_bit_for_bit() -> None:
    def steps(model: torch.nn.Linear, optimizer: DiagonalNG, x: torch.Tensor, n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            logits = model(x)
            (logits**2).mean().backward(retain_graph=True)
            optimizer.step(logits=logits)

    (one, x), (two, _) = model_of(), model_of(1)
    a, b = (DiagonalNG(m.parameters(), source="sampled", refresh=2, seed=3) for m in (one, two))
    steps(one, a, x, 3)
    two.load_state_dict(one.state_dict())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    steps(one, a, x, 4)
    steps(two, b, x, 4)
    assert all(map(torch.equal, one.parameters(), two.parameters()))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_half_precision_parameters_keep_float32_state_through_a_save(power: float) -> None:
    x = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    optimizer = DiagonalNG([x], lr=0.1, power=power)
    x.grad = torch.full_like(x, 0.3)
    optimizer.step()
    other = DiagonalNG([x], lr=0.1, power=power)
    other.load_state_dict(optimizer.state_dict())
    for name in ("fisher", "momentum"):
        assert other.state[x][name].dtype == torch.float32
        assert torch.equal(other.state[x][name], optimizer.state[x][name])
    assert x.dtype == torch.bfloat16 and not torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("make", [DiagonalNG, QIGDiagonalNG])
def test_damaged_gradients_skip_the_step_and_are_counted(make: Any, bad: float) -> None:
    x = torch.ones(3, requires_grad=True)
    optimizer = make([x])
    x.grad = torch.ones(3)
    optimizer.step()
    before, state = x.detach().clone(), {k: v.clone() for k, v in optimizer.state[x].items()}
    x.grad[1] = bad
    optimizer.step()
    assert optimizer.outcome == "skipped" and optimizer.get_stats()["skipped_steps"] == 1
    assert torch.equal(x, before) and all(torch.equal(optimizer.state[x][k], v) for k, v in state.items())


@pytest.mark.parametrize("g", [0.0, 1e-30, 3e19, 1e30])
@pytest.mark.parametrize("kwargs", [{}, {"damping": 0.0}, ADAM, {"foreach": False, "damping": 0.0}], ids=str)
def test_zero_tiny_and_huge_gradients_leave_finite_parameters(g: float, kwargs: dict[str, Any]) -> None:
    x = torch.ones(2, requires_grad=True)
    optimizer = DiagonalNG([x], **kwargs)
    for _ in range(3):
        x.grad = torch.full((2,), g)
        optimizer.step()
    assert optimizer.outcome == "stepped" and torch.isfinite(x).all()


def test_the_fused_kernel_reaches_parameters_with_gaps_between_their_entries() -> None:
    flat = torch.ones(4, requires_grad=True)
    gaps = torch.ones(4, 2)[:, 0].requires_grad_()
    for x in (flat, gaps):
        optimizer = DiagonalNG([x], lr=0.1, **ADAM)
        for _ in range(3):
            x.grad = torch.arange(8.0).view(4, 2)[:, 1]
            optimizer.step()
    assert torch.equal(flat, gaps) and (gaps < 1).all()


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_grad_scaler_changes_nothing_and_its_overflow_skips(power: float) -> None:
    def train(scale: float | None, overflow: bool = False) -> torch.Tensor:
        x = torch.tensor([1.0, -2.0], requires_grad=True)
        optimizer = DiagonalNG([x], lr=0.1, power=power)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for i in range(4):
            optimizer.zero_grad()
            loss = (x**4).sum() * (float("inf") if overflow and i == 2 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if overflow and i == 2:
                assert optimizer.outcome == "skipped"
        return x.detach()

    assert torch.equal(train(None), train(1024.0))
    assert torch.isfinite(train(1024.0, overflow=True)).all()


def test_steps_can_be_differentiated_through() -> None:
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def after(lr: torch.Tensor) -> torch.Tensor:
        x = start.clone().requires_grad_().clone()
        optimizer = DiagonalNG([x], lr=lr, differentiable=True)
        for i in range(3):
            x.grad = (i + 1.0) * start**3
            optimizer.step()
        return x

    assert torch.autograd.gradcheck(after, torch.tensor(0.1, dtype=torch.float64, requires_grad=True))


def test_stats_are_plain_numbers_of_the_fisher() -> None:
    x = torch.ones(2, requires_grad=True)
    optimizer = DiagonalNG([x], fisher_decay=0.0, damping=1.0)
    assert optimizer.get_stats()["natural_steps"] == 0
    x.grad = torch.tensor([1.0, 3.0])
    optimizer.step()
    stats = optimizer.get_stats()
    assert all(type(v) is float for v in stats.values())
    assert (stats["fisher_mean"], stats["fisher_std"], stats["condition_number"]) == (5.0, 4.0, 5.0)


@pytest.mark.parametrize(
    "bad", [{"lr": -1}, {"fisher_decay": 2}, {"power": 3}, {"damping": float("inf")}, {"momentum": -0.1}]
)
def test_impossible_settings_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        DiagonalNG([torch.zeros(1, requires_grad=True)], **bad)


def test_parameters_without_gradient_stay() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = DiagonalNG([x, y], lr=0.1)
    x.sum().backward()
    optimizer.step()
    assert torch.equal(y, torch.ones(2)) and not torch.equal(x, torch.ones(2))


def test_build_puts_every_parameter_in_one_group_and_decays_matrices_alone() -> None:
    from constellation.config import override
    from constellation.kernel.model import KernelLM
    from constellation.presets import tiny

    model = KernelLM(tiny().kernel)
    groups = build(override(tiny(), {"optim.name": "diagonal_ng"}).optim, model).param_groups
    seen = [id(p) for g in groups for p in g["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() >= 2 for p in groups[0]["params"]) and groups[1]["weight_decay"] == 0
