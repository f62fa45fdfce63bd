"""Kernels of every composed kind: metric, coupling, recursion, shared keys, untied head. Laws that all of them keep."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Kernel, override
from constellation.decoding.batch import Batch, Writing
from constellation.decoding.compiled import available
from constellation.decoding.decode import decode_naive
from constellation.decoding.native import NativeSlots, Panels, Panels8
from constellation.decoding.packed import Packed
from constellation.decoding.sample import Sampling
from constellation.decoding.slots import Run, Slots
from constellation.errors import ConfigError
from constellation.kernel.geodesic import NEAR, half_square_angle
from constellation.kernel.model import KernelLM, multiplications, parameter_count
from constellation.presets import preset
from tests.cases import lively_kernel

BASE = Kernel(vocab_size=300, width=64, layers=1, heads=4, hidden=40, context=40, coupling_ref=8)
PATHS = [("torch", "fp32"), ("torch", "int8"), *((("C", "fp32"), ("C", "int8")) if available() else ())]


@st.composite
def kinds(draw):
    prelude, group, coda = draw(st.integers(0, 1)), draw(st.integers(1, 2)), draw(st.integers(0, 1))
    return dataclasses.replace(
        BASE,
        metric=draw(st.sampled_from(["fidelity", "geodesic", "dot"])),
        coupling=draw(st.sampled_from(["fixed", "off", "learned", "scalable"])),
        look_back=draw(st.integers(0, 1)),
        kv_heads=draw(st.sampled_from([0, 1, 2, 4])),
        tied=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([1e-6, 1e-3])),
        basin_head=draw(st.booleans()),
        prelude=prelude, coda=coda, layers=prelude + group + coda, loops=draw(st.sampled_from([1, 3, 4])),
    )  # fmt: skip


def tokens_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_by(path: str, precision: str, model: KernelLM, tokens: list[int]) -> torch.Tensor:
    """Of every position, by the forward pass that decodes."""
    product = {"fp32": Panels, "int8": Panels8}[precision] if path == "C" else None
    packed, count = Packed(model, precision, product=product), len(tokens)
    slots = NativeSlots(packed, 3) if path == "C" else Slots(packed, 3)
    runs = [Run(0, count, 2, False, -(-count // 16) * 16)]
    with torch.inference_mode():
        return slots.logits(slots.read(tokens, [300, *tokens[:-1]], list(range(count)), [2] * count, runs))


@given(kinds(), st.sampled_from(PATHS))
@settings(deadline=None, max_examples=30)
def test_every_kind_has_the_same_logits_by_every_path(config, how):
    (path, precision), model, tokens = how, lively_kernel(config, 1.5), tokens_of(40)
    exact = model(torch.tensor([tokens]))[0].detach()
    found = logits_by(path, precision, model, tokens)
    if precision == "fp32":
        torch.testing.assert_close(found, exact, rtol=2e-4, atol=2e-4)
    else:
        lost = torch.log_softmax(exact, -1) - torch.log_softmax(found, -1)
        assert 0 <= float((exact.softmax(-1) * lost).sum(-1).mean()) < 0.02


@given(kinds(), st.booleans())
@settings(deadline=None, max_examples=15)
def test_every_kind_decodes_what_whole_forward_passes_do(config, native):
    """By rows, in pieces, and by the pass over all slots that a CUDA graph holds; alone and in company."""
    model, samplings = (
        lively_kernel(config, 1.5),
        [Sampling(temperature=0, max_new_tokens=8), Sampling(seed=3, max_new_tokens=8)],
    )
    windows = [tokens_of(7), tokens_of(19, 1)]
    naive = [decode_naive(model, w, s) for w, s in zip(windows, samplings)]
    for options in ({"native": native and available(), "chunk": 5}, {"wide": True, "native": False}):
        works = [Writing(tokens=list(w), sampling=s, room=8, take=_counted(8)) for w, s in zip(windows, samplings)]
        batch = Batch(model, slots=2, **options)
        for work in works:
            batch.add(work)
        while not batch.idle:
            batch.step()
        assert [work.tokens[len(w) :] for work, w in zip(works, windows)] == naive


def _counted(count):
    left = iter(range(1, count + 1))
    return lambda token: next(left) == count


@given(kinds())
@settings(deadline=None, max_examples=15)
def test_every_kind_is_causal_to_the_bit_and_counted_by_the_formula(config):
    model, tokens = lively_kernel(config, 1.5), torch.tensor([tokens_of(30), tokens_of(30, 1)])
    assert model.num_parameters() == parameter_count(config) <= multiplications(config)
    with torch.no_grad():
        before = model(tokens)
        changed = tokens.clone()
        changed[:, 15] = (changed[:, 15] + 1) % 300
        after = model(changed)
    assert torch.equal(after[:, :15], before[:, :15]) and not torch.equal(after[:, 15:], before[:, 15:])


@given(kinds())
@settings(deadline=None, max_examples=15)
def test_every_parameter_of_every_kind_has_a_gradient_but_the_basin_head_of_the_next_token(config):
    model, tokens = lively_kernel(config, 1.5), torch.tensor([tokens_of(20)])
    torch.nn.functional.cross_entropy(model(tokens)[0], torch.tensor(tokens_of(20, 1))).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == ({"basin_head.weight"} if config.basin_head else set())


# -- recursion ---------------------------------------------------------------------------------------------------------


def test_a_tied_group_is_the_untied_model_whose_blocks_are_copies():
    tied = lively_kernel(dataclasses.replace(BASE, layers=4, prelude=1, loops=3, coda=1), 1.5)
    untied = KernelLM(dataclasses.replace(BASE, layers=8), seed=None)
    state = {k: v for k, v in tied.state_dict().items() if not k.startswith("blocks")}
    for at, block in enumerate((0, 1, 2, 1, 2, 1, 2, 3)):
        state |= {f"blocks.{at}.{name}": value for name, value in tied.blocks[block].state_dict().items()}
    untied.load_state_dict(state)
    tokens = torch.tensor([tokens_of(40)])
    assert tied.config.order == (0, 1, 2, 1, 2, 1, 2, 3)
    assert torch.equal(tied(tokens), untied(tokens))


def test_one_loop_is_the_plain_kernel():
    plain, named = (KernelLM(dataclasses.replace(BASE, layers=3, **k)) for k in ({}, {"prelude": 1, "coda": 1}))
    assert plain.config.order == named.config.order == (0, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), named.parameters()))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kernel.loops": 2}, r"kernel\.loops=2: must be at least 3 \(min_loops\), or 1"),
        ({"kernel.loops": 0}, r"kernel\.loops=0"),
        ({"kernel.prelude": 2, "kernel.coda": 1}, r"kernel\.prelude=2 and kernel\.coda=1 leave none of"),
        ({"kernel.kv_heads": 3}, r"kernel\.kv_heads=3: must divide kernel\.heads=4"),
        ({"kernel.coupling": "scalable", "kernel.coupling_ref": 1}, r"kernel\.coupling_ref=1"),
        ({"kernel.metric": "hyperbolic"}, "one of dot, fidelity, geodesic"),
    ],
)  # fmt: skip
def test_what_is_no_kernel_is_told_in_a_line(changes, said):
    with pytest.raises(ConfigError, match=said) as told:
        override(preset("small"), changes)
    assert "\n" not in str(told.value)


def test_an_impossible_kernel_is_refused_without_a_configuration_too():
    with pytest.raises(ConfigError, match=r"kernel\.loops=2"):
        KernelLM(dataclasses.replace(BASE, loops=2))


# -- metrics and couplings ---------------------------------------------------------------------------------------------


@given(st.floats(-1, 1))
@settings(deadline=None)
def test_half_the_square_of_an_angle(x):
    found = half_square_angle(torch.tensor(x, dtype=torch.float64)).item()
    assert found == pytest.approx(math.acos(abs(x)) ** 2 / 2, rel=1e-9, abs=1e-15)


def test_the_angle_is_safe_at_its_ends_and_has_two_derivatives():
    ends = torch.tensor([-1.0, 0.0, 1.0, 1.0 + 1e-7], dtype=torch.float32, requires_grad=True)
    (slope,) = torch.autograd.grad(half_square_angle(ends).sum(), ends)
    assert half_square_angle(ends).tolist() == pytest.approx([0, math.pi**2 / 8, 0, 0], abs=1e-7)
    assert slope.tolist()[:3] == [1, 0, -1] and slope.isfinite().all()
    inside = torch.tensor([-0.7, 0.3, 1 - 1.1 * NEAR, 1 - 0.9 * NEAR, 0.999], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(half_square_angle, inside)
    assert torch.autograd.gradgradcheck(half_square_angle, inside)


def test_a_state_and_its_negative_are_the_same_to_the_geodesic_metric():
    model = lively_kernel(dataclasses.replace(BASE, metric="geodesic", look_back=0), 1.5)
    tokens = torch.tensor([tokens_of(20)])
    before = model(tokens)
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight[:64].neg_()
    torch.testing.assert_close(model(tokens), before)


@pytest.mark.parametrize("metric", ["fidelity", "dot", "geodesic"])
def test_scalable_softmax_is_s_ln_n_times_the_logit(metric):
    """Equal to no coupling at L_ref keys; the ratio of two rows' factors is that of their logarithms."""
    config = dataclasses.replace(BASE, metric=metric)
    scalable, off = (KernelLM(dataclasses.replace(config, coupling=c)) for c in ("scalable", "off"))
    factor, plain = (m.blocks[0].attention.factor(m.rows(40)) for m in (scalable, off))
    torch.testing.assert_close(factor[:, 7], plain[:, 7].expand(4))
    torch.testing.assert_close(factor[:, 31] / factor[:, 3], torch.full((4,), math.log(32) / math.log(4)))
    assert (factor[:, 0] == 0).all()


@pytest.mark.slow
def test_flex_attention_is_the_dense_reference(monkeypatch):
    """Its formula uncompiled, forward alone: what torch has of it on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    from constellation.kernel import geodesic

    monkeypatch.setattr(geodesic, "_compiled", lambda: flex_attention)
    model = lively_kernel(dataclasses.replace(BASE, metric="geodesic"), 1.5)
    attention, rows = model.blocks[0].attention, model.rows(32)
    with torch.no_grad():
        x = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
        dense, flex = (attention(x, dataclasses.replace(rows, mask_TT=mask)) for mask in (rows.mask_TT, None))
    torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-5)


# -- old runs ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_from_before_these_settings_is_read_as_it_was():
    old = {"vocab_size": 300, "width": 64, "layers": 2, "heads": 4, "hidden": 40, "context": 40, "metric": "fidelity",
           "coupling": "fixed", "coupling_beta": 0.44, "coupling_ref": 8, "look_back": 1, "rope_base": 1e4}  # fmt: skip
    model = KernelLM(Kernel(**old))
    assert set(model.state_dict()) == {
        "look_back", "embedding.weight", "norm.weight",
        *(f"blocks.{i}.{n}" for i in range(2) for n in (
            "norm_attention.weight", "attention.log_c", "attention.qkv.weight", "attention.out.weight",
            "norm_mlp.weight", "mlp.gate_up.weight", "mlp.out.weight")),
    }  # fmt: skip
