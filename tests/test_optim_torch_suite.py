"""Every optimizer of ours through the cases of torch's own optimizer suite (test/test_optim.py, by name).

The bodies are written here to the names of torch's tests; the configurations common to all optimizers and the error
inputs come from torch's database. The same bodies run over three of torch's own optimizers, which shows that they ask
nothing that torch does not. What does not apply:

    test                                       why not
    *_multigpu, test_mixed_device_dtype        one device here; parameters are grouped by device and dtype in the code
    test_cudagraphs, test_peak_memory_foreach,
    *_large_tensor, test_fused_cpu_matches_cuda,
    test_state_dict_with_cuda_params,
    test_cpu_load_state_dict                   need a GPU (capturable is exercised on the CPU)
    test_fused_*                               no flag `fused`: power 1/2 always runs in the fused kernel; its parity is
                                               tests/test_optim.py, and found_inf is below for every class
    test_rosenbrock_sparse, SparseAdam's       sparse gradients are refused by every class: below
    test_complex, test_complex_2d              complex parameters are refused by every class: below
    test_foreach_matches_forloop               classes that have the flag; the stacks of the others against single
                                               matrices are in their own files
    test_differentiable                        DiagonalNG, QIGDiagonalNG, SimpleFisherOptimizer
    test_compiled_optimizer_parity             no path is compiled: nothing used it
    test_tensor_lr, num_dim                    0 and 1 dimensions; more elements are an error input
    test_defaults_changed_to_foreach           asks a mock of torch's for its calls
    test_param_groups_*, *_with_lrscheduler*,
    test_tensor_lr, *_have_no_grad
    of AdaptiveMixedQIG                        it makes its groups itself, of named parameters that want a gradient;
                                               HybridGeometricOptimizer's are the same groups and are here
"""

from __future__ import annotations

import copy
import functools
import importlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler

from constellation.optim.gate import AdaptiveConfig

pytest.importorskip("expecttest")  # torch.testing._internal wants it
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    get_error_inputs_for_all_optims,
    optim_db,
)


@dataclass(frozen=True)
class Case:
    """One optimizer under test, as torch's OptimizerInfo."""

    module: str
    name: str
    configs: Sequence[dict[str, Any]] = ({},)
    fixed: dict[str, Any] = field(default_factory=dict)  # in every configuration
    flags: tuple[str, ...] = ()  # of foreach, differentiable
    groups: Callable[[list[Any], dict[str, Any]], Any] = lambda params, kwargs: params
    inner: tuple[str, ...] = ()  # options that live in groups alone
    sees: bool = False  # needs the likelihood
    grouped: bool = True  # takes param groups, each with its lr
    plain: bool = True  # the constructor takes what torch's take
    errors: Sequence[tuple[dict[str, Any], str]] = ()
    id: str = ""

    @property
    def cls(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)

    def inputs(self, skip: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
        """Every configuration with all flags unset, and with each of them set."""
        flags = [flag for flag in self.flags if flag not in skip]
        for config in self.configs:
            base = {**self.fixed, **copy.deepcopy(config)}
            yield {**base, **dict.fromkeys(flags, False)}
            for flag in flags:
                yield {**base, **dict.fromkeys(flags, False), flag: True}

    def make(self, params: Sequence[Any], **kwargs: Any) -> Any:
        """The optimizer; groups given as dictionaries stay what they are."""
        params = list(params)
        inner = {name: kwargs.pop(name) for name in self.inner if name in kwargs}
        if isinstance(params[0], dict):
            flat = [{**inner, **g} for g in params]
            params = [part for g in flat for part in self._split(g)]
        else:
            params = self.groups(params, inner)
        return self.cls(params, **kwargs)

    def _split(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        rest = {k: v for k, v in group.items() if k != "params"}
        parts = self.groups(list(group["params"]), {})
        return [{**part, **rest} for part in parts] if parts and isinstance(parts[0], dict) else [group]


def hybrid(method: str) -> Callable[[list[Any], dict[str, Any]], list[dict[str, Any]]]:
    """Matrices by `method`, the rest by AdamW; without a matrix everything by `method`."""

    def groups(params: list[Any], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        tensor = [p[1] if isinstance(p, tuple) else p for p in params]
        if all(t.dim() != 2 for t in tensor) or all(t.dim() == 2 for t in tensor):
            return [{"params": params, "method": method if tensor[0].dim() == 2 else "adamw", **kwargs}]
        matrices = [p for p, t in zip(params, tensor, strict=True) if t.dim() == 2]
        others = [p for p, t in zip(params, tensor, strict=True) if t.dim() != 2]
        return [{"params": matrices, "method": method, **kwargs}, {"params": others, "method": "adamw", **kwargs}]

    return groups


def named(params: list[Any], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names that put matrices into the basin block, or the first parameter where there is none."""
    tensor = [p[1] if isinstance(p, tuple) else p for p in params]
    kinds = ["basin" if t.dim() == 2 else "rest" for t in tensor]
    kinds = kinds if "basin" in kinds else ["basin", *kinds[1:]]
    return [(f"{kind}.{i}", t) for i, (kind, t) in enumerate(zip(kinds, tensor, strict=True))]


DIAGONAL = "constellation.optim.diagonal"
COMMON: list[dict[str, Any]] = [
    {}, {"lr": 0.01}, {"lr": torch.tensor(0.001)}, {"weight_decay": 0.1}, {"maximize": True},
    {"maximize": True, "weight_decay": 0.1},
]  # fmt: skip
CASES = [
    Case(
        DIAGONAL, "DiagonalNG",
        [*COMMON, {"momentum": 0.0}, {"power": 0.5, "damping": 1e-8}, {"power": 0.7, "bias_correction": False},
         {"batch_size": 4.0}],
        flags=("foreach", "differentiable"),
        errors=[({"lr": -1.0}, "lr=-1.0"), ({"fisher_decay": 1.1}, "fisher_decay=1.1"),
                ({"momentum": -1.0}, "momentum=-1.0"),
                ({"power": 2.0}, "power=2.0"), ({"source": "hessian"}, "source='hessian'"),
                ({"foreach": True, "differentiable": True}, "differentiable")],
    ),
    Case(
        DIAGONAL, "QIGDiagonalNG", [*COMMON, {"fisher_decay": 0.9}, {"momentum": 0.5}],
        flags=("foreach", "differentiable"),
        errors=[({"fisher_decay": 1.1}, "fisher_decay=1.1"), ({"weight_decay": -1.0}, "weight_decay=-1.0")],
    ),
    Case(
        "constellation.optim.simple", "SimpleFisherOptimizer", [*COMMON, {"damping": 0.1}],
        flags=("foreach", "differentiable"), errors=[({"damping": -1.0}, "damping=-1.0")],
    ),
    *(
        Case(
            "constellation.optim.kronecker", "KroneckerNG", [*COMMON, {"momentum": 0.8}, *more],
            fixed={"variant": variant}, id=f"KroneckerNG-{variant}",
            errors=[({"variant": "kfac"}, "variant='kfac'"), ({"adjust_lr_fn": "any"}, "adjust_lr_fn='any'"),
                    ({"refresh": 0}, "refresh=0"), ({"momentum": 1.5}, "momentum=1.5")],
        )
        for variant, more in {
            "muon": [{"ns_steps": 6}, {"ns_coefficients": (3.4, -4.7, 2.0)}, {"batched": False}, {"nesterov": False}],
            "soap": [{"refresh": 2}, {"max_dim": 6}, {"products": "bfloat16"}],
            "kl_shampoo": [{"refresh": 2}, {"max_dim": 6}, {"factor_decay": 0.9}],
            "soap_muon": [{"refresh": 2, "refresh_above": 0.1}],
        }.items()
    ),
]  # fmt: skip
GROUPED: list[dict[str, Any]] = [{}, {"lr": 0.01}, {"weight_decay": 0.1}, {"maximize": True}]
CASES += [
    Case(
        "constellation.optim.scaled", "CurvatureScaledSGD",
        [*COMMON, {"momentum": 0.9}, {"exponent": 1.0, "damping": 1e-2}], groups=lambda params, kwargs: params,
        errors=[({"source": "hessian"}, "source='hessian'"), ({"momentum": -1.0}, "momentum=-1.0")],
    ),
    Case(
        "constellation.optim.basin", "BasinNaturalGrad",
        [*COMMON, {"momentum": 0.5}, {"solver": "cg"}, {"solver": "dense"}, {"kind": "sampled", "seed": 3}],
        fixed={"likelihood": "gaussian", "damping": 0.1}, sees=True,
        errors=[({"damping": -1.0}, "damping=-1.0"), ({"kind": "guess"}, "guess"), ({"nonsense": 1}, "nonsense")],
    ),
    *(
        Case(
            "constellation.optim.adaptive", "AdaptiveMixedQIG",
            [{}, {"lr_ng": 1e-3}, {"rest_optimizer": "diagonal_ng"}, {"weight_decay": 0.1}],
            groups=named, grouped=False, plain=False, sees=exact, id=f"AdaptiveMixedQIG-{'exact' if exact else 'diag'}",
            fixed={"use_exact_ng": exact, "adaptive_config": AdaptiveConfig(max_overhead=0.0, force_ng_every_n_steps=2),
                   **({"cg_damping": 0.1, "basin_options": {"likelihood": "gaussian"}} if exact else {})},
            errors=[({"rest_optimizer": "any"}, "rest_optimizer='any'")],
        )
        for exact in (False, True)
    ),
    *(
        Case(
            "constellation.optim.mixed", "HybridGeometricOptimizer", GROUPED, groups=hybrid(method),
            inner=("lr", "weight_decay", "maximize", *more), fixed=more, sees=method == "exact", plain=False,
            id=f"HybridGeometricOptimizer-{method}", errors=[({"rest_optimizer": "any"}, "rest_optimizer='any'")],
        )
        for method, more in {
            "diag": {}, "kron": {}, "adamw": {}, "exact": {"likelihood": "gaussian", "damping": 0.1},
        }.items()
    ),
]  # fmt: skip
TORCHS = [
    Case("torch.optim", name, [o.kwargs for o in info.optim_inputs_func(device="cpu")],
         flags=tuple(f for f in info.supported_impls if f != "fused"), id=f"torch-{name}")
    for info in optim_db if (name := info.optim_cls.__name__) in ("Adam", "RMSprop", "SGD")
]  # fmt: skip


def cases(keep: Callable[[Case], bool] = lambda case: True, torchs: bool = True) -> Any:
    """All optimizers to which a test applies."""
    chosen = [case for case in [*CASES, *(TORCHS if torchs else [])] if keep(case)]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.id or case.name)


def fitted(case: Case, weight: Tensor, bias: Tensor, x: Tensor, optimizer: Any) -> Callable[[], Any]:
    """A closure of torch's problem |W x + b|^2."""

    def closure() -> Any:
        optimizer.zero_grad()
        out = weight.mv(x) + bias
        loss = out.pow(2).sum()
        loss.backward(retain_graph=case.sees)
        return (loss, out[None]) if case.sees else loss

    return closure


def loss_of(value: Any) -> float:
    return float((value[0] if isinstance(value, tuple) else value).detach())


def advance(case: Case, optimizer: Any, params: Sequence[Tensor], closure: Callable[[], Any] | None = None) -> Any:
    """A step on gradients that are there already."""
    if not case.sees:
        return optimizer.step(closure)
    with torch.enable_grad():
        logits = torch.stack([sum((p * (i + 1)).sum() for p in params) for i in range(3)])[None]
    return optimizer.step(closure, logits=logits)


def pair(rows: int = 10, columns: int = 5, contiguous: bool = True) -> tuple[Parameter, Parameter, Tensor]:
    torch.manual_seed(0)
    if contiguous:
        return Parameter(torch.randn(rows, columns)), Parameter(torch.randn(rows)), torch.randn(columns)
    weight, bias = torch.randn(rows, columns, 2)[..., 0], torch.randn(rows, 2)[..., 0]
    return Parameter(weight), Parameter(bias), torch.randn(columns)


def went_right(config: dict[str, Any], before: float, after: float) -> None:
    assert after > before if config.get("maximize") else after < before


@cases()
@pytest.mark.parametrize("contiguous", [True, False])
def test_forloop_goes_right_direction(case: Case, contiguous: bool) -> None:
    for config in case.inputs(skip=("differentiable",)):
        weight, bias, x = pair(contiguous=contiguous)
        optimizer = case.make([weight, bias], **config)
        closure = fitted(case, weight, bias, x, optimizer)
        before = loss_of(closure())
        for _ in range(20):
            optimizer.step(closure)
        went_right(config, before, loss_of(closure()))


SCHEDULES: list[list[Callable[[Any], Any]]] = [
    [lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10), lr_scheduler.ReduceLROnPlateau],
    [lambda o: lr_scheduler.LinearLR(o, start_factor=0.4, end_factor=0.8, total_iters=4)],
    [lambda o: lr_scheduler.ExponentialLR(o, gamma=0.99), lambda o: lr_scheduler.CosineAnnealingLR(o, 20)],
    [lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=40, cycle_momentum=False)],
]


@cases(lambda case: case.grouped)
@pytest.mark.parametrize("schedules", SCHEDULES, ids=["step, plateau", "linear", "exponential, cosine", "one cycle"])
def test_param_group_with_lrscheduler_goes_right_direction(case: Case, schedules: list[Any]) -> None:
    for config in case.inputs(skip=("differentiable",)):
        weight, bias, x = pair()
        rest = {k: v for k, v in config.items() if k != "lr"}
        optimizer = case.make([{"params": [weight]}, {"params": [bias], "lr": 0.01}], **{**rest, "lr": 1e-3})
        made = [schedule(optimizer) for schedule in schedules]
        closure = fitted(case, weight, bias, x, optimizer)
        before = loss_of(closure())
        for _ in range(20):
            loss = optimizer.step(closure)
            for schedule in made:
                schedule.step(loss) if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else schedule.step()
        went_right(config, before, loss_of(closure()))


@cases(lambda case: case.grouped)
def test_param_groups_lr(case: Case) -> None:
    for config in case.inputs(skip=("differentiable",)):
        weight, bias, x = pair()
        still = Parameter(torch.randn(2))
        kept = still.detach().clone()
        group = {k: v for k, v in config.items() if k not in ("variant",)}
        group["lr"] = config.get("lr", 1e-3)
        optimizer = case.make([{"params": [weight, bias], **group}, {"params": [still]}], **{**case.fixed, "lr": 1e-28})
        closure = fitted(case, weight, bias, x, optimizer)
        before = loss_of(closure())
        for _ in range(20):
            still.grad = torch.rand_like(still)
            closure()
            still.grad = torch.rand_like(still)
            (optimizer.step(closure) if case.sees else optimizer.step())
        went_right(config, before, loss_of(closure()))
        assert torch.equal(still, kept)


@cases(lambda case: case.grouped)
def test_param_groups_weight_decay(case: Case) -> None:
    for config in case.inputs(skip=("differentiable",)):
        weight, bias, x = pair()
        optimizer = case.make([{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}], **config)
        closure = fitted(case, weight, bias, x, optimizer)
        before = loss_of(closure())
        for _ in range(20):
            optimizer.step(closure)
        went_right(config, before, loss_of(closure()))


@cases(lambda case: case.grouped and not case.id.startswith("torch-SGD"))
@pytest.mark.parametrize("dimensions", [0, 1])
def test_tensor_lr(case: Case, dimensions: int) -> None:
    for config in case.inputs(skip=("differentiable", "foreach")):
        rest = {k: v for k, v in config.items() if k != "lr"}
        ends = []
        for lr in (1e-3, torch.tensor([1e-3] if dimensions else 1e-3, dtype=torch.float64)):
            weight, bias, x = pair()
            optimizer = case.make([weight, bias], **{**rest, "lr": lr})
            for _ in range(5):
                optimizer.step(fitted(case, weight, bias, x, optimizer))
            ends.append((weight.detach(), bias.detach()))
            if isinstance(lr, Tensor):
                assert float(lr) == 1e-3  # nobody wrote to it
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b)


@cases(lambda case: "foreach" in case.flags)
def test_foreach_matches_forloop(case: Case) -> None:
    x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=torch.float64).view(3, 2)
    for config in case.configs:
        ends = []
        for foreach in (False, True):
            torch.manual_seed(1)
            model = torch.nn.Sequential(
                torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
            ).double()
            empty = torch.empty((), dtype=torch.float64, requires_grad=True)
            empty.grad = torch.rand_like(empty)
            none = torch.empty((0, 3), dtype=torch.float64, requires_grad=True)
            none.grad = torch.empty_like(none)
            optimizer = case.make([*model.parameters(), empty, none], **{**copy.deepcopy(config), "foreach": foreach})
            for i in range(7):
                optimizer.zero_grad()
                if i != 3:  # a step without gradients changes nothing
                    model(x).sum().backward()
                optimizer.step()
            ends.append((list(model.parameters()), [optimizer.state[p] for p in model.parameters()]))
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b)


@cases(torchs=False)
def test_complex_parameters_are_refused_in_one_line(case: Case) -> None:
    from constellation.errors import ConfigError

    params = [Parameter(torch.randn(4, 3, dtype=torch.complex64)), Parameter(torch.randn(3, dtype=torch.complex64))]
    for p in params:
        with pytest.raises(ConfigError, match=r"complex64.*view_as_real") as caught:
            case.make([p])
        assert "\n" not in str(caught.value)


@cases(lambda case: case.grouped)
def test_step_is_noop_when_params_have_no_grad(case: Case) -> None:
    params = [torch.randn(2, 3) for _ in range(2)]
    kept = [p.clone() for p in params]
    for config in case.inputs():
        optimizer = case.make(params, **config)
        advance(case, optimizer, params, lambda: torch.tensor([1.0]))
        assert all(map(torch.equal, kept, params))


@cases()
def test_step_is_noop_for_zero_grads(case: Case) -> None:
    param = torch.randn(5, 1, requires_grad=True)
    kept = param.detach().clone()
    for config in case.inputs():
        if config.get("weight_decay"):
            continue  # decays regardless
        params = [param.clone() if config.get("differentiable") else param]
        optimizer = case.make(params, **config)
        params[0].grad = torch.zeros_like(params[0])
        advance(case, optimizer, params, lambda: torch.tensor([1.0]))
        assert torch.equal(kept, params[0].detach())


@cases()
def test_grads_are_never_inplaced_into(case: Case) -> None:
    for config in case.inputs(skip=("differentiable",)):
        params = [Parameter(torch.randn(2, 3)), Parameter(torch.randn(3))]
        optimizer = case.make(params, **config)
        for p in params:
            p.grad = torch.rand_like(p)
        versions = [p.grad._version for p in params if p.grad is not None]
        for _ in range(3):
            advance(case, optimizer, params)
        assert versions == [p.grad._version for p in params if p.grad is not None]


@cases()
def test_optimizer_can_be_printed(case: Case) -> None:
    for config in case.inputs():
        assert case.name in repr(case.make([Parameter(torch.randn(2, 3)) for _ in range(2)], **config))


@cases()
@pytest.mark.parametrize("named", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_state_dict_deterministic(case: Case, named: tuple[bool, bool]) -> None:
    for config in case.inputs(skip=("differentiable",)):
        weight, bias, x = pair(2, 3)

        def listed(w: Tensor, b: Tensor, names: bool) -> list[Any]:
            return [("weight", w), ("bias", b)] if names else [w, b]

        one = case.make(listed(weight, bias, named[0]), **copy.deepcopy(config))
        first = fitted(case, weight, bias, x, one)
        for _ in range(7):
            one.step(first)
        again_w, again_b = Parameter(weight.detach().clone()), Parameter(bias.detach().clone())
        two = case.make(listed(again_w, again_b, named[1]), **copy.deepcopy(config))
        second = fitted(case, again_w, again_b, x, two)
        two.load_state_dict(copy.deepcopy(one.state_dict()))
        for _ in range(7):
            one.step(first)
            two.step(second)
            assert torch.equal(weight, again_w) and torch.equal(bias, again_b)
        torch.testing.assert_close(one.state_dict()["state"], two.state_dict()["state"], rtol=0, atol=0)
        two.param_groups.extend(two.param_groups)
        names = {"params", "param_names"}
        last = [{k: v for k, v in o.state_dict()["param_groups"][-1].items() if k not in names} for o in (one, two)]
        assert last[0] == last[1]


@cases()
def test_can_load_older_state_dict(case: Case) -> None:
    flags = ["maximize", "foreach", "fused", "differentiable", "capturable", "check_finite"]
    for config in case.inputs(skip=("differentiable",)):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2))
        x, params = torch.rand(1, 4, 16, 16), list(model.parameters())
        optimizer = case.make(params, **config)

        def step(optimizer: Any = optimizer, model: Any = model, x: Tensor = x, params: Any = params) -> None:
            optimizer.zero_grad()
            model(x).sum().backward()
            advance(case, optimizer, params)

        for _ in range(3):
            step()
        old = copy.deepcopy(optimizer.state_dict())
        for group in old["param_groups"]:
            for flag in flags:
                group.pop(flag, None)
        twin = copy.deepcopy(model)
        optimizer.load_state_dict(old)
        left = (
            {k: v for k, v in config.items() if k not in flags}
            if case.module.startswith("torch") or "Hybrid" in case.name
            else config
        )
        plain = case.make(list(twin.parameters()), **left)
        now = plain.state_dict()["param_groups"]
        state = {"state": copy.deepcopy(old["state"])}  # else the two would share it
        plain.load_state_dict(state | {"param_groups": [{**a, **b} for a, b in zip(now, old["param_groups"])]})
        step()
        step(plain, twin, x, list(twin.parameters()))
        for mine, theirs in zip(
            params, twin.parameters()
        ):  # what is missing is the class's default, to ours what it was made with
            torch.testing.assert_close(mine, theirs)


@cases()
def test_save_load_equality_with_weights_only(case: Case) -> None:
    for config in case.inputs(skip=("differentiable",)):
        weight, bias, x = pair(2, 3)
        optimizer = case.make([weight, bias], **config)
        for _ in range(3):
            optimizer.step(fitted(case, weight, bias, x, optimizer))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        torch.testing.assert_close(loaded["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
        assert str(loaded["param_groups"]) == str(optimizer.state_dict()["param_groups"])


@cases()
def test_load_nontensor_step(case: Case) -> None:
    for config in case.inputs(skip=("differentiable",)):
        params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
        for p in params:
            p.grad = torch.rand_like(p)
        optimizer = case.make(params, **config)
        for _ in range(3):
            advance(case, optimizer, params)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].item()
        twins = copy.deepcopy(params)
        for twin, p in zip(twins, params):
            twin.grad = p.grad.clone()
        twin_optimizer = case.make(twins, **config)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.load_state_dict(saved)
        advance(case, optimizer, params)
        advance(case, twin_optimizer, twins)
        assert all(torch.equal(twin, p) for twin, p in zip(twins, params))


@cases()
def test_deepcopy_copies_all_public_attrs(case: Case) -> None:
    for config in case.inputs(skip=("differentiable",)):
        params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
        for p in params:
            p.grad = torch.rand_like(p)
        optimizer = case.make(params, **config)
        for _ in range(3):
            advance(case, optimizer, params)
        public = [{k for k in o.__dict__ if not k.startswith("_")} for o in (optimizer, copy.deepcopy(optimizer))]
        assert public[0] == public[1]


@cases()
def test_non_empty_state(case: Case) -> None:
    """State of a parameter is a dictionary of tensors and numbers, `step` a tensor."""
    for config in case.inputs(skip=("differentiable",)):
        weight, bias, x = pair(3, 2)
        optimizer = case.make([weight, bias], **config)
        for _ in range(2):
            optimizer.step(fitted(case, weight, bias, x, optimizer))
        for p, state in optimizer.state.items():
            assert isinstance(p, Tensor)
            assert all(v is None or isinstance(v, (Tensor, int, float, str)) for v in state.values())
            assert "step" not in state or isinstance(state["step"], Tensor)


@cases()
def test_step_all_hooks(case: Case) -> None:
    """Hooks run before and after each step, in their order, and can be removed."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    for config in case.inputs(skip=("differentiable",)):
        weight, bias, x = pair(2, 3)
        optimizer = case.make([weight, bias], **config)
        seen: list[str] = []

        def note(word: str, optimizer: Any, args: Any, kwargs: Any, seen: list[str] = seen) -> None:
            seen.append(word)

        handles = [
            register_optimizer_step_pre_hook(functools.partial(note, "all pre")),
            optimizer.register_step_pre_hook(functools.partial(note, "pre")),
            optimizer.register_step_post_hook(functools.partial(note, "post")),
            register_optimizer_step_post_hook(functools.partial(note, "all post")),
        ]
        optimizer.step(fitted(case, weight, bias, x, optimizer))
        assert sorted(seen) == sorted(["all pre", "pre", "post", "all post"])
        assert max(map(seen.index, ("all pre", "pre"))) < min(map(seen.index, ("all post", "post")))
        for handle in handles:
            handle.remove()
        optimizer.step(fitted(case, weight, bias, x, optimizer))
        assert len(seen) == 4


@cases()
def test_state_dict_hooks(case: Case) -> None:
    for config in case.inputs(skip=("differentiable",)):
        optimizer = case.make([Parameter(torch.randn(2, 3))], **config)
        seen: list[str] = []
        optimizer.register_state_dict_pre_hook(lambda o, seen=seen: seen.append("pre"))
        optimizer.register_state_dict_post_hook(lambda o, s, seen=seen: seen.append("post"))
        optimizer.register_load_state_dict_pre_hook(lambda o, s, seen=seen: seen.append("load pre"))
        optimizer.register_load_state_dict_post_hook(lambda o, seen=seen: seen.append("load post"))
        optimizer.load_state_dict(optimizer.state_dict())
        assert seen == ["pre", "post", "load pre", "load post"]


@cases(lambda case: case.plain)
def test_errors(case: Case) -> None:
    for error in get_error_inputs_for_all_optims("cpu", torch.float32):
        given = error.optimizer_error_input
        params = [Parameter(torch.randn(1, 1))] if given.params is None else given.params
        kwargs = {**case.fixed, **given.kwargs}
        assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        if issubclass(error.error_type, Warning):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                case.cls(params, **kwargs)
            assert any(re.search(error.error_regex, str(w.message)) for w in caught), given.desc
        else:
            with pytest.raises(error.error_type, match=error.error_regex):
                case.cls(params, **kwargs)


@cases(torchs=False)
def test_own_errors(case: Case) -> None:
    from constellation.errors import ConfigError

    for kwargs, words in case.errors:
        with pytest.raises(ConfigError, match=re.escape(words)):
            case.make([Parameter(torch.randn(2, 2))], **{**case.fixed, **kwargs})


@cases(torchs=False)
def test_sparse_gradients_are_refused(case: Case) -> None:
    from constellation.errors import ConfigError

    param = Parameter(torch.randn(3, 2))
    optimizer = case.make([param], **case.fixed)
    param.grad = torch.eye(3, 2).to_sparse()
    kept = param.detach().clone()
    with pytest.raises(ConfigError, match="sparse"):
        advance(case, optimizer, [param])
    assert torch.equal(param, kept)


@cases(torchs=False)
def test_grad_scaling_autocast_fused_optimizers(case: Case) -> None:
    """Scaled training is plain training, and an overflow is a step that does not happen."""
    for config in case.inputs(skip=("differentiable",)):
        ends = []
        for enabled in (False, True):
            weight, bias, x = pair(4, 3)
            optimizer = case.make([weight, bias], **copy.deepcopy(config))
            scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=3, enabled=enabled)
            for i in range(6):
                optimizer.zero_grad()
                out = weight.mv(x) + bias
                loss = out.pow(2).sum()
                scaler.scale(loss).backward(retain_graph=case.sees)
                if i == 2:  # clipping needs the gradients unscaled before the step
                    scaler.unscale_(optimizer)
                if i == 4:
                    kept = [weight.detach().clone(), bias.detach().clone()]
                    held = copy.deepcopy(optimizer.state_dict()["state"])
                    weight.grad[0, 0] = float("inf")  # type: ignore[index]
                scaler.step(optimizer, **({"logits": out[None]} if case.sees else {}))
                if i == 4:  # whether the scaler found it or the optimizer
                    assert torch.equal(weight, kept[0]) and torch.equal(bias, kept[1])
                    torch.testing.assert_close(optimizer.state_dict()["state"], held, rtol=0, atol=0)
                scaler.update()
            ends.append([weight.detach(), bias.detach()])
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


@cases(lambda case: "differentiable" in case.flags, torchs=False)
def test_differentiable(case: Case) -> None:
    """The derivative of a step in its gradient, against finite differences."""
    torch.manual_seed(0)
    start, grad = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
    for config in case.configs:

        def after(p: Tensor, g: Tensor, config: Any = config) -> Tensor:
            p = p.clone()
            p.grad = g
            optimizer = case.make([p], **{**copy.deepcopy(config), "differentiable": True})
            optimizer.step()
            return p

        assert torch.autograd.gradcheck(after, (start.requires_grad_(), grad.requires_grad_()))


@cases(lambda case: case.grouped, torchs=False)
def test_add_param_group_between_steps(case: Case) -> None:
    for config in case.inputs(skip=("differentiable",)):
        weight, bias, x = pair(4, 3)
        optimizer = case.make([weight], **config)
        advance_bias = fitted(case, weight, bias, x, optimizer)
        optimizer.step(advance_bias)
        kept = bias.detach().clone()
        optimizer.add_param_group({"params": [bias]})
        optimizer.step(advance_bias)
        optimizer.step(advance_bias)
        assert not torch.equal(bias, kept)
