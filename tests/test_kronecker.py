"""KroneckerNG against the singular value decomposition, published trajectories and torch's Muon."""

import copy
import io
import math
from typing import Any

import pytest
import torch

from constellation.errors import ConfigError
from constellation.optim import build
from constellation.optim.eigenbasis import eigenbasis, followed, off_diagonal
from constellation.optim.kronecker import VARIANTS, KroneckerNG, kronecker_step
from constellation.optim.polar import polar
from constellation.optim.whiten import WHITENED, sides
from constellation.presets import tiny


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_exact_polar_factor_is_the_natural_gradient_of_shampoos_fisher() -> None:
    g = matrix(4, 6).double()
    left, right = g @ g.T, g.T @ g

    def power(m: torch.Tensor, p: float) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(m)
        return vectors @ torch.diag(torch.where(values > 1e-9, values.clamp(min=1e-9) ** p, 0)) @ vectors.T

    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    assert torch.allclose(power(left, -0.25) @ g @ power(right, -0.25), u @ vt, atol=1e-8)


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (64, 24)])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [{"adjust_lr_fn": "match_rms_adamw"}, {"adjust_lr_fn": "original", "weight_decay": 0.1},
     {"adjust_lr_fn": "original", "nesterov": False, "ns_steps": 3, "ns_coefficients": (3.4, -4.7, 2.0)}],
    ids=["rms", "original", "other polynomial"],
)  # fmt: skip
def test_it_is_torchs_muon(shape: tuple[int, int], batched: bool, kwargs: dict[str, Any]) -> None:
    ours, theirs = matrix(*shape).requires_grad_(), matrix(*shape).requires_grad_()
    a = KroneckerNG([ours], lr=0.05, momentum=0.9, batched=batched, ns_precision="bf16", **kwargs)
    b = torch.optim.Muon([theirs], lr=0.05, momentum=0.9, **{"weight_decay": 0.0, **kwargs})
    for i in range(10):
        ours.grad, theirs.grad = matrix(*shape, seed=i + 1), matrix(*shape, seed=i + 1)
        a.step()
        b.step()
    if batched:
        assert torch.allclose(ours, theirs, atol=1e-2)  # bf16 products in another order
    else:
        assert torch.equal(ours, theirs)


def drifting(shape: tuple[int, int], i: int) -> torch.Tensor:
    """Gradients with a covariance that is no multiple of one, float64."""
    rows, columns = (torch.linspace(1, 3, n, dtype=torch.float64) for n in shape)
    mix = matrix(shape[0], shape[0], seed=99).double()
    return mix @ (matrix(*shape, seed=i + 1).double() * rows[:, None] * columns)


def bases_of(optimizer: KroneckerNG, w: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bases after the first gradient, seen to be eigenvectors; in its null space they are anybody's choice."""
    ql, qr = (optimizer.state[w][f"{side}_basis"].clone() for side in ("left", "right"))
    for q, factor in ((ql, first @ first.T), (qr, first.T @ first)):
        assert torch.allclose(q.T @ q, torch.eye(len(q)).to(q), atol=1e-5)
        assert float(off_diagonal((q.T @ factor @ q)[None])) < 1e-5
    return ql, qr


def published_soap(
    w: torch.Tensor, grads: list[torch.Tensor], bases: tuple[torch.Tensor, torch.Tensor], lr: float, b1: float,
    b2: float, every: int,
) -> None:  # fmt: skip
    """Algorithm 3 of Vyas et al. (2024) as their code has it, momentum in the coordinates of the weight."""
    (ql, qr), eps = bases, 1e-8
    first = grads[0]
    left, right = (1 - b2) * first @ first.T, (1 - b2) * first.T @ first
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(grads[1:], 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (ql.T @ g @ qr) ** 2
        size = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
        w -= size * ql @ ((ql.T @ m @ qr) / (v.sqrt() + eps)) @ qr.T
        left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
        if t % every == 0:
            for side in (0, 1):
                factor, q = ((left, ql), (right, qr))[side]
                product = factor @ q
                order = (q * product).sum(0).argsort(descending=True)
                v = v.index_select(side, order)
                q = torch.linalg.qr(product[:, order])[0]
                ql, qr = (q, qr) if side == 0 else (ql, q)


@pytest.mark.parametrize("shape", [(6, 6), (7, 4), (5, 8)])  # two gradients make every factor regular
@pytest.mark.parametrize("every", [1, 3])
def test_soap_is_the_published_trajectory(shape: tuple[int, int], every: int) -> None:
    grads = [drifting(shape, i) for i in range(12)]
    ours, theirs = matrix(*shape).double().requires_grad_(), matrix(*shape).double()
    optimizer = KroneckerNG([ours], lr=0.05, momentum=0.9, variant="soap", refresh=every)
    for i, g in enumerate(grads):
        ours.grad = g.clone()
        optimizer.step()
        if i == 0:
            assert torch.equal(ours, theirs)  # the first gradient only makes the bases
            bases = bases_of(optimizer, ours, g)
    published_soap(theirs, grads, bases, 0.05, 0.9, 0.95, every)
    assert torch.allclose(ours, theirs, atol=1e-9)


def test_soap_is_the_packaged_one() -> None:
    packaged = pytest.importorskip("pytorch_optimizer")
    ours, theirs = matrix(9, 5).requires_grad_(), matrix(9, 5).requires_grad_()
    a = KroneckerNG([ours], lr=0.02, variant="soap", refresh=2)
    b = packaged.SOAP([theirs], lr=0.02, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=2)
    for i in range(10):
        for w, optimizer in ((ours, a), (theirs, b)):
            w.grad = drifting((9, 5), i).float()
            optimizer.step()
        if i == 0:
            b.state[theirs]["Q"] = list(bases_of(a, ours, drifting((9, 5), 0).float()))
    assert torch.allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("shape", [(6, 6), (7, 4)])
def test_kl_shampoo_is_its_formula(shape: tuple[int, int]) -> None:
    """Before the first look at the bases these are the identity, and l, r the factors' diagonals."""
    lr, b1, b2 = 0.05, 0.9, 0.8
    w = matrix(*shape).double().requires_grad_()
    ours = w.detach().clone()
    optimizer = KroneckerNG([w], lr=lr, momentum=b1, fisher_decay=b2, variant="kl_shampoo", refresh=100)
    m = torch.zeros_like(ours)
    c = drifting(shape, 0).square().mean().sqrt()
    l, r = c.expand(shape[0]).clone(), c.expand(shape[1]).clone()
    left, right = torch.diag(l), torch.diag(r)
    for t in range(1, 6):
        g = drifting(shape, t - 1)
        w.grad = g.clone()
        optimizer.step()
        left = b2 * left + (1 - b2) * g @ torch.diag(1 / r) @ g.T / shape[1]
        right = b2 * right + (1 - b2) * g.T @ torch.diag(1 / l) @ g / shape[0]
        new_l, new_r = (g**2 / r).mean(1), (g**2 / l[:, None]).mean(0)
        l, r = b2 * l + (1 - b2) * new_l, b2 * r + (1 - b2) * new_r
        m = b1 * m + (1 - b1) * g
        ours -= lr * m / (1 - b1**t) / torch.outer(l, r).sqrt()
    assert torch.allclose(w, ours, atol=1e-9)
    assert torch.allclose(optimizer.state[w]["left"], left) and torch.allclose(optimizer.state[w]["right"], right)


@pytest.mark.parametrize("variant", WHITENED)
def test_bfloat16_products_change_a_step_by_their_rounding(variant: str) -> None:
    def after(products: str) -> torch.Tensor:
        w = torch.zeros(12, 12, requires_grad=True)
        optimizer = KroneckerNG([w], lr=1.0, variant=variant, refresh=50, products=products)
        for i in range(6):
            w.grad = matrix(12, 12, seed=i)
            optimizer.step()
        return w.detach()

    full, rounded = after("full"), after("bfloat16")
    assert 0 < float((full - rounded).norm() / full.norm()) < 0.1


@pytest.mark.parametrize("variant", WHITENED)
def test_steps_do_not_depend_on_the_scale_of_the_loss(variant: str) -> None:
    def after(scale: float) -> torch.Tensor:
        w = matrix(6, 4).double().requires_grad_()
        optimizer = KroneckerNG([w], lr=0.01, variant=variant, refresh=2, damping=0.0)
        for i in range(8):
            w.grad = drifting((6, 4), i) * scale
            optimizer.step()
        return w.detach()

    assert torch.allclose(after(1.0), after(1024.0), atol=1e-2 if variant == "soap_muon" else 1e-8)


def test_kl_factors_tend_to_the_covariance_of_matrix_normal_gradients() -> None:
    a, b = torch.diag(torch.tensor([9.0, 4.0, 1.0])), torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.5]))
    w = torch.zeros(3, 4, requires_grad=True)
    optimizer = KroneckerNG([w], lr=0.0, variant="kl_shampoo", fisher_decay=0.995, refresh=50)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2500):
        w.grad = a.sqrt() @ torch.randn(3, 4, generator=generator) @ b.sqrt()
        optimizer.step()
    s = optimizer.state[w]
    found, true = torch.kron(s["left"], s["right"]), torch.kron(a, b)
    assert float((found - true).norm() / true.norm()) < 0.2


def test_soap_muon_is_the_polar_factor_of_the_whitened_momentum() -> None:
    grads = [drifting((6, 4), i).float() for i in range(4)]
    w = torch.zeros(6, 4, requires_grad=True)
    optimizer = KroneckerNG([w], lr=1.0, momentum=0.9, variant="soap_muon", refresh=100)
    m, v = torch.zeros(6, 4), torch.zeros(6, 4)
    for t, g in enumerate(grads):
        before = w.detach().clone()
        w.grad = g
        optimizer.step()
        if t == 0:
            assert torch.equal(w, before)
            ql, qr = bases_of(optimizer, w, g)
            continue
        m = 0.9 * m + 0.1 * g
        u = ql.T @ (0.1 * g + 0.9 * m) @ qr
        v = 0.95 * v + 0.05 * u**2
        part = ql @ polar((u / (v.sqrt() + 1e-8))[None])[0].float() @ qr.T
        assert torch.allclose(before - w, 0.2 * math.sqrt(6) * part, atol=0.03)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stack_of_matrices_is_each_by_itself(variant: str) -> None:
    together = [matrix(4, 3, seed=i).requires_grad_() for i in range(3)]
    apart = [matrix(4, 3, seed=i).requires_grad_() for i in range(3)]
    whole = KroneckerNG(together, lr=0.1, variant=variant, refresh=2)
    single = [KroneckerNG([p], lr=0.1, variant=variant, refresh=2) for p in apart]
    for step in range(6):
        for i in range(3):
            skipped = step == 3 and i == 1  # a parameter without a gradient falls out of step with the others
            grad = None if skipped else matrix(4, 3, seed=7 * step + i)
            together[i].grad, apart[i].grad = grad, grad
            if not skipped:
                single[i].step()
        whole.step()
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize(
    ("shape", "kept"), [((8, 8), (1, 1)), ((40, 8), (0, 1)), ((8, 40), (1, 0)), ((90, 80), (0, 0))]
)
@pytest.mark.parametrize("variant", WHITENED)
def test_elongated_matrices_get_a_factor_on_their_short_side(
    variant: str, shape: tuple[int, int], kept: tuple[int, int]
) -> None:
    w = torch.zeros(*shape, requires_grad=True)
    optimizer = KroneckerNG([w], variant=variant, max_dim=64, max_aspect=4.0, refresh=2)
    for i in range(5):
        w.grad = matrix(*shape, seed=i)
        optimizer.step()
    assert ("left" in optimizer.state[w], "right" in optimizer.state[w]) == kept == sides(shape, 64, 4.0)
    assert torch.isfinite(w).all() and w.any()


def test_without_factors_soap_is_adam_from_the_second_gradient_on() -> None:
    ours, theirs = (torch.ones(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a = KroneckerNG([ours], lr=0.1, variant="soap", max_dim=1)
    b = torch.optim.Adam([theirs], lr=0.1, betas=(0.95, 0.95), eps=1e-8)
    for i in range(6):
        ours.grad = theirs.grad = matrix(5, 4, seed=i).double()
        a.step()
        if i:
            b.step()
    assert torch.allclose(ours, theirs, atol=1e-6)  # eps is outside of the correction


def factors(n: int = 6, count: int = 2) -> torch.Tensor:
    a = matrix(count, n, n).double()
    return a @ torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64) ** 2) @ a.mT


def test_following_a_fixed_factor_ends_in_its_eigenvectors() -> None:
    s = factors()
    basis = eigenbasis(s + 0.1 * factors(count=2).flip(0))
    for _ in range(300):
        moved = followed(s, basis)
        assert moved is not None
        basis = moved[0]
        assert torch.allclose(basis.mT @ basis, torch.eye(6, dtype=torch.float64), atol=1e-12)
    assert float(off_diagonal(basis.mT @ s @ basis).max()) < 1e-6
    assert followed(s, basis, above=1e-3) is None and followed(s, basis, above=0.0) is not None


@pytest.mark.parametrize("rank", [0, 1, 6])
def test_a_basis_diagonalises_its_factor_whatever_the_rank(rank: int) -> None:
    g = matrix(2, 6, rank, seed=3)
    s = g @ g.mT
    q = eigenbasis(s)
    turned = q.mT @ s @ q
    assert float(off_diagonal(turned).max()) < 1e-5
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert (values[:, :-1] >= values[:, 1:] - 1e-4).all()


@pytest.mark.parametrize("broken", [torch.float32, None])
def test_a_decomposition_that_raises_has_two_ways_out(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    real, asked = torch.linalg.eigh, []

    def eigh(a: torch.Tensor) -> Any:
        asked.append(a.dtype)
        if broken is None or a.dtype == broken:
            raise torch.linalg.LinAlgError("injected: the algorithm failed to converge")
        return real(a)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    q = eigenbasis(factors().float())
    assert asked == [torch.float32, torch.float64] and q.dtype == torch.float32
    assert torch.allclose(q.mT @ q, torch.eye(6).expand(2, 6, 6), atol=1e-5)
    w = torch.ones(6, 4, requires_grad=True)
    optimizer = KroneckerNG([w], variant="soap")
    for i in range(3):
        w.grad = matrix(6, 4, seed=i)
        optimizer.step()
    assert torch.isfinite(w).all() and not torch.equal(w, torch.ones(6, 4))


def test_a_step_is_as_long_as_one_of_adam() -> None:
    w = torch.zeros(64, 32, requires_grad=True)
    w.grad = matrix(64, 32)
    KroneckerNG([w], lr=1.0, momentum=0.0).step()
    assert 0.1 < float(w.detach().square().mean().sqrt()) < 0.35  # 0.2 by design


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "grad",
    [torch.zeros(4, 3), torch.full((4, 3), 1e-30), torch.full((4, 3), 1e30), torch.ones(4, 3)],
    ids=["zero", "tiny", "huge", "rank one"],
)
def test_zero_tiny_huge_and_rank_one_gradients_leave_finite_weights(grad: torch.Tensor, variant: str) -> None:
    w = torch.ones(4, 3, requires_grad=True)
    optimizer = KroneckerNG([w], lr=0.1, variant=variant, refresh=2)
    for _ in range(5):
        w.grad = grad.clone()
        optimizer.step()
    assert torch.isfinite(w).all() and all(torch.isfinite(t).all() for t in optimizer.state[w].values())
    too_large = float(grad.max()) > 1e18 and variant in WHITENED  # its square is no float32
    assert optimizer.outcome == ("skipped" if too_large else "stepped")
    if too_large or not grad.any():
        assert torch.equal(w, torch.ones(4, 3))


@pytest.mark.parametrize("variant", WHITENED)
def test_a_weight_whose_first_gradients_are_zero_begins_with_the_first_that_is_not(variant: str) -> None:
    late, prompt = (torch.ones(4, 3, requires_grad=True) for _ in range(2))
    a, b = KroneckerNG([late], lr=0.1, variant=variant), KroneckerNG([prompt], lr=0.1, variant=variant)
    for i in range(6):
        late.grad = matrix(4, 3, seed=i) if i >= 3 else torch.zeros(4, 3)
        a.step()
        if i >= 3:
            prompt.grad = matrix(4, 3, seed=i)
            b.step()
    assert torch.equal(late, prompt) and not torch.equal(late, torch.ones(4, 3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_damaged_gradients_and_overflow_leave_parameters_and_state(variant: str) -> None:
    w, v = torch.ones(4, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = KroneckerNG([{"params": [w]}, {"params": [v], "method": "diag"}], lr=0.1, variant=variant)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(((w * matrix(4, 3)).sum() + v.sum()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    step(1.0)
    kept = copy.deepcopy([w.detach(), v.detach(), *optimizer.state[w].values(), *optimizer.state[v].values()])
    step(float("inf"))
    assert optimizer.outcome == "skipped" and optimizer.get_stats()["skipped_steps"] == 1
    w.grad = torch.full((4, 3), float("nan"))
    optimizer.step()
    now = [w.detach(), v.detach(), *optimizer.state[w].values(), *optimizer.state[v].values()]
    assert all(map(torch.equal, kept, now)) and optimizer.get_stats()["skipped_steps"] == 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_saved_optimizer_goes_on_bit_for_bit(variant: str, dtype: torch.dtype, at: int) -> None:
    shapes = [(5, 3), (5, 3), (3, 5), (3,)]

    def begin() -> tuple[list[torch.Tensor], KroneckerNG, Any]:
        params = [matrix(*s, seed=i).to(dtype).requires_grad_() for i, s in enumerate(shapes)]
        groups = [{"params": params[:3]}, {"params": params[3:], "method": "diag"}]
        optimizer = KroneckerNG(groups, lr=0.1, variant=variant, refresh=2)
        return params, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    def run(params: list[torch.Tensor], optimizer: KroneckerNG, schedule: Any, steps: range) -> None:
        for i in steps:
            for k, p in enumerate(params):
                p.grad = matrix(*p.shape, seed=10 * i + k).to(dtype)
            optimizer.step()
            schedule.step()

    params, optimizer, schedule = begin()
    run(params, optimizer, schedule, range(at))
    file = io.BytesIO()
    torch.save([[p.detach() for p in params], optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    weights, state, times = torch.load(file, weights_only=True)
    others, second, again = begin()
    with torch.no_grad():
        torch._foreach_copy_(others, weights)
    second.load_state_dict(state)
    again.load_state_dict(times)
    assert all(t.dtype == torch.float32 for s in second.state.values() for t in s.values())
    run(params, optimizer, schedule, range(at, at + 5))
    run(others, second, again, range(at, at + 5))
    assert all(map(torch.equal, params, others))


def test_states_of_the_first_release_still_load() -> None:
    w, v = torch.ones(4, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    groups = [{"params": [w]}, {"params": [v], "method": "diag"}]
    optimizer = KroneckerNG(groups)
    w.grad, v.grad = torch.ones(4, 3), torch.ones(3)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for group, old in zip(saved["param_groups"], ("kronecker", "diagonal"), strict=True):
        for name in ("variant", "refresh", "nesterov", "batched", "check_finite"):
            del group[name]
        group["method"] = old
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert [g["method"] for g in optimizer.param_groups] == ["kron", "diag"]


def test_kronecker_step_needs_a_learning_rate_alone() -> None:
    ours, theirs = matrix(4, 3).requires_grad_(), matrix(4, 3).requires_grad_()
    ours.grad = theirs.grad = matrix(4, 3, seed=1)
    with torch.no_grad():
        kronecker_step([ours], torch.optim.SGD([ours]).state, {"lr": 0.1})
    KroneckerNG([theirs], lr=0.1).step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stats_are_plain_numbers(variant: str) -> None:
    w = torch.ones(4, 3, requires_grad=True)
    optimizer = KroneckerNG([w], variant=variant)
    for i in range(3):
        w.grad = matrix(4, 3, seed=i)
        optimizer.step()
    stats = optimizer.get_stats()
    assert all(type(value) is float for value in stats.values()) and stats["natural_steps"] == 3
    assert ("condition_number" in stats) == (variant != "muon")  # muon keeps no curvature


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"params": [torch.zeros(3, requires_grad=True)], "method": "kron"}, "method=diag"),
        ({"params": [torch.zeros(4, 3, requires_grad=True)], "ns_precision": "fp8"}, "fp8"),
        ({"params": [torch.zeros(4, 3, requires_grad=True)], "method": "kfac"}, "kfac"),
        ({"params": [torch.zeros(4, 3, requires_grad=True)], "variant": "kfac"}, "kfac"),
        ({"params": [torch.zeros(4, 3, dtype=torch.complex64, requires_grad=True)]}, "complex64"),
    ],
)
def test_impossible_groups_are_named(group: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        KroneckerNG([group])


def test_build_gives_every_parameter_to_one_group_and_embeddings_to_the_diagonal() -> None:
    from constellation.kernel.model import KernelLM

    model = KernelLM(tiny().kernel)
    kronecker, diagonal = build(tiny().optim, model).param_groups
    seen = [id(p) for g in (kronecker, diagonal) for p in g["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    assert len(kronecker["params"]) == 4 * len(model.blocks)
    assert id(model.embedding.weight) in {id(p) for p in diagonal["params"]}
