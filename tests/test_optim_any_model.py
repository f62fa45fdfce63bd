"""KroneckerNG on any model: every kind of parameter by its way, whatever form the parameters are given in."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from constellation.errors import ConfigError
from constellation.optim.kinds import is_rowwise, matrix_shape
from constellation.optim.kronecker import VARIANTS, KroneckerNG


class Everything(nn.Module):
    """Tokens (B, 8) -> logits (B, 8, 11), through one of each kind of layer; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm((8, 6))
        self.linear = nn.Linear(6, 6)
        self.conv1 = nn.Conv1d(6, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 3, (3, 1), padding=(1, 0))
        self.transposed = nn.ConvTranspose1d(4, 6, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.zeros(0, 6))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.linear(self.norm(self.embedding(tokens))))
        x = x + self.transposed(self.conv1(x.mT)).mT
        x = x + self.scale * self.conv2(x[:, None]).mean(1)
        return self.head(x) + self.empty.sum()


def batch(i: int) -> torch.Tensor:
    return (torch.randint(11, (16, 1), generator=torch.Generator().manual_seed(i)) + torch.arange(9)) % 11


def loss_of(model: nn.Module, i: int) -> torch.Tensor:
    tokens = batch(i)
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: Any, steps: range, schedule: Any = None) -> float:
    for i in steps:
        optimizer.zero_grad()
        loss = loss_of(model, i)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return float(loss.detach())


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "parameters": lambda model: model.parameters(),
    "named": lambda model: model.named_parameters(),
    "model": lambda model: model,
    "groups": lambda model: [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "lr": 1e-2},
    ],
}
MATRICES = {"linear.weight", "conv1.weight", "conv2.weight", "transposed.weight", "frozen.weight", "empty"}
UNKNOWN_WITHOUT_A_MODEL = {"parameters": {"embedding.weight", "norm.weight", "norm.bias"},
                           "named": {"norm.weight", "norm.bias"}, "model": set(),
                           "groups": {"embedding.weight", "norm.weight", "norm.bias"}}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMS)
def test_the_optimizer_of_the_readme_trains_a_model_of_every_kind_of_layer(form: str, variant: str) -> None:
    model = Everything()
    kept = copy.deepcopy(model.frozen.state_dict())
    optimizer = KroneckerNG(FORMS[form](model), lr=4e-3, variant=variant)
    before = float(loss_of(model, 100).detach())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, range(40))
    assert float(loss_of(model, 100).detach()) < before - 0.2
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), model.frozen.state_dict().values(), strict=True))
    still = {name for name, p in model.named_parameters() if torch.equal(p, start[name])}
    assert still == {"frozen.weight", "frozen.bias", "empty"}
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_each_parameter_goes_by_its_kind(form: str) -> None:
    model = Everything()
    optimizer = KroneckerNG(FORMS[form](model))
    names = {id(p): name for name, p in model.named_parameters()}
    by_kron = {
        names[id(p)]
        for group in optimizer.param_groups
        for p, method in zip(group["params"], group["methods"], strict=True)
        if method == "kron"
    }
    assert by_kron == MATRICES | UNKNOWN_WITHOUT_A_MODEL[form]


def test_a_convolution_moves_as_the_matrix_that_it_is() -> None:
    conv, linear = (torch.randn(5, 4, 3).requires_grad_() for _ in range(2))
    flat = linear.detach().reshape(5, 12).requires_grad_()
    with torch.no_grad():
        conv.copy_(flat.view(5, 4, 3))
    ours, theirs = KroneckerNG([conv], lr=0.1), KroneckerNG([flat], lr=0.1)
    for i in range(4):
        conv.grad = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(i))
        flat.grad = conv.grad.reshape(5, 12)
        ours.step()
        theirs.step()
    assert torch.equal(conv.detach().reshape(5, 12), flat) and matrix_shape(conv.shape) == (5, 12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_optimizer_of_any_model_goes_on_bit_for_bit(form: str, variant: str) -> None:
    def begin() -> tuple[nn.Module, KroneckerNG, Any]:
        model = Everything()
        optimizer = KroneckerNG(FORMS[form](model), lr=4e-3, variant=variant, refresh=2)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    model, optimizer, schedule = begin()
    train(model, optimizer, range(5), schedule)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    weights, state, times = torch.load(file, weights_only=True)
    other, second, again = begin()
    other.load_state_dict(weights)
    second.load_state_dict(state)
    again.load_state_dict(times)
    train(model, optimizer, range(5, 10), schedule)
    train(other, second, range(5, 10), again)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_parameters_added_later_go_by_their_kind_as_well() -> None:
    model = Everything()
    optimizer = KroneckerNG(model.linear.parameters(), lr=4e-3)
    optimizer.add_param_group({"params": [*model.conv1.parameters(), model.scale]})
    optimizer.add_param_group({"params": [model.embedding.weight], "method": "diag"})
    assert [g.get("methods") for g in optimizer.param_groups] == [["kron", "diag"], ["kron", "diag", "diag"], None]
    train(model, optimizer, range(3))
    assert set(optimizer.state[model.embedding.weight]) == {"step", "fisher", "momentum"}
    assert set(optimizer.state[model.conv1.weight]) == {"momentum"}


@pytest.mark.parametrize(
    ("name", "rowwise"),
    [
        ("embedding.weight", True), ("model.embed_tokens.weight", True), ("transformer.wte.weight", True),
        ("tok_embeddings.weight", True), ("lm_head.weight", True), ("head.weight", True), ("classifier.weight", True),
        ("h.0.attn.weight", False), ("attention.heads.weight", False), ("blocks.0.attention.qkv.weight", False),
        ("bert.encoder.layer.0.attention.output.dense.weight", False),
    ],
)  # fmt: skip
def test_embeddings_and_heads_are_known_by_a_part_of_their_name(name: str, rowwise: bool) -> None:
    assert is_rowwise(name) == rowwise


def test_states_from_before_groups_had_kinds_load_into_the_same_call() -> None:
    w = torch.ones(4, 3, requires_grad=True)
    optimizer = KroneckerNG([w])
    w.grad = torch.ones(4, 3)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    (group,) = saved["param_groups"]
    group["method"] = "kron"  # the default of then
    del group["methods"], group["ns_precision"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["ns_precision"] == "bf16"  # what the Newton-Schulz products were then
    optimizer.step()
    assert optimizer.outcome == "stepped"


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ConfigError, match=r"method='kfac'; choose one of auto, kron, diag"):
        KroneckerNG([{"params": [torch.zeros(2, 2, requires_grad=True)], "method": "kfac"}])
