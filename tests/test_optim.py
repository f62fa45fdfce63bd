"""DiagonalNG against closed forms and torch's own optimizers."""

import dataclasses

import pytest
import torch

from constellation.errors import ConfigError
from constellation.optim import build
from constellation.optim.diagonal import DiagonalNG


def run(make: object, steps: int = 20, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator).to(dtype).requires_grad_()
    optimizer = make([x])  # type: ignore[operator]
    target = torch.randn(7, 5, generator=generator).to(dtype)
    for i in range(steps):
        optimizer.zero_grad()
        ((x - target) ** 2 * (1 + i % 3)).sum().backward()
        optimizer.step()
    return x.detach()


def test_power_half_is_adamw_bit_for_bit() -> None:
    ours = run(lambda p: DiagonalNG(p, lr=0.1, alpha=0.95, momentum=0.9, weight_decay=0.1))
    theirs = run(lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, fused=True))
    assert torch.equal(ours, theirs)


def test_the_foreach_path_agrees_with_the_fused_one() -> None:
    ours = run(lambda p: DiagonalNG(p, lr=0.1, power=0.5 + 1e-12))
    assert torch.allclose(ours, run(lambda p: DiagonalNG(p, lr=0.1, power=0.5)), atol=1e-5)


def test_power_one_divides_by_the_fisher_diagonal() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = DiagonalNG([x], lr=0.5, power=1.0, eps=0.0)
    (x * torch.tensor([4.0, 0.25])).sum().backward()  # g = (4, 1/4), F = g^2, step = g / F = 1 / g
    optimizer.step()
    assert torch.allclose(x, torch.tensor([1 - 0.5 / 4, 2 - 0.5 * 4]))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_power_half_does_not_see_the_scale_of_the_loss(scale: float) -> None:
    def after(factor: float) -> torch.Tensor:
        x = torch.tensor([1.0, -2.0], requires_grad=True)
        optimizer = DiagonalNG([x], lr=0.1, eps=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            (factor * (x**4).sum()).backward()
            optimizer.step()
        return x.detach()

    assert torch.allclose(after(1.0), after(scale), rtol=1e-5)


@pytest.mark.parametrize("bad", [{"lr": -1}, {"alpha": 2}, {"power": 3}, {"eps": float("inf")}, {"momentum": -0.1}])
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
    from constellation.kernel.model import KernelLM
    from constellation.presets import tiny

    model = KernelLM(tiny().kernel)
    groups = build(dataclasses.replace(tiny().optim, name="diagonal_ng"), model).param_groups
    seen = [id(p) for g in groups for p in g["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() >= 2 for p in groups[0]["params"]) and groups[1]["weight_decay"] == 0
