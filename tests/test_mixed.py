"""One optimizer of two minds: each part moves as its own optimizer would, every parameter exactly once."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from constellation.errors import ConfigError
from constellation.optim.basin import BasinNaturalGrad
from constellation.optim.diagonal import DiagonalNG
from constellation.optim.kronecker import KroneckerNG
from constellation.optim.mixed import HybridGeometricOptimizer

X = torch.randint(0, 12, (20, 3), generator=torch.Generator().manual_seed(0))
Y = X.sum(1) % 4


class Model(nn.Module):
    """Named as in the original design: coordinates, the map to the model, then a backbone."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.basin_coords = nn.Parameter(0.5 * torch.randn(12, 5, dtype=dtype))
            self.basin_to_model = nn.Linear(5, 8, bias=False, dtype=dtype)
            self.mlp = nn.Linear(8, 8, dtype=dtype)
            self.head = nn.Linear(8, 4, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mlp(self.basin_to_model(self.basin_coords[x].mean(1)))))


def train(model: Model, optimizers: list[torch.optim.Optimizer], steps: int = 6) -> list[float]:
    """Losses; optimizers that see logits come first, as a mixed one lets them."""
    losses = []
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        logits = model(X)
        loss = nn.functional.cross_entropy(logits, Y)
        loss.backward(retain_graph=True)
        for optimizer in optimizers:
            if isinstance(optimizer, HybridGeometricOptimizer | BasinNaturalGrad):
                optimizer.step(logits=logits, targets=Y)
            else:
                optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def equal(a: Model, b: Model) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def parts(model: Model) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Basin block, the rest's matrices, the rest's vectors."""
    rest = [*model.mlp.parameters(), *model.head.parameters()]
    return (
        [model.basin_coords, model.basin_to_model.weight],
        [p for p in rest if p.dim() == 2],
        [p for p in rest if p.dim() < 2],
    )


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rest", ["adamw", "diagonal_ng", "kron"])
def test_every_part_moves_as_its_own_optimizer_to_the_bit(exact: bool, rest: str) -> None:
    ours, theirs = Model(), Model()
    hybrid = HybridGeometricOptimizer(ours, 0.05, 0.02, cg_iters=6, use_exact_ng=exact, rest_optimizer=rest)
    block, matrices, vectors = parts(theirs)
    natural: torch.optim.Optimizer = DiagonalNG(block, 0.05, power=0.5, damping=1e-8)
    if exact:
        natural = BasinNaturalGrad(block, 0.05, 6, 1e-3)
    cheap: torch.optim.Optimizer
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    if rest == "adamw":
        cheap = torch.optim.AdamW(groups, 0.02, fused=True)
    elif rest == "diagonal_ng":
        cheap = DiagonalNG(groups, 0.02, power=0.5, damping=1e-8)
    else:
        groups[1]["method"] = "diag"
        cheap = KroneckerNG(groups, 0.02)
    assert train(ours, [hybrid]) == train(theirs, [natural, cheap])
    assert equal(ours, theirs)


def test_the_basin_block_is_named_by_patterns_or_a_predicate() -> None:
    model = Model()

    def block(basin: Any) -> set[int]:
        return {id(p) for p in HybridGeometricOptimizer(model, basin=basin).param_groups[0]["params"]}

    assert block(("*basin*", "*embed*")) == {id(p) for p in parts(model)[0]}
    assert block("head.*") == {id(model.head.weight), id(model.head.bias)}
    assert block(lambda name, p: p.dim() == 1) == {id(p) for p in parts(model)[2]}
    named = HybridGeometricOptimizer(model.named_parameters(), rest_optimizer="kron")
    assert [g["method"] for g in named.param_groups] == ["diag", "kron", "diag"]
    assert {id(p) for p in named.param_groups[1]["params"]} == {id(p) for p in parts(model)[1]}


def test_the_basin_of_a_constellation_kernel_is_its_embedding() -> None:
    from constellation.kernel.model import KernelLM
    from constellation.presets import tiny

    model = KernelLM(tiny().kernel)
    optimizer = HybridGeometricOptimizer(model, rest_optimizer="kron")
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(model.embedding.weight)]
    assert optimizer.param_groups[0]["home"] == [2]  # an embedding goes by the diagonal
    held = sorted(id(p) for g in optimizer.param_groups for p in g["params"])
    assert held == sorted(id(p) for p in model.parameters())


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.basin_coords.requires_grad_(False)
    assert len(HybridGeometricOptimizer(model).param_groups[0]["params"]) == 1


def param() -> Tensor:
    return torch.zeros(2, 2, requires_grad=True)


SHARED = param()


@pytest.mark.parametrize(
    ("params", "settings", "words"),
    [
        (Model(), {"basin": "*memory*"}, "empty.*memory"),
        (Model(), {"basin": lambda name, p: False}, "empty"),
        (Model(), {"rest_optimizer": "lion"}, "adamw, diagonal_ng, kron"),
        (Model(), {"rest_options": {"nesterov": True}}, "adamw has no option 'nesterov'"),
        (Model(), {"use_exact_ng": True, "basin_options": {"cg_iter": 3}}, "cg_iter"),
        (Model(), {"basin_options": {"power": 7.0}}, "power"),
        (Model(), {"rest_options": {"betas": (0.9, 2.0)}}, "beta2"),
        (Model(), {"use_exact_ng": True, "cg_iters": 0}, "cg_iters"),
        (Model(), {"lr_ng": -1.0}, "lr_ng"),
        ([param()], {}, "names tell the basin block"),
        ([{"params": [param()], "method": "kfac"}], {}, "kfac.*exact, diag, kron, adamw"),
        ([{"params": [SHARED]}, {"params": [SHARED], "method": "diag"}], {}, "two groups"),
        ([{"params": [SHARED, SHARED]}], {}, "twice"),
        ([{"params": [], "method": "exact"}], {}, "empty"),
        ([{"params": [torch.zeros(3, requires_grad=True)], "method": "kron"}], {}, "no matrix"),
        ([{"params": [param()], "method": "exact"}, {"params": [param()], "method": "exact"}], {}, "two exact"),
    ],
)
def test_impossible_requests_are_one_clear_line(params: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        HybridGeometricOptimizer(params, **settings)
    assert "\n" not in str(error.value)


def test_an_exact_block_without_logits_is_refused_and_nothing_moves() -> None:
    model, before = Model(), Model()
    optimizer = HybridGeometricOptimizer(model, use_exact_ng=True)
    nn.functional.cross_entropy(model(X), Y).backward()
    with pytest.raises(ConfigError, match="needs logits"):
        optimizer.step()
    assert equal(model, before)


def test_damaged_gradients_skip_the_whole_step() -> None:
    model, before = Model(), Model()
    optimizer = HybridGeometricOptimizer(model)
    nn.functional.cross_entropy(model(X), Y).backward()
    assert model.head.bias.grad is not None
    model.head.bias.grad[0] = torch.nan
    optimizer.step()
    assert equal(model, before) and optimizer.outcome == "skipped" and not optimizer.state


def test_a_group_can_be_added_later_and_a_schedule_moves_every_rate() -> None:
    model = Model()
    optimizer = HybridGeometricOptimizer([{"params": list(model.head.parameters()), "method": "adamw"}], lr_rest=0.1)
    optimizer.add_param_group({"params": [model.mlp.weight], "method": "kron", "lr": 0.2})
    optimizer.add_param_group({"params": [model.basin_coords], "method": "exact", "lr": 0.4})
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, [optimizer], 1)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.1, 0.2]
    assert optimizer.get_stats()["num_basin_params"] == 60.0


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rest", ["adamw", "diagonal_ng", "kron"])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_resumed_run_goes_on_with_the_same_bits(exact: bool, rest: str, stop: int) -> None:
    def made(model: Model) -> HybridGeometricOptimizer:
        return HybridGeometricOptimizer(model, 0.05, 0.02, use_exact_ng=exact, rest_optimizer=rest)

    alone, model = Model(), Model()
    losses = train(alone, [made(alone)], 8)
    before = made(model)
    train(model, [before], stop)
    torch.save(before.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    resumed = copy.deepcopy(model)
    after = made(resumed)
    after.load_state_dict(torch.load(buffer, weights_only=True))
    assert train(resumed, [after], 8 - stop) == losses[stop:]


def test_stats_are_plain_numbers_of_the_block() -> None:
    model = Model()
    optimizer = HybridGeometricOptimizer(model, use_exact_ng=True)
    assert train(model, [optimizer], 8)[-1] < 1.4
    stats = optimizer.get_stats()
    assert stats["num_basin_params"] == 100.0 and stats["num_rest_params"] == 108.0
    assert {"fisher_mean", "fisher_std", "condition_number", "predicted_reduction", "kl_per_step"} <= set(stats)
    assert stats["natural_steps"] == stats["ng_applications"] == 8.0
    assert all(type(value) is float for value in stats.values())
    assert optimizer.outcome in ("converged", "max_steps")


def test_gradients_scaled_for_half_precision_give_the_same_step() -> None:
    plain, scaled = Model(torch.float32), Model(torch.float32)
    one, two = (HybridGeometricOptimizer(m, use_exact_ng=True) for m in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    train(plain, [one], 1)
    logits = scaled(X)
    scaler.scale(nn.functional.cross_entropy(logits, Y)).backward(retain_graph=True)
    scaler.step(two, logits=logits)
    scaler.update()
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-7)
    before = copy.deepcopy(scaled)
    scaled.head.bias.grad = torch.full((4,), torch.inf)
    scaler.step(two, logits=logits)
    assert equal(scaled, before)


def test_bfloat16_parameters_keep_float32_state() -> None:
    model = Model(torch.bfloat16)
    optimizer = HybridGeometricOptimizer(model, use_exact_ng=True, rest_optimizer="kron")
    train(model, [optimizer], 2)
    kinds = {t.dtype for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)}
    assert kinds <= {torch.float32, torch.uint8, torch.int64}
