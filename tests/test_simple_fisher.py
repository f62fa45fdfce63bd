"""SimpleFisherOptimizer is a soft sign, and says so."""

import pytest
import torch

from constellation.errors import ConfigError
from constellation.optim.simple import SimpleFisherOptimizer


@pytest.mark.parametrize("foreach", [None, False])
def test_a_step_is_the_soft_sign_of_the_gradient(foreach: bool | None) -> None:
    x = torch.zeros(4, requires_grad=True)
    x.grad = torch.tensor([3.0, -1e-3, 1e-3, 0.0])
    SimpleFisherOptimizer([x], lr=0.1, damping=1e-3, foreach=foreach).step()
    assert torch.allclose(x, torch.tensor([-0.1 * 3 / 3.001, 0.05, -0.05, 0.0]))


def test_it_is_rmsprop_without_memory() -> None:
    ours, theirs = (torch.linspace(-2, 2, 9).requires_grad_() for _ in range(2))
    a, b = SimpleFisherOptimizer([ours], lr=0.1), torch.optim.RMSprop([theirs], lr=0.1, alpha=0.0)
    for _ in range(5):
        for x, optimizer in ((ours, a), (theirs, b)):
            x.grad = x.detach() ** 3 + 1
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6) and not a.state


@pytest.mark.parametrize("foreach", [None, False])
def test_zero_gradients_are_no_step_even_without_eps(foreach: bool | None) -> None:
    x = torch.ones(2, requires_grad=True)
    x.grad = torch.zeros(2)
    SimpleFisherOptimizer([x], damping=0.0, foreach=foreach).step()
    assert torch.equal(x, torch.ones(2))


def test_damaged_gradients_skip_the_step() -> None:
    x = torch.ones(2, requires_grad=True)
    optimizer = SimpleFisherOptimizer([x])
    x.grad = torch.tensor([1.0, float("nan")])
    optimizer.step()
    assert torch.equal(x, torch.ones(2)) and optimizer.outcome == "skipped"


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="damping"):
        SimpleFisherOptimizer([torch.zeros(1)], damping=-1.0)
