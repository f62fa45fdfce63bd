"""The kernel model against a naive one in loops, and its laws: causality, sizes, seeds."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Kernel
from constellation.kernel.model import COUPLING_FLOOR, KernelLM, inverse_temperature, parameter_count
from constellation.presets import PRESETS, preset

MINI = Kernel(vocab_size=300, width=24, layers=2, heads=3, hidden=40, context=48, coupling_ref=8)
KINDS = [
    ("fidelity", "fixed"), ("fidelity", "learned"), ("fidelity", "off"), ("fidelity", "scalable"),
    ("geodesic", "fixed"), ("geodesic", "scalable"), ("dot", "fixed"), ("dot", "off"), ("dot", "scalable"),
]  # fmt: skip


def mini(**changes):
    """A small model whose logits are far from uniform, so that a mistake shows."""
    model, generator = KernelLM(dataclasses.replace(MINI, **changes), seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5 if weight.dim() == 2 else 1 + 0.1 * torch.randn(weight.shape, generator=generator))
    return model


def some_tokens(*shape, config=MINI, seed=0):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# -- the naive model -----------------------------------------------------------------------------------------------


def rms_norm(x, weight):
    return x / torch.sqrt((x * x).mean() + 1e-6) * weight


def turned(x, position, base):
    """Rotary positions as complex numbers: pair (i, i + K/2) times exp(1j position base^(-2i/K))."""
    half = len(x) // 2
    z = torch.complex(x[:half], x[half:])
    angle = position * base ** (-2 * torch.arange(half, dtype=torch.float64) / len(x))
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag))


def naive_logit(model, block, head, q, k, i):
    """c_h(i) cos(theta), -c_h(i) theta^2 / 2 of the states' angle or that of the nearer sign, or the scaled product."""
    config = model.config
    beta = 0.0 if config.coupling == "off" else float(model.beta)
    coupling = max(1 + beta * math.log((i + 1) / config.coupling_ref), COUPLING_FLOOR)
    if config.coupling == "scalable":
        coupling = math.log(i + 1) / math.log(config.coupling_ref)
    if hasattr(block.attention, "log_c"):
        coupling *= math.exp(block.attention.log_c[head])
    if config.metric == "dot":
        return coupling * (q @ k) / math.sqrt(len(q))
    a, b = q / q.norm(), k / k.norm()
    theta = 2 * torch.atan2((a - b).norm(), (a + b).norm())
    if config.metric == "geodesic":
        return -coupling * min(theta, math.pi - theta) ** 2 / 2
    return coupling * torch.cos(theta)


@torch.no_grad()
def naive_forward(model, tokens):
    config, size = model.config, model.config.width // model.config.heads
    stream = [model.embedding.weight[t].clone() for t in tokens]
    if config.look_back:
        stream = [x + model.look_back * b for x, b in zip(stream, [torch.zeros_like(stream[0]), *stream])]
    middle = model.blocks[config.prelude : config.layers - config.coda]
    loops = [block for _ in range(config.loops) for block in middle]
    for block in [*model.blocks[: config.prelude], *loops, *model.blocks[config.layers - config.coda :]]:
        y = [block.attention.qkv.weight @ rms_norm(x, block.norm_attention.weight) for x in stream]
        for i in range(len(stream)):
            heads = []
            for h in range(config.heads):
                shared = h * config.groups // config.heads
                first = [h, config.heads + shared, config.heads + config.groups + shared]
                part = [slice(n * size, (n + 1) * size) for n in first]
                q = turned(y[i][part[0]], i, config.rope_base)
                keys = [turned(y[j][part[1]], j, config.rope_base) for j in range(i + 1)]
                logits = torch.stack([naive_logit(model, block, h, q, k, i) for k in keys])
                weights = torch.exp(logits) / torch.exp(logits).sum()
                heads.append(sum(w * y[j][part[2]] for j, w in enumerate(weights)))
            stream[i] = stream[i] + block.attention.out.weight @ torch.cat(heads)
        for i, x in enumerate(stream):
            gate, up = (block.mlp.gate_up.weight @ rms_norm(x, block.norm_mlp.weight)).chunk(2)
            stream[i] = x + block.mlp.out.weight @ (gate / (1 + torch.exp(-gate)) * up)
    head = model.embedding.weight if config.tied else model.head.weight
    return torch.stack([head @ rms_norm(x, model.norm.weight) for x in stream])


@pytest.mark.parametrize(("metric", "coupling"), KINDS)
def test_logits_equal_the_naive_model_in_loops(metric, coupling):
    model = mini(metric=metric, coupling=coupling).double()
    tokens = some_tokens(17)
    torch.testing.assert_close(model(tokens[None])[0].detach(), naive_forward(model, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["fidelity", "geodesic", "dot"])
def test_logits_of_a_composed_kernel_equal_the_naive_model_in_loops(metric):
    changes = {"heads": 4, "kv_heads": 2, "layers": 4, "prelude": 1, "loops": 3, "coda": 1, "tied": False, "width": 32}
    model, tokens = mini(metric=metric, coupling="scalable", **changes).double(), some_tokens(13)
    torch.testing.assert_close(model(tokens[None])[0].detach(), naive_forward(model, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["fidelity", "dot"])
def test_fused_attention_equals_the_explicit_products(metric):
    model, tokens = mini(metric=metric), some_tokens(2, 48)
    explicit = model(tokens)
    whole = model.rows
    model.rows = lambda length: dataclasses.replace(whole(length), mask_TT=None)
    assert not torch.equal(model(tokens), explicit), "the fused path was not taken"
    torch.testing.assert_close(model(tokens), explicit, rtol=1e-4, atol=1e-4)


def test_fidelity_logits_do_not_see_the_lengths_of_q_and_k():
    model = mini(coupling="off")
    attention, rows = model.blocks[0].attention, model.rows(9)
    x = torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(0))
    q, k, _ = attention.project(x, rows)
    q7, k7, _ = attention.project(7 * x, rows)
    torch.testing.assert_close(q7 @ k7.mT, q @ k.mT)
    c = attention.log_c.exp()[:, None]
    torch.testing.assert_close(q.norm(dim=-1)[0], c.expand(3, 9))
    assert ((q @ k.mT).abs() <= c[..., None] * (1 + 1e-6)).all()


# -- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "coupling"), KINDS)
@pytest.mark.parametrize("length", [2, 33, 600])
def test_a_change_of_a_later_token_leaves_earlier_logits_bit_identical(metric, coupling, length):
    model = mini(metric=metric, coupling=coupling, context=600)  # 600: beyond the explicit path
    tokens = some_tokens(2, length)
    with torch.no_grad():
        before = model(tokens)
        for at in {1, length // 2, length - 1}:
            changed = tokens.clone()
            changed[:, at] = (changed[:, at] + 1) % MINI.vocab_size
            after = model(changed)
            assert torch.equal(after[:, :at], before[:, :at])
            assert not torch.equal(after[:, at:], before[:, at:])


@given(st.floats(-2, 2), st.integers(1, 4096), st.integers(1, 4096))
@settings(deadline=None)
def test_inverse_temperature_is_the_floored_logarithm(beta, length, ref):
    value = inverse_temperature(torch.tensor([float(length)], dtype=torch.float64), beta, ref)
    assert value.item() == pytest.approx(max(1 + beta * math.log(length / ref), COUPLING_FLOOR))


def test_inverse_temperature_is_one_at_the_reference_length_and_without_beta():
    lengths = torch.arange(1, 1025).float()
    assert inverse_temperature(lengths, 0.44, 32)[31] == 1
    assert (inverse_temperature(lengths, 0.0, 32) == 1).all()
    assert inverse_temperature(lengths, 0.44, 32)[63] == pytest.approx(1 + 0.44 * math.log(2))
    assert inverse_temperature(lengths, 0.44, 1024)[0] == pytest.approx(COUPLING_FLOOR)


SIZES = {"tiny": 41_668, "small": 725_004, "23m": 22_911_808, "100m": 100_683_408}


def test_the_presets_have_the_sizes_of_the_table():
    assert {name: parameter_count(preset(name).kernel) for name in PRESETS} == SIZES
    assert abs(SIZES["100m"] / 100e6 - 1) <= 0.05


@pytest.mark.parametrize("name", PRESETS)
def test_the_formula_counts_what_the_model_holds(name):
    with torch.device("meta"):
        model = KernelLM(preset(name).kernel, seed=None)
    assert model.num_parameters() == parameter_count(preset(name).kernel)


@pytest.mark.parametrize(("metric", "coupling"), KINDS)
def test_the_formula_counts_every_kind(metric, coupling):
    model = mini(metric=metric, coupling=coupling)
    assert model.num_parameters() == parameter_count(model.config)


@pytest.mark.parametrize(("metric", "coupling"), KINDS)
def test_every_parameter_has_a_gradient(metric, coupling):
    model, tokens = mini(metric=metric, coupling=coupling), some_tokens(2, 20)
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), some_tokens(40, seed=1)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_seed_fixes_every_bit_whatever_the_global_generator_holds():
    torch.manual_seed(0)
    a = KernelLM(MINI, seed=3)
    torch.manual_seed(1)
    b, c = KernelLM(MINI, seed=3), KernelLM(MINI, seed=4)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embedding.weight, c.embedding.weight)


def test_the_start_is_near_a_uniform_guess():
    model = KernelLM(preset("small").kernel)
    tokens = some_tokens(4, 64, config=model.config)
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1).flatten())
    assert loss.item() == pytest.approx(math.log(1024) + 0.5, abs=0.6)  # logits of variance 1 cost half a nat


@pytest.mark.parametrize("metric", ["fidelity", "geodesic"])
def test_bf16_autocast_stays_near_fp32(metric):
    model, tokens = mini(metric=metric), some_tokens(2, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(tokens)
    assert low.dtype == torch.bfloat16
    exact = torch.log_softmax(model(tokens), -1)
    assert (torch.log_softmax(low.float(), -1) - exact).abs().mean() < 0.05
