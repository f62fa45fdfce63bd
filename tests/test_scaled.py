"""CurvatureScaledSGD: Newton on a diagonal quadratic, rates as promised, and a preconditioner that knows its owner."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from constellation.errors import ArtifactError, ConfigError
from constellation.optim.curvature import UNITS, hutchinson_diagonal
from constellation.optim.scaled import CurvatureScaledSGD

SCALES = torch.tensor([1e-3, 1.0, 20.0, 3e4], dtype=torch.float64)


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * (SCALES * (x - 1) ** 2).sum()


def start() -> Tensor:
    return torch.tensor([3.0, -2.0, 0.5, 1.5], dtype=torch.float64, requires_grad=True)


def newton(x: Tensor, **settings: Any) -> CurvatureScaledSGD:
    return CurvatureScaledSGD([x], 1.0, 1.0, source="hutchinson_hessian", damping=0.0, **settings)


def step(optimizer: CurvatureScaledSGD, x: Tensor) -> None:
    optimizer.zero_grad()
    quadratic(x).backward()
    optimizer.step(curvature=lambda: hutchinson_diagonal(quadratic(x), [x], probes=2))


def test_exponent_one_solves_a_diagonal_quadratic_in_one_step() -> None:
    x = start()
    step(newton(x), x)
    assert torch.allclose(x, torch.ones(4, dtype=torch.float64), atol=1e-12)


def test_exponent_one_half_leaves_the_root_of_the_condition_number() -> None:
    x = start()
    optimizer = CurvatureScaledSGD([x], 1.0, source="hutchinson_hessian", damping=0.0)
    step(optimizer, x)
    contraction = SCALES * optimizer.learning_rates()[0]  # of each direction: lr_i H_ii
    assert float(contraction.max() / contraction.min()) == pytest.approx(math.sqrt(3e7), rel=1e-9)


def test_exponent_zero_is_plain_gradient_descent() -> None:
    ours, theirs = start(), start()
    a = CurvatureScaledSGD([ours], 1e-5, 0.0, momentum=0.9)
    b = torch.optim.SGD([theirs], 1e-5, momentum=0.9)
    for _ in range(5):
        for x, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            quadratic(x).backward()
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=1e-13)


def test_the_rates_are_those_of_the_formula_in_every_block() -> None:
    a, b = start(), start()
    optimizer = CurvatureScaledSGD(
        [{"params": [a], "lr_max": 0.2}, {"params": [b], "exponent": 1.0, "floor": 5.0, "lr_min": 1e-2}],
        0.5,
        source="hutchinson_hessian",
        damping=1e-6,
    )
    (quadratic(a) + quadratic(b)).backward()
    found = hutchinson_diagonal(quadratic(a) + quadratic(b), [a, b], probes=2)
    optimizer.step(curvature=found)
    assert torch.allclose(optimizer.learning_rates()[0], (0.5 * (SCALES + 1e-6) ** -0.5).clamp(max=0.2))
    assert torch.allclose(optimizer.learning_rates()[1], (0.5 / (SCALES.clamp(min=5) + 1e-6)).clamp(min=1e-2))


def test_the_trace_replays_from_the_saved_rates(tmp_path: Path) -> None:
    x = start()
    optimizer = newton(x, lr_max=1e-3)
    step(optimizer, x)
    path = optimizer.save_preconditioner(tmp_path)
    before = x.detach().clone()
    step(optimizer, x)
    with np.load(path) as saved:
        assert np.array_equal(before - saved["lr.0"] * (SCALES * (before - 1)).numpy(), x.detach())


def test_a_curvature_below_its_own_error_counts_as_its_error_and_negative_ones_by_magnitude() -> None:
    x = torch.zeros(2, requires_grad=True)
    found = hutchinson_diagonal((x[0] ** 2).sum() / 2, [x], probes=2)
    made = type(found)((torch.tensor([1e-3, -4.0]),), (torch.tensor([2.0, 0.1]),), found.kind, found.units, 2)
    x.grad = torch.ones(2)
    optimizer = CurvatureScaledSGD([x], 1.0, 1.0, source="hutchinson_hessian", damping=0.0)
    optimizer.step(curvature=made)
    assert torch.allclose(x.detach(), torch.tensor([-0.5, -0.25]))


class Softmax(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
        self.b = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.b


X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 6)
Y = torch.arange(40) % 3


def train(model: Softmax, optimizer: CurvatureScaledSGD, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step(logits=lambda: model(X), targets=Y)
    return losses


@pytest.mark.parametrize("source", UNITS)
def test_every_source_descends_and_resumes_bit_for_bit_at_any_step(source: str) -> None:
    rate = 0.05 if UNITS[source] == "loss^2 / theta^2" else 0.2
    settings: dict[str, Any] = {"source": source, "refresh": 3, "momentum": 0.5, "probes": 4, "seed": 7}
    model = Softmax()
    optimizer = CurvatureScaledSGD(model.parameters(), rate, **settings)
    losses = train(model, optimizer, 40)
    assert losses[-1] < 0.8 * losses[0]
    for stop in (1, 3, 8):
        first = Softmax()
        before = CurvatureScaledSGD(first.parameters(), rate, **settings)
        train(first, before, stop)
        torch.save(before.state_dict(), buffer := io.BytesIO())
        buffer.seek(0)
        after = CurvatureScaledSGD(first.parameters(), rate, **settings)
        after.load_state_dict(torch.load(buffer, weights_only=True))
        assert losses[stop:] == train(first, after, 40 - stop)


@pytest.mark.parametrize("source", UNITS)
def test_a_saved_preconditioner_gives_the_same_next_step(source: str, tmp_path: Path) -> None:
    a, b = Softmax(), Softmax()
    settings: dict[str, Any] = {"source": source, "refresh": 0, "probes": 4}
    one, two = (CurvatureScaledSGD(list(m.named_parameters()), 0.05, **settings) for m in (a, b))
    train(a, one, 3)
    assert one.save_preconditioner(tmp_path / "run") == tmp_path / "run" / "precond.npz"
    b.load_state_dict(a.state_dict())
    two.load_preconditioner(tmp_path / "run")
    rates = zip(one.learning_rates(), two.learning_rates(), strict=True)
    assert source == "ema_grad2" or all(torch.equal(p, q) for p, q in rates)  # an average has moved on since its scale
    meta = json.loads((tmp_path / "run" / "precond.json").read_text())
    assert meta["blocks"][0]["kind"] == source and meta["blocks"][0]["units"] == UNITS[source]
    assert [entry["name"] for entry in meta["layout"]] == ["w", "b"] and len(meta["layout_sha256"]) == 64
    for m, optimizer in ((a, one), (b, two)):
        torch.nn.functional.cross_entropy(m(X), Y).backward()
        optimizer.step()  # refresh = 0: no look is due any more


def saved(tmp_path: Path) -> Path:
    model = Softmax()
    optimizer = CurvatureScaledSGD(list(model.named_parameters()), 0.05, source="gauss_newton")
    train(model, optimizer, 1)
    return optimizer.save_preconditioner(tmp_path)


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9, None])
def test_a_damaged_preconditioner_is_refused_and_nothing_changes(tmp_path: Path, at: float | None) -> None:
    path = saved(tmp_path)
    data = bytearray(path.read_bytes())
    if at is None:
        del data[len(data) // 2 :]
    else:
        data[int(len(data) * at)] ^= 0xFF
    path.write_bytes(data)
    optimizer = CurvatureScaledSGD(list(Softmax().named_parameters()), source="gauss_newton")
    with pytest.raises(ArtifactError, match=r"precond\.npz"):
        optimizer.load_preconditioner(path)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("names", "source", "words"),
    [(("v", "b"), "gauss_newton", "other parameters"), (("w", "b"), "empirical_fisher", "wants empirical_fisher")],
)
def test_a_foreign_preconditioner_is_refused(tmp_path: Path, names: tuple[str, str], source: str, words: str) -> None:
    path = saved(tmp_path)
    optimizer = CurvatureScaledSGD(list(zip(names, Softmax().parameters(), strict=True)), source=source)
    with pytest.raises(ArtifactError, match=words):
        optimizer.load_preconditioner(path)
    with pytest.raises(ArtifactError, match="missing"):
        optimizer.load_preconditioner(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "kfac"}, "ema_grad2"),
        ({"exponent": 2.0}, "exponent"),
        ({"lr_min": 1.0, "lr_max": 0.5}, "lr_max"),
        ({"probes": 1}, "probes=1"),
        ({"floor": -1.0}, "floor"),
        ({"lr": math.nan}, "lr"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CurvatureScaledSGD([start()], **settings)


def test_a_look_without_a_likelihood_or_of_another_unit_is_refused_and_parameters_stay() -> None:
    x = start()
    quadratic(x).backward()
    optimizer = newton(x)
    with pytest.raises(ConfigError, match="logits"):
        optimizer.step()
    other = CurvatureScaledSGD([x], source="empirical_fisher")
    with pytest.raises(ConfigError, match="one unit"):
        other.step(curvature=hutchinson_diagonal(quadratic(x), [x], probes=2))
    assert torch.equal(x, start())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_gradients_skip_the_step(bad: float) -> None:
    x = start()
    optimizer = CurvatureScaledSGD([x], 0.1)
    x.grad = torch.tensor([1.0, bad, 1.0, 1.0], dtype=torch.float64)
    optimizer.step()
    assert torch.equal(x, start()) and optimizer.outcome == "skipped" and not optimizer.state


def test_state_is_float32_under_bfloat16_and_stays_so_after_loading() -> None:
    x = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    optimizer = CurvatureScaledSGD([x], 0.1, momentum=0.9)
    x.grad = torch.ones_like(x)
    optimizer.step()
    assert not torch.equal(x, torch.ones_like(x))
    other = CurvatureScaledSGD([x], 0.1, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    assert {t.dtype for t in other.state[x].values()} == {torch.float32}


def test_stats_are_plain_numbers_of_the_curvature_held() -> None:
    x = start()
    optimizer = newton(x)
    assert optimizer.get_stats()["natural_steps"] == 0.0
    step(optimizer, x)
    stats = optimizer.get_stats()
    assert stats["fisher_mean"] == pytest.approx(float(SCALES.mean())) and stats["condition_number"] == pytest.approx(
        3e7
    )
    assert all(type(value) is float for value in stats.values())
