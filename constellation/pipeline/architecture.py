"""Six executable checks of a trained model: that it is what its documents say. No Ray here.

parameters   as many numbers as the formula counts (kernel/model.py), in the checkpoint too
causality    a changed token moves no bit of any logit before it
loops        a recursive kernel's held-out loss is worse with one loop left out of the order; plain: not applicable
geometry     d_FR of known distributions, and the triangle inequality on the model's own predictions
gradients    every parameter has one; no metric is a term of the loss
round trip   checkpoint and signature come back bit for bit; one batch can be overfitted
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from constellation.coordizer.tokenizer import Tokenizer
from constellation.geometry import simplex
from constellation.kernel.model import KernelLM, parameter_count
from constellation.pipeline.prepare import Plan, open_plan
from constellation.pipeline.signatures import probe_set, signature_of
from constellation.telemetry.monitor import Windows
from constellation.telemetry.signature import BINS, Signature
from constellation.train import checkpoint
from constellation.train.job import Job
from constellation.train.measuring import windows_of
from constellation.train.terms import objective_of

OVERFIT_STEPS, OVERFIT_RATE = 40, 3e-3


@dataclass(frozen=True)
class Check:
    """One check and what it found; `ok` None where it does not apply."""

    name: str
    ok: bool | None
    found: str


def check_architecture(run: Path, role: str = "ocean") -> list[Check]:
    """The six checks of one model of `run`, in order; an error within one is what it found."""
    plan = open_plan(run)
    model = checkpoint.load_model(plan.folder(role))
    windows = windows_of(plan.dev, plan.config.kernel.context, 4)
    checks: dict[str, Callable[[], tuple[bool | None, str]]] = {
        "parameters": lambda: _parameters(plan, model, role), "causality": lambda: _causality(model, windows),
        "loops": lambda: _loops(model, windows), "geometry": lambda: _geometry(model, windows),
        "gradients": lambda: _gradients(plan, model, windows), "round trip": lambda: _round_trip(plan, model, windows),
    }  # fmt: skip
    rows = []
    for name, check in checks.items():
        try:
            rows.append(Check(name, *check()))
        except Exception as error:  # whatever is wrong with the model is what was asked for
            rows.append(Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
    return rows


def _parameters(plan: Plan, model: KernelLM, role: str) -> tuple[bool, str]:
    counted, said = model.num_parameters(), parameter_count(model.config)
    found = checkpoint.newest(plan.folder(role))
    assert found is not None
    from safetensors import safe_open

    with safe_open(found.path / "model.safetensors", "pt") as file:
        saved = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    return counted == said == saved, f"{counted:,} in the model, {said:,} by the formula, {saved:,} saved"


@torch.no_grad()
def _causality(model: KernelLM, windows: Windows) -> tuple[bool, str]:
    x = windows.inputs_ST[:1]
    places = [1, x.shape[1] // 2, x.shape[1] - 1]
    before = model(x)
    for at in places:
        other = x.clone()
        other[0, at] = (other[0, at] + 1) % model.config.vocab_size
        after = model(other)
        if not torch.equal(before[:, :at], after[:, :at]):
            return False, f"a change of token {at} moves logits before it"
        if torch.equal(before[:, at:], after[:, at:]):
            return False, f"a change of token {at} moves nothing at all"
    return True, f"changes at {places} move no bit before them, and something after"


@torch.no_grad()
def _loops(model: KernelLM, windows: Windows) -> tuple[bool | None, str]:
    config = model.config
    if config.loops == 1:
        return None, "not applicable: kernel.loops=1, a plain decoder"
    whole = _nats(model, windows)
    fewer = copy.deepcopy(model)
    fewer.config = _Shorter(config)  # type: ignore[assignment]
    less = _nats(fewer, windows)
    return less > whole, f"{whole:.4f} nats/token with {config.loops} loops, {less:.4f} with {config.loops - 1}"


class _Shorter:
    """A configuration whose order lacks one loop, which no setting may ask for."""

    def __init__(self, config: Any):
        self._config = config
        first, last = config.prelude, config.layers - config.coda
        tied = tuple(range(first, last)) * (config.loops - 1)
        self.order = (*range(first), *tied, *range(last, config.layers))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _nats(model: KernelLM, windows: Windows) -> float:
    logits = model(windows.inputs_ST).flatten(0, 1).float()
    return float(F.cross_entropy(logits, windows.targets_ST.flatten()))


@torch.no_grad()
def _geometry(model: KernelLM, windows: Windows) -> tuple[bool, str]:
    known = float(simplex.distance(torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])))
    p = model(windows.inputs_ST[:1])[0].double().softmax(-1)
    a, b, c = p, p.roll(1, 0), p.roll(2, 0)
    slack = float((simplex.distance(a, b) + simplex.distance(b, c) - simplex.distance(a, c)).min())
    ok = abs(known - 0.927295) < 1e-5 and slack > -1e-9
    return (
        ok,
        f"d_FR(Bernoulli .5, .9) = {known:.6f} rad; triangle inequality on {len(p)} predictions, slack {slack:.2g}",
    )


def _gradients(plan: Plan, model: KernelLM, windows: Windows) -> tuple[bool, str]:
    job = Job("ocean", plan.run, plan.config, 1, plan.train, plan.dev, plan.tokenizer)
    objective = objective_of(job, None)
    own = copy.deepcopy(model).train()
    losses = objective(own, windows.inputs_ST, windows.targets_ST, plan.config.train.loss_chunk)
    objective.total(losses).backward()
    idle = [name for name, p in own.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    terms = ", ".join(name for name, weight in objective.weights.items() if weight)
    if idle:
        return False, f"without gradient: {', '.join(idle[:4])}"
    count = len(list(own.parameters()))
    return True, f"all {count} parameters have a gradient; the loss is {terms}, and no metric is a term of it"


def _round_trip(plan: Plan, model: KernelLM, windows: Windows) -> tuple[bool, str]:
    own = KernelLM(model.config, seed=None)
    own.load_state_dict(copy.deepcopy(model.state_dict()))
    optimizer = torch.optim.AdamW(own.parameters(), lr=OVERFIT_RATE, weight_decay=0.0)
    with tempfile.TemporaryDirectory() as scratch:
        path = checkpoint.save(
            Path(scratch), 1, own, optimizer, {}, tokens=0, dev_bits_per_byte=None, keep_last=1, keep_best=0
        )
        again = KernelLM(model.config, seed=None)
        checkpoint.open_checkpoint(path).restore(again)
    if not all(torch.equal(a, b) for a, b in zip(own.parameters(), again.parameters(), strict=True)):
        return False, "the checkpoint gives back other weights"
    tokens = Tokenizer.load(plan.tokenizer).token_bytes
    first_V = torch.tensor([(b[0] // (256 // BINS)) if b else 0 for b in tokens])
    data = signature_of(model, probe_set(plan), first_V, plan.config.train.seed).to_bytes()
    if Signature.from_bytes(data).to_bytes() != data or not 1024 <= len(data) <= 4096:
        return False, f"the signature of {len(data)} bytes does not come back as it was"
    one = replace(windows, inputs_ST=windows.inputs_ST[:1], targets_ST=windows.targets_ST[:1])
    first = last = 0.0
    for step in range(OVERFIT_STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(own(one.inputs_ST)[0].float(), one.targets_ST[0])
        loss.backward()
        optimizer.step()
        first, last = (float(loss.detach()) if not step else first), float(loss.detach())
    found = f"weights and a signature of {len(data)} bytes come back; one batch {first:.3f} -> {last:.3f} nats/token"
    return last < 0.7 * first, f"{found} in {OVERFIT_STEPS} steps"
