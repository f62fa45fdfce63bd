"""What a run folder says about its constellation; no Ray and no torch here.

A driver at work leaves its newest view in RUN/status.json every second; everything else is read
from the folders of the models.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from constellation.errors import ArtifactError, ConfigError
from constellation.pipeline import cost
from constellation.pipeline.request import Plan, open_plan, open_request
from constellation.roster import root_name
from constellation.storage import mirror
from constellation.storage.atomic import read_object, write_json
from constellation.storage.exclusive import is_held
from constellation.telemetry.step import STEPS, TELEMETRY

VIEW = "status.json"
OLD_S = 30.0  # a driver writes no view while it reads the corpus or fits the router; older news is told with its age


@dataclass(frozen=True)
class KernelStatus:
    """One model of a constellation, as `constellation status` shows it."""

    role: str
    root: str | None  # its E8 address, such as "e1 - e3"; None for OCEAN and before the router is fitted
    state: str  # waiting | starting | training | serving | done | stopped | failed
    health: str  # "ok", or in words what is wrong
    step: int  # steps done
    steps: int | None  # planned
    loss_nats: float | None  # of the newest step known, nats per token
    node: str | None = None  # IP address and Ray's id of the node
    pid: int | None = None
    restarts: int = 0
    telemetry: dict[str, Any] | None = None  # newest line of training_telemetry.jsonl


@dataclass(frozen=True)
class ClusterStatus:
    """A constellation as a whole."""

    run: str
    name: str
    state: str  # new | training | stopped | failed | finished | starting | up
    address: str | None  # of the Ray it is up on; None when it is not
    detail: str  # one sentence: what this means, what to do
    kernels: tuple[KernelStatus, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def models_of(run: Path) -> tuple[str, ...]:
    """OCEAN and the kernels of `run`; ConfigError when it is no run."""
    return open_request(run)[1].models


def done(folder: Path) -> bool:
    """Whether the model in `folder` has the checkpoint of its last planned step."""
    planned = _planned(folder)
    return planned is not None and (folder / "checkpoints" / f"step-{planned:08d}").is_dir()


def finished(run: Path) -> bool:
    """Whether every model of `run` is trained to its end."""
    return all(done(run / role) for role in models_of(run))


def unfinished(run: Path, used: Mapping[str, int] | None = None) -> dict[str, dict[str, int | None]]:
    """The models of `run` that are not used at their last step: the step used, 0 for none, and how many are planned.

    `used` are the steps that a constellation which is up has loaded; None stands for the newest checkpoints.
    """
    left = {}
    for role in models_of(run):
        step, planned = (used or {}).get(role, newest_step(run / role)), _planned(run / role)
        if planned is None or step < planned:
            left[role] = {"step": step, "steps": planned}
    return left


def unfinished_line(run: Path, left: Mapping[str, Mapping[str, int | None]]) -> str:
    """What `unfinished` found, for the user."""
    words = [
        f"{role} step {of['step']} of {of['steps']}" if of["steps"] else f"{role} none" for role, of in left.items()
    ]
    rest = "" if len(left) == len(models_of(run)) else "; the others are at their last step"
    return f"{run} is not trained to its end; used are {', '.join(words)}{rest}"


def check_complete(run: Path) -> Plan:
    """The plan of a run in which everything that answers has a checkpoint; ConfigError, with what is missing."""
    plan = open_plan(run)
    absent = [role for role in plan.config.models if not newest_step(run / role) and not done(run / role)]
    if not (plan.router / "router.json").exists() or absent:
        missing = "the router" if not absent else ", ".join(absent)
        raise ConfigError(f"{run}: {missing} not trained yet; constellation train --run {run} --resume")
    return plan


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in `folder`, by its name; 0 without one."""
    names = (re.fullmatch(r"step-(\d{8})", path.name) for path in (folder / "checkpoints").glob("step-*"))
    return max((int(name[1]) for name in names if name), default=0)


def folder_status(run: Path) -> ClusterStatus:
    """The constellation in `run` by what lies there: training (then live), finished, stopped, failed or new."""
    addresses = roots(run)
    kernels = [_kernel(run, role, addresses.get(role)) for role in models_of(run)]
    if _at_work(run):
        view = _json(run / VIEW)
        told = view.get("time")
        age = time.time() - told if isinstance(told, float) else 0.0
        live = {}
        with contextlib.suppress(TypeError, KeyError):  # of another version
            live = {row["role"]: KernelStatus(**row) for row in view.get("kernels", ())}
        kernels = [k if k.state == "done" else replace(live.get(k.role, k), telemetry=k.telemetry) for k in kernels]
        state = "training"
        detail = "a driver is at work" + ("" if age < OLD_S else f", its last news is {age:.0f} s old")
    elif finished(run):
        state, detail = "finished", f"not running; ask it: constellation generate --run {run}"
    elif failed := [k for k in kernels if k.state == "failed"]:
        state, detail = "failed", failed[0].health
    elif any(k.step for k in kernels):
        state, detail = "stopped", f"not running; go on: constellation train --run {run} --resume"
    else:
        state, detail = "new", f"not running, nothing trained yet: constellation train --run {run} --resume"
    return ClusterStatus(str(run), run.resolve().name, state, None, detail, tuple(kernels))


def _at_work(run: Path) -> bool:
    """Whether a driver works on `run`: on this machine, or on any that has its lease."""
    if is_held(run):
        return True
    store = mirror.of(run)
    if store is None:
        return False
    from constellation.storage.lease import holder

    return holder(store.objects) is not None


def write_view(run: Path, kernels: Sequence[KernelStatus]) -> None:
    write_json(run / VIEW, {"time": time.time(), "kernels": [asdict(k) for k in kernels]})


def summary(run: Path) -> dict[str, Any]:
    """The result of a run as plain data: a row per model, with its address, loss and bits per byte; what it cost."""
    addresses = roots(run)
    rows = []
    for role in models_of(run):
        page = _json(run / role / "summary.json")
        rows.append({
            "role": role, "root": addresses.get(role), "tokens": page.get("tokens"), "steps": page.get("steps"),
            "loss_nats": page.get("last_loss_nats"), "dev_bits_per_byte": page.get("best_dev_bits_per_byte"),
            "status": "done" if done(run / role) else page.get("status", "waiting"),
        })  # fmt: skip
    return {"run": str(run), "models": rows, "cost": cost.read(run) or None}


def roots(run: Path) -> dict[str, str]:
    """E8 addresses of the kernels as the fitted router gave them, in words; empty before that."""
    from router.decide.fisher_rao import FisherRaoRouter

    try:
        router = FisherRaoRouter.load(run / "router")
    except ArtifactError:
        return {}
    return {role: root_name(vector) for role, vector in zip(router.names, router.roots.tolist(), strict=True)}


def _kernel(run: Path, role: str, root: str | None) -> KernelStatus:
    folder = run / role
    last, page = _last_step(folder / STEPS), _json(folder / "summary.json")
    if done(folder):
        state = "done"
    else:
        state = "failed" if page.get("status") == "failed" else "stopped" if last else "waiting"
    return KernelStatus(
        role=role, root=root, state=state,
        health=str(page.get("failure")) if state == "failed" else "ok", step=last.get("step", 0),
        steps=_planned(folder), loss_nats=last.get("loss_nats"),
        telemetry=_last_step(folder / TELEMETRY) or None,
    )  # fmt: skip


def _last_step(file: Path) -> dict[str, Any]:
    """The last whole line of a log; steps are logged when their checkpoint is."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - 65536))
            lines = log.read().splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # one that is torn by a kill
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    return {}


def _planned(folder: Path) -> int | None:
    steps = _json(folder / "meta.json").get("steps")
    return steps if isinstance(steps, int) else None


def _json(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except ArtifactError:
        return {}
