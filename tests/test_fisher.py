"""Fisher products against the Jacobian, label enumeration and curvlinops, all in float64."""

import pytest
import torch
import torch.nn.functional as F
from curvlinops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from constellation.errors import ConfigError
from constellation.geometry.fisher import FisherBlock, flatten, jacobian_rows, twice_differentiable, unflatten
from constellation.geometry.likelihood import LIKELIHOODS, likelihood

N, V = 7, 4
EXACT = 1e-12


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(seed: int = 0, depth: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(3, 3), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(3, V)).double()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = seeded(seed)
    return torch.randn(N, 3, generator=g, dtype=torch.float64), torch.randint(0, V, (N,), generator=g)


def targets_of(name: str, seed: int = 0) -> Tensor:
    if name == "softmax":
        return batch(seed)[1]
    values = torch.rand(N, V, generator=seeded(seed + 1), dtype=torch.float64)
    return values.round() if name == "bernoulli" else values


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """(N, V, P) by torch.func, the oracle."""
    params = dict(net.named_parameters())
    rows = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)))(params)
    return torch.cat([rows[name].flatten(2) for name in params], dim=-1).detach()


def far(a: Tensor, b: Tensor) -> float:
    """Relative distance of two matrices."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_exact_is_the_jacobian_sandwich(name: str) -> None:
    net, (x, _) = model(), batch()
    f, j = net(x), jacobian(net, x)
    block = FisherBlock(f, list(net.parameters()), likelihood=name)
    metric = torch.func.vmap(torch.func.hessian(lambda row, y: likelihood(name).loss_nats(row, y)))(
        f.detach(), targets_of(name)
    )
    oracle = torch.einsum("nvp,nvw,nwq->pq", j, metric, j) / N
    assert far(block.matrix(), oracle) < EXACT
    v = torch.randn(block.size, generator=seeded(), dtype=torch.float64)
    assert far(block.matvec(v), oracle @ v) < EXACT
    assert (
        far(block.matvec(torch.stack([v, 2 * v, -v])), torch.stack([oracle @ v, 2 * oracle @ v, -oracle @ v])) < EXACT
    )
    a = block.factor()
    assert a.shape == (block.rows, block.size) == (N * V, j.shape[-1])
    assert far(a.mT @ a, oracle) < EXACT
    diagonal, error = block.diagonal()
    assert far(diagonal, oracle.diagonal()) < EXACT and not error.any()


def test_exact_is_the_expectation_over_enumerated_labels() -> None:
    net, (x, _) = model(), batch()
    params, total = list(net.parameters()), 0.0
    p = net(x).softmax(-1).detach()
    for n in range(N):
        for v in range(V):
            g = flatten(torch.autograd.grad(F.cross_entropy(net(x[n]), torch.tensor(v)), params))
            total = total + p[n, v] * torch.outer(g, g) / N
    assert far(FisherBlock(net(x), params).matrix(), torch.as_tensor(total)) < EXACT


@pytest.mark.parametrize(("kind", "operator"), [
    ("exact", GGNLinearOperator), ("empirical", EFLinearOperator), ("hessian", HessianLinearOperator),
])  # fmt: skip
def test_products_are_those_of_curvlinops(kind: str, operator: type) -> None:
    net, (x, y) = model(), batch()
    params = list(net.parameters())
    theirs = operator(net, nn.CrossEntropyLoss(), params, [(x, y)])
    block = FisherBlock(net(x), params, kind=kind, targets=y)
    for seed in range(3):
        v = torch.randn(block.size, generator=seeded(seed), dtype=torch.float64)
        assert far(block.matvec(v), theirs @ v) < EXACT


@given(st.sampled_from(["exact", "sampled", "empirical"]), st.sampled_from(list(LIKELIHOODS)), st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_every_fisher_is_symmetric_positive_and_the_square_of_its_factor(kind: str, name: str, seed: int) -> None:
    net, (x, _) = model(seed), batch(seed)
    block = FisherBlock(
        net(x), list(net.parameters()), kind=kind, likelihood=name, targets=targets_of(name, seed),
        generator=seeded(seed), samples=2,
    )  # fmt: skip
    u, v = torch.randn(2, block.size, generator=seeded(seed), dtype=torch.float64)
    fu, fv = block.matvec(u), block.matvec(v)
    scale = float(fu.norm() * v.norm())
    assert abs(float(u @ fv - v @ fu)) <= EXACT * scale
    assert float(v @ fv) >= 0
    a = block.factor()
    assert len(a) == block.rows
    assert far(a.mT @ (a @ v), fv) < EXACT
    assert far(block.matvec(u + 3 * v), fu + 3 * fv) < EXACT


def test_the_hessian_is_not_the_fisher() -> None:
    net, (x, y) = model(), batch()
    params = list(net.parameters())
    fisher, hessian = (FisherBlock(net(x), params, kind=kind, targets=y) for kind in ("exact", "hessian"))
    assert far(hessian.matrix(), fisher.matrix()) > 0.1
    assert torch.linalg.eigvalsh(hessian.matrix())[0] < -1e-3 < torch.linalg.eigvalsh(fisher.matrix())[0]
    assert "not Fisher" in hessian.label and "not Fisher" not in fisher.label


def test_backward_through_the_gradient_is_the_hessian_product() -> None:
    net, (x, y) = model(), batch()
    params = list(net.parameters())
    v = torch.randn(sum(p.numel() for p in params), generator=seeded(), dtype=torch.float64)
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), params, create_graph=True)
    along = sum((g * u).sum() for g, u in zip(grads, unflatten(v, params), strict=True))
    pearlmutter = flatten(torch.autograd.grad(along, params))
    exact, hessian = (FisherBlock(net(x), params, kind=k, targets=y).matvec(v) for k in ("exact", "hessian"))
    assert far(hessian, pearlmutter) < EXACT < 0.1 < far(exact, pearlmutter)


def test_hessian_equals_fisher_where_the_logits_are_linear() -> None:
    net, (x, y) = model(depth=0), batch()
    fisher, hessian = (
        FisherBlock(net(x), list(net.parameters()), kind=kind, targets=y).matrix() for kind in ("exact", "hessian")
    )
    assert far(hessian, fisher) < EXACT


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_labels_are_unbiased(name: str) -> None:
    net, (x, _) = model(), batch()
    params = list(net.parameters())
    exact = FisherBlock(net(x), params, likelihood=name).matrix()
    generator = seeded(3)
    draws = torch.stack([
        FisherBlock(net(x), params, kind="sampled", likelihood=name, generator=generator, samples=4).matrix()
        for _ in range(60)
    ])  # fmt: skip
    z = (draws.mean(0) - exact).diagonal() / (draws.std(0).diagonal() / len(draws) ** 0.5)
    assert z.square().mean() < 2.5  # 1 expected; entries are dependent
    assert far(draws.mean(0), exact) < 0.25


def test_the_sampled_diagonal_is_unbiased_and_knows_its_error() -> None:
    net, (x, _) = model(), batch()
    block = FisherBlock(net(x), list(net.parameters()), generator=seeded(1))
    exact, _ = block.diagonal()
    mean, error = block.diagonal(samples=600)
    assert ((mean - exact) / error).square().mean() < 2.5
    assert block.diagonal(samples=1)[1].isnan().all()


def test_one_seed_gives_one_set_of_labels() -> None:
    net, (x, _) = model(), batch()
    a, b, c = (
        FisherBlock(net(x), list(net.parameters()), kind="sampled", generator=seeded(s)).matrix() for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("kind", ["exact", "empirical", "hessian"])
def test_ignored_targets_are_absent_rows(kind: str) -> None:
    net, (x, y) = model(), batch()
    params = list(net.parameters())
    hidden = y.clone()
    hidden[2:5] = -100
    kept = hidden >= 0
    a = FisherBlock(net(x), params, kind=kind, targets=hidden)
    b = FisherBlock(net(x[kept]), params, kind=kind, targets=y[kept])
    assert far(a.matrix(), b.matrix()) < EXACT and a.rows == b.rows
    assert a.loss_nats(net(x)) == pytest.approx(F.cross_entropy(net(x), hidden).item(), abs=1e-14)


def test_logits_may_have_any_leading_axes() -> None:
    net, (x, y) = model(), batch()
    params = list(net.parameters())
    x, y = x[:6].view(2, 3, 3), y[:6].view(2, 3)
    flat = FisherBlock(net(x).flatten(0, 1), params, kind="empirical", targets=y.flatten())
    assert torch.equal(FisherBlock(net(x), params, kind="empirical", targets=y).matrix(), flat.matrix())


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_factor_transposed_times_residual_is_the_gradient(kind: str, name: str) -> None:
    net, (x, _) = model(), batch()
    y, params = targets_of(name), list(net.parameters())
    loss = likelihood(name).loss_nats(net(x), y).mean()
    gradient = flatten(torch.autograd.grad(loss, params))
    block = FisherBlock(net(x), params, kind=kind, likelihood=name, targets=y)
    assert far(block.factor().mT @ block.residual(), gradient) < EXACT
    assert far(block.gradient(), gradient) < EXACT
    if name == "softmax" and kind == "exact":
        least = torch.linalg.pinv(block.likelihood.root(block.means[:1, None], torch.eye(V, dtype=torch.float64))[0].mT)
        score = block.likelihood.score(block.means, y)[0] * N**-0.5
        assert far(block.residual()[:V], least @ score) < EXACT


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("name", ["softmax", "gaussian"])
def test_a_known_jacobian_needs_no_graph(kind: str, name: str) -> None:
    net, (x, _) = model(), batch()
    names, params = [n for n, _ in net.named_parameters()], list(net.parameters())

    def one(p: tuple[Tensor, ...], row: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, p, strict=True)), (row,))

    rows = jacobian_rows(one, params, x)
    assert far(rows, jacobian(net, x)) < EXACT
    y = targets_of(name)
    known, passes = (
        FisherBlock(f, params, kind=kind, likelihood=name, targets=y, generator=seeded(), jacobian=j)
        for f, j in ((net(x).detach(), rows), (net(x), None))
    )
    v = torch.randn(known.size, generator=seeded(), dtype=torch.float64)
    assert far(known.matvec(v), passes.matvec(v)) < EXACT
    assert far(known.factor(), passes.factor()) < EXACT
    assert far(known.matrix(), passes.matrix()) < EXACT


def test_reduction_sum_leaves_the_mean_out() -> None:
    net, (x, _) = model(), batch()
    params = list(net.parameters())
    assert far(FisherBlock(net(x), params, reduction="sum").matrix(), N * FisherBlock(net(x), params).matrix()) < EXACT


def test_a_block_is_the_corner_of_the_whole() -> None:
    net, (x, _) = model(), batch()
    params = list(net.parameters())
    whole, corner = FisherBlock(net(x), params).matrix(), FisherBlock(net(x), params[2:]).matrix()
    assert far(corner, whole[-len(corner) :, -len(corner) :]) < EXACT


def test_divergence_of_a_small_step_is_half_its_length_squared() -> None:
    net, (x, _) = model(), batch()
    params = list(net.parameters())
    block = FisherBlock(net(x), params)
    d = 1e-4 * torch.randn(block.size, generator=seeded(), dtype=torch.float64)
    quadratic = float(d @ block.matvec(d)) / 2
    with torch.no_grad():
        torch._foreach_add_(params, unflatten(d, params))
    assert block.divergence_nats(net(x)) == pytest.approx(quadratic, rel=1e-3)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.head = nn.Embedding(V, 8), nn.Linear(8, 24), nn.Linear(8, V)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(tokens_BT))[:, None].chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
def test_products_pass_through_fused_attention(kind: str) -> None:
    net, tokens = Attention().double(), torch.randint(0, V, (2, 5), generator=seeded())
    params = list(net.parameters())
    with twice_differentiable():
        f = net(tokens)
    block = FisherBlock(f, params, kind=kind, targets=tokens.roll(-1, 1), generator=seeded())
    v = torch.randn(block.size, generator=seeded(), dtype=torch.float64)
    a = block.factor()
    assert far(block.matvec(v), a.mT @ (a @ v)) < EXACT
    assert far(block.matrix(), a.mT @ a) < EXACT


def test_above_fused_attention_nothing_is_needed_and_below_it_the_error_says_what() -> None:
    net, tokens = Attention().double(), torch.randint(0, V, (2, 5), generator=seeded())
    head = list(net.head.parameters())
    above = FisherBlock(net(tokens), head)
    v = torch.randn(above.size, generator=seeded(), dtype=torch.float64)
    with twice_differentiable():
        assert far(above.matvec(v), FisherBlock(net(tokens), head).matvec(v)) < EXACT
    below = FisherBlock(net(tokens), list(net.qkv.parameters()))
    with pytest.raises(ConfigError, match="twice_differentiable"):
        below.matvec(torch.ones(below.size, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_float32_vectors(dtype: torch.dtype) -> None:
    net, (x, _) = model(), batch()
    exact = FisherBlock(net(x), list(net.parameters()))
    v = torch.randn(exact.size, generator=seeded(), dtype=torch.float64)
    truth = exact.matvec(v)
    half = net.to(dtype)
    block = FisherBlock(half(x.to(dtype)), list(half.parameters()))
    for scale in (1.0, 1e-6, 1e6):  # float16 alone would underflow and overflow
        product = block.matvec(scale * v.float()) / scale
        assert product.dtype == torch.float32
        assert far(product.double(), truth) < 0.05


def test_a_parameter_the_logits_do_not_see_has_no_curvature() -> None:
    net, (x, y) = model(), batch()
    idle = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for kind in ("exact", "hessian"):
        matrix = FisherBlock(net(x), [idle, *net.parameters()], kind=kind, targets=y).matrix()
        alone = FisherBlock(net(x), list(net.parameters()), kind=kind, targets=y).matrix()
        assert not matrix[:2].any() and far(matrix[2:, 2:], alone) < EXACT


def test_flatten_and_unflatten_are_inverse() -> None:
    parts = [torch.randn(2, 3), torch.randn(()), torch.randn(4, dtype=torch.float64)]
    vector = flatten(parts)
    assert vector.dtype == torch.float64 and vector.shape == (11,)
    assert all(torch.equal(a, b) for a, b in zip(unflatten(vector, parts), parts, strict=True))


def test_impossible_requests_say_the_way_out() -> None:
    net, (x, y) = model(), batch()
    f, params = net(x), list(net.parameters())
    for words, broken in {
        "kind='fisher'": {"kind": "fisher"},
        "likelihood='poisson'": {"likelihood": "poisson"},
        "reduction='none'": {"reduction": "none"},
        "needs targets": {"kind": "empirical"},
        "targets of shape": {"targets": y[:3]},
        "no row of logits": {"targets": torch.full_like(y, -100)},
        "at least one label": {"kind": "sampled", "samples": 0},
    }.items():
        with pytest.raises(ConfigError, match=words):
            FisherBlock(f, params, **broken)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no parameters"):
        FisherBlock(f, [])
    with pytest.raises(ConfigError, match="requires_grad=False"):
        FisherBlock(f, [torch.zeros(2)])
    v = torch.ones(sum(p.numel() for p in params), dtype=torch.float64)
    with pytest.raises(ConfigError, match="no graph"):
        FisherBlock(f.detach(), params).matvec(v)
    with pytest.raises(ConfigError, match="indefinite"):
        FisherBlock(f, params, kind="hessian", targets=y).factor()
    F.cross_entropy(f, y).backward()
    with pytest.raises(ConfigError, match="retain_graph=True"):
        FisherBlock(f, params).matvec(v)
    f = net(x)
    F.cross_entropy(f, y).backward(retain_graph=True)
    torch.optim.SGD(params, lr=0.1).step()
    with pytest.raises(ConfigError, match="before any optimizer steps"):
        FisherBlock(f, params).matvec(v)
