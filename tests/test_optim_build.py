"""Every optimizer by its name in a config: it trains a kernel, is stopped anywhere and goes on with the same bits."""

import copy
import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from msgspec import Meta
from numpy.typing import NDArray

import constellation.optim
from constellation.config import Config, from_json, override
from constellation.errors import ConfigError
from constellation.kernel.model import KernelLM
from constellation.optim import build, curvature, kronecker, mixed, registry
from constellation.optim.natural import may_inherit, wants
from constellation.optim.registry import OPTIMIZERS, Row, Settings
from constellation.presets import tiny
from constellation.settings import Part, says, settings_of
from constellation.train import checkpoint
from constellation.train.job import Job
from constellation.train.loop import fit
from constellation.train.state import TOLD

STEPS, STOP = 8, 5  # checkpoints at 3 and 6
MICRO = {
    "kernel.vocab_size": 272, "kernel.width": 16, "kernel.hidden": 24, "kernel.layers": 1, "kernel.context": 16,
    "train.checkpoint_every": 3, "train.precision": "fp32", "train.sample_bytes": 0, "train.clip": 1.0,
}  # fmt: skip
OPEN = {"optim.gate.force_ng_every_n_steps": 2, "optim.gate.max_overhead": 0.0, "optim.gate.kappa_every": 1}
CASES: dict[str, dict[str, object]] = {
    **{name: {"optim.name": name} for name in OPTIMIZERS},
    **{f"kronecker {v}": {"optim.variant": v} for v in ("muon", "soap", "kl_shampoo", "soap_muon")},
    **{
        f"curvature {c}": {"optim.name": "curvature_sgd", "optim.curvature": c, "optim.refresh": 2}
        for c in ("ema_grad2", "hutchinson_hessian", "empirical_fisher", "gauss_newton")
    },
    **{
        f"mixed {rest} exact={exact}": {
            "optim.name": "mixed_qig", "optim.rest_optimizer": rest, "optim.use_exact_ng": exact,
        }
        for rest in ("adamw", "diagonal_ng", "kron") for exact in (False, True)
    },
    "adaptive exact": {"optim.name": "adaptive_mixed_qig", "optim.use_exact_ng": True, **OPEN},
    "adaptive diagonal": {"optim.name": "adaptive_mixed_qig", "optim.rest_optimizer": "kron", **OPEN},
    "basin of attention alone": {"optim.name": "mixed_qig", "optim.basin": "*attention*", "optim.use_exact_ng": True},
}  # fmt: skip


class Text:
    """Each token is followed by the fifth after it; batches are a function of the step."""

    def at(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        start = np.random.default_rng(step).integers(0, 272, (8, 1))
        tokens = (start + np.arange(17) * 5) % 272
        return tokens[:, :-1], tokens[:, 1:]


def config(case: str) -> Config:
    return override(tiny(), {**MICRO, **CASES[case]})


def job(folder: Path, config: Config, steps: int = STEPS, role: str = "ocean", branch: Path | None = None) -> Job:
    return Job(role, folder, config, steps, train=Path("unread"), branch=branch)


def weights(folder: Path) -> bytes:
    found = checkpoint.newest(folder)
    assert found is not None and found.step == STEPS
    return (found.path / "model.safetensors").read_bytes() + (found.path / "optim.safetensors").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_every_optimizer_trains_and_resumes_bit_for_bit_through_fit(case: str, tmp_path: Path) -> None:
    alone, stopped = (job(tmp_path / name, config(case)) for name in ("alone", "stopped"))
    losses = [step.loss_nats for step in fit(alone, Text())]
    assert min(losses[1:]) < losses[0]
    run = fit(stopped, Text())
    for step in run:
        if step.step == STOP:
            break
    run.close()  # type: ignore[attr-defined]
    resumed = [step.loss_nats for step in fit(stopped, Text())]
    assert resumed == losses[3:]
    assert weights(alone.folder) == weights(stopped.folder)
    states = [checkpoint.newest(j.folder) for j in (alone, stopped)]
    groups = [s.state["optimizer"]["groups"] for s in states if s is not None]
    if "adaptive" in case:
        gates = [g[0].pop("gate") for g in groups]
        assert gates[0]["natural_steps"] == gates[1]["natural_steps"] >= 1
        assert gates[0]["curvatures"] == gates[1]["curvatures"]
        said = json.loads((alone.folder / "summary.json").read_text())["optimizer"]
        assert said["ng_applications"] == gates[0]["natural_steps"] and said["natural_seconds"] > 0
    assert groups[0] == groups[1]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("basin_ng", "adamw")])
def test_a_state_of_the_first_release_goes_on_with_the_same_bits(name: str) -> None:
    """Its options were called alpha and eps, those of torch's AdamW still are."""
    settings = override(tiny(), {**MICRO, "optim.name": name, "optim.fisher_decay": 0.8, "optim.damping": 1e-3}
                        if "fisher_decay" in OPTIMIZERS[name].names else {**MICRO, "optim.name": name})  # fmt: skip

    def step(optimizer: Any, model: KernelLM, i: int) -> None:
        x, y = (torch.from_numpy(a) for a in Text().at(i))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()

    def made() -> tuple[KernelLM, Any]:
        model = KernelLM(settings.kernel, seed=1)
        return model, build(settings.optim, model)

    model, optimizer = made()
    step(optimizer, model, 0)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for new, before in (("fisher_decay", "alpha"), ("damping", "eps")):
            if new in group and "betas" not in group:
                group[before] = group.pop(new)
    other, its = made()
    for group in its.param_groups:
        group |= {name: 0.5 for name in ("fisher_decay", "damping") if name in group}  # the saved ones hold
    other.load_state_dict(model.state_dict())
    its.load_state_dict(old)
    assert its.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for chosen, weights in ((optimizer, model), (its, other)):
        step(chosen, weights, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_optimizer_trains_and_is_reloaded_on_a_gpu(case: str, precision: torch.dtype) -> None:
    settings = config(case)
    model = KernelLM(settings.kernel).cuda().to(precision)
    losses: list[float] = []
    saved: dict[str, Any] = {}
    for sitting in range(2):
        optimizer: Any = build(settings.optim, model)
        if sitting:
            optimizer.load_state_dict(saved)
        for step in range(4 * sitting, 4 * sitting + 4):
            x, y = (torch.from_numpy(a).cuda() for a in Text().at(step))
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())
            loss.backward()
            losses.append(float(loss.detach()))
            if "logits" in getattr(optimizer, "wants", ()):
                optimizer.step(logits=lambda x=x: model(x[:2]).flatten(0, 1), targets=y[:2].flatten())
            else:
                optimizer.step()
        saved = optimizer.state_dict()
    assert min(losses[1:]) < losses[0] and all(np.isfinite(losses))


@pytest.mark.parametrize("case", CASES)
def test_asking_for_statistics_changes_nothing_and_gives_plain_numbers(case: str) -> None:
    optimizer: Any = build(config(case).optim, KernelLM(config(case).kernel))
    if not isinstance(optimizer, torch.optim.AdamW):
        assert all(type(value) is float for value in optimizer.get_stats().values())
    assert not optimizer.state


def test_an_optimizer_that_has_no_row_is_refused_with_those_that_have() -> None:
    with pytest.raises(ConfigError, match=r"optim\.name='lion': choose one of kronecker_ng"):
        build(Settings(name="lion"), KernelLM(tiny().kernel))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_is_called_as_its_settings_and_says_what_it_is(name: str) -> None:
    row = OPTIMIZERS[name]
    assert row.settings.name == name and row.words
    assert all(setting.meaning for own, setting, _ in registry.leaves(row.settings)), "a setting without a meaning"


@pytest.mark.parametrize(
    ("name", "setting", "known"),
    [
        ("kronecker_ng", "variant", kronecker.VARIANTS), ("kronecker_ng", "ns_precision", kronecker.PRECISIONS),
        ("mixed_qig", "rest_optimizer", mixed.REST), ("curvature_sgd", "curvature", curvature.UNITS),
    ],
)  # fmt: skip
def test_a_setting_has_the_choices_that_its_optimizer_knows(name: str, setting: str, known: Iterable[str]) -> None:
    assert set(settings_of(type(OPTIMIZERS[name].settings))[setting].kind.values) == set(known)


@dataclasses.dataclass(frozen=True)
class LionSettings(Settings):
    """Of the optimizer below."""

    name: str = "lion"
    momentum: Annotated[Part, says("EMA of gradients, diagonal steps")] = 0.5
    sharpness: Annotated[float, Meta(gt=0, le=10), says("of the sign")] = 3.0


class Lion(torch.optim.SGD):
    """A step that is nearly a sign, of the averaged gradient."""

    def __init__(self, params: Any, lr: float, momentum: float, sharpness: float):
        super().__init__(params, lr=lr, momentum=momentum)
        self.sharpness = sharpness

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = torch.tanh(self.sharpness * p.grad / p.grad.abs().mean())
        super().step(closure)


def build_lion(settings: LionSettings, model: torch.nn.Module) -> Lion:
    return Lion(model.parameters(), settings.lr, settings.momentum, settings.sharpness)


def test_a_new_optimizer_is_its_file_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "lion", Row(LionSettings(), f"{__name__}:build_lion", "nearly a sign"))
    preset = override(tiny(), {**MICRO, "optim.lr": 2e-3, "optim.momentum": 0.8})
    wanted = override(preset, {"optim.name": "lion", "optim.sharpness": "5", "memory.optim.sharpness": 7})
    assert wanted.optim == LionSettings(lr=2e-3, momentum=0.8, sharpness=5.0)  # lr and momentum are the preset's
    assert wanted.for_role("memory").optim == LionSettings(lr=2e-3, momentum=0.8, sharpness=7.0)
    assert from_json(json.loads(json.dumps(wanted.to_json()))) == wanted
    with pytest.raises(ConfigError, match=r"^optim\.sharpness=11\.0: must be a finite number above 0 and at most 10"):
        override(wanted, {"optim.sharpness": "11"})
    with pytest.raises(ConfigError, match=r"^optim\.power: lion has no such setting; diagonal_ng, .* have"):
        override(wanted, {"optim.power": 1.0})
    with pytest.raises(ConfigError, match=r"^optim\.sharpness: kronecker_ng has no such setting; lion has"):
        override(tiny(), {"optim.sharpness": 2.0})
    made = job(tmp_path, wanted)
    losses = [step.loss_nats for step in fit(made, Text())]
    assert losses[-1] < losses[0]
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.state["optimizer"]["groups"][0]["momentum"] == 0.8


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    model = KernelLM(tiny().kernel)
    groups = build(override(tiny(), {"optim.name": name}).optim, model).param_groups
    held = sorted(id(p) for g in groups for p in g["params"])
    assert held == sorted(id(p) for p in model.parameters())


def test_an_empty_basin_names_what_there_is() -> None:
    settings = override(tiny(), {"optim.name": "mixed_qig", "optim.basin": "*memory*"}).optim
    with pytest.raises(ConfigError, match=r"empty.*memory.*embedding\.weight"):
        build(settings, KernelLM(tiny().kernel))


def test_every_group_of_a_mixed_optimizer_follows_the_schedule_at_its_own_rate(tmp_path: Path) -> None:
    changes = {**MICRO, "optim.name": "mixed_qig", "optim.lr": 1e-3, "optim.lr_ng": 5e-3, "train.warmup": 0.5}
    assert [step.lr for step in fit(job(tmp_path, override(tiny(), changes)), Text())][:2] == [0.00025, 0.0005]
    held = checkpoint.newest(tmp_path)
    assert held is not None
    assert [g["lr"] for g in held.state["optimizer"]["groups"]] == pytest.approx([5e-3, 1e-3, 1e-3])


def test_a_role_with_another_optimizer_starts_with_an_empty_one_and_its_own_settings(tmp_path: Path) -> None:
    whole = override(tiny(), {
        **MICRO, "heart.optim.name": "adaptive_mixed_qig", "heart.optim.phase": "early", "memory.optim.momentum": 0.5,
    })  # fmt: skip
    list(fit(job(tmp_path / "ocean", whole, 3), Text()))
    ocean = checkpoint.newest(tmp_path / "ocean")
    assert ocean is not None
    for role, steps in (("heart", 2.0), ("memory", 5.0)):
        list(fit(job(tmp_path / role, whole.for_role(role), 2, role, ocean.path), Text()))
        held = checkpoint.newest(tmp_path / role)
        assert held is not None
        from safetensors.torch import load_file

        state = load_file(held.path / "optim.safetensors")
        assert {float(v) for k, v in state.items() if k.endswith(".step")} <= {steps, 1.0}
        if role == "memory":
            assert held.state["optimizer"]["groups"][0]["diagonal_momentum"] == 0.5


@pytest.mark.parametrize("case", CASES)
def test_what_a_step_wants_to_be_told_is_what_it_can_be_told(case: str) -> None:
    optimizer = build(config(case).optim, KernelLM(config(case).kernel))
    assert set(wants(optimizer, TOLD)) <= set(inspect.signature(optimizer.step).parameters)
    assert ("telemetry" in wants(optimizer, TOLD)) == ("adaptive" in case)


def test_a_step_that_wants_what_nobody_knows_is_refused() -> None:
    class Oracle(torch.optim.SGD):
        wants = ("logits", "future")

    with pytest.raises(ConfigError, match=r"Oracle: step wants 'future'; it can be told logits, targets, telemetry"):
        wants(Oracle([torch.zeros(1)]), TOLD)


@pytest.mark.parametrize(
    ("saved", "mine", "may"),
    [
        ({}, {"optim.kronecker_momentum": 0.5}, True),  # a setting
        ({}, {"optim.variant": "soap"}, False),  # another state
        ({}, {"optim.name": "diagonal_ng"}, False),  # other options
        ({"optim.name": "diagonal_ng"}, {"optim.name": "qig_diagonal_ng"}, True),
        ({"optim.name": "curvature_sgd"}, {"optim.name": "curvature_sgd", "optim.curvature": "gauss_newton"}, False),
        ({"optim.name": "mixed_qig"}, {"optim.name": "mixed_qig", "optim.rest_optimizer": "kron"}, False),
        ({"optim.name": "mixed_qig"}, {"optim.name": "mixed_qig", "optim.basin": "*attention*"}, False),  # other groups
        ({"optim.name": "adamw"}, {"optim.name": "adamw", "optim.lr": 1.0}, True),
        ({"optim.name": "adamw"}, {}, False),
    ],
)
def test_a_branch_inherits_state_that_means_the_same_to_it(
    saved: dict[str, object], mine: dict[str, object], may: bool
) -> None:
    model = KernelLM(tiny().kernel)
    theirs, own = (build(override(tiny(), changes).optim, model) for changes in (saved, mine))
    assert may_inherit(own, theirs.state_dict()["param_groups"]) is may


def test_the_public_names_are_optimizers_and_load_no_torch_before_they_are_used() -> None:
    for name in constellation.optim.__all__:
        thing = getattr(constellation.optim, name)
        if isinstance(thing, type) and name != "AdaptiveConfig":
            assert issubclass(thing, torch.optim.Optimizer)
    with pytest.raises(AttributeError, match="Lion"):
        constellation.optim.Lion  # noqa: B018
    code = "import sys, constellation.optim; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
