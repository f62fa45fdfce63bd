"""Named terms and their weights: what is differentiated is their weighted sum, and nothing else."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from constellation.config import override
from constellation.errors import ConfigError
from constellation.kernel.model import KernelLM
from constellation.presets import tiny
from constellation.train.job import Job
from constellation.train.objective import Forward, Objective, Term, cross_entropy
from constellation.train.parts import Parts
from constellation.train.recording import Records
from constellation.train.state import TrainState
from tests.parts import spread

MODEL = override(tiny(), {"kernel.vocab_size": 272, "kernel.width": 16, "kernel.hidden": 24, "kernel.layers": 1}).kernel
G = torch.Generator().manual_seed(0)
X, Y = (torch.randint(272, (8, 16), generator=G) for _ in range(2))


def distance(forward: Forward) -> Tensor:
    """Mean square of the embedding."""
    return forward.model.embedding.weight.square().mean()


def gradient(objective: Objective, model: KernelLM) -> Tensor:
    total = objective.total(objective(model, X, Y, chunk=50))
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])


def test_the_gradient_of_named_terms_is_the_weighted_sum_of_their_gradients() -> None:
    model = KernelLM(MODEL).double()
    both = gradient(Objective({"spread": spread, "distance": distance}, {"spread": 0.3, "distance": -2.0}), model)
    base = gradient(Objective(), model)
    others = [gradient(Objective({"it": term}, {"it": 1.0}), model) - base for term in (spread, distance)]
    assert torch.allclose(both, base + 0.3 * others[0] - 2.0 * others[1], rtol=1e-9, atol=1e-12)
    assert all(float(g.norm()) > 1e-4 for g in (base, *others))


def test_the_loop_differentiates_the_weighted_sum_and_reports_each_term_by_its_name(tmp_path: Path) -> None:
    class Fixed:
        def at(self, step: int) -> tuple[object, object]:
            return X.numpy(), Y.numpy()

    settings = override(tiny(), {
        "kernel.vocab_size": 272, "kernel.width": 16, "kernel.hidden": 24, "kernel.layers": 1, "kernel.context": 16,
        "train.accumulation": 4, "train.precision": "fp32",
    })  # fmt: skip
    objective = Objective({"spread": spread, "seen": distance}, {"spread": 0.3, "seen": 0.0, "cross_entropy": 0.5})
    job = Job("ocean", tmp_path, settings, 1, Path("unread"))
    state = TrainState(job, Fixed(), print, Parts(objective), Records(settings.record, tmp_path))  # type: ignore[arg-type]
    losses = state.losses(state.batch_at(0))
    forward = Forward(state.model, X, Y, state.model.hidden(X), 50)
    for name, term in (("cross_entropy", cross_entropy), ("spread", spread), ("seen", distance)):
        assert losses[name] == pytest.approx(float(term(forward).detach()), rel=1e-5)
    expected = torch.autograd.grad(0.5 * cross_entropy(forward) + 0.3 * spread(forward), list(state.model.parameters()))
    for p, g in zip(state.model.parameters(), expected, strict=True):
        assert p.grad is not None and torch.allclose(p.grad, g, rtol=1e-3, atol=1e-6)
    state.apply(losses)
    assert set(state.numbers) == {"step", "loss_nats", "grad_norm", "lr", "spread", "seen"}
    assert state.numbers["loss_nats"] == losses["cross_entropy"]


def test_by_default_the_cross_entropy_itself_is_differentiated() -> None:
    model, objective = KernelLM(MODEL), Objective()
    losses = objective(model, X, Y, chunk=50)
    assert list(losses) == ["cross_entropy"] and objective.total(losses) is losses["cross_entropy"]
    naive = torch.nn.functional.cross_entropy(model(X).flatten(0, 1), Y.flatten())
    assert float(losses["cross_entropy"].detach()) == pytest.approx(float(naive.detach()), rel=1e-6)


@pytest.mark.parametrize(
    ("terms", "weights", "said"),
    [
        ({"a": spread}, {}, "'a' needs both a term and a weight"),
        ({}, {"b": 1.0}, "'b' needs both a term and a weight"),
        ({"lr": spread}, {"lr": 1.0}, "a step reports its own 'lr'"),
        ({"a": lambda forward: forward.hidden_BTD}, {"a": 1.0}, r"'a' is of shape \(8, 16, 16\); a term is one number"),
        ({"a": spread}, {"a": 0.0, "cross_entropy": 0.0}, "every weight is 0"),
    ],
)
def test_what_is_no_objective_is_told_in_a_line(terms: dict[str, Term], weights: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as told:
        gradient(Objective(terms, weights), KernelLM(MODEL))
    assert "\n" not in str(told.value)


def test_weights_are_remembered_and_other_terms_refused() -> None:
    objective = Objective({"a": spread}, {"a": 0.5})
    objective.weights["a"] = 0.25
    again = Objective({"a": spread}, {"a": 0.5})
    again.load_state(objective.state())
    assert again.weights == {"cross_entropy": 1.0, "a": 0.25}
    with pytest.raises(ConfigError, match="trained with a, cross_entropy, this one has cross_entropy"):
        Objective().load_state(objective.state())
