"""A constellation that stays up: actors that outlive the command that started them.

    up(run)       a supervisor actor (supervisor_actor.py) keeps router, OCEAN and kernels alive
    status(run)   what there is: up, in training, finished, stopped
    down(run)     actors first, then their room, then the Ray, if `up` started it

record.py says where it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import get_placement_group, remove_placement_group

from actors import record as records
from actors.connect import connected, inside, machine, where
from actors.placement import check, check_cluster, share
from actors.ray_head import start_head, stop_head
from actors.record import Record
from actors.specs import options_of
from actors.supervisor_actor import SUPERVISOR, SupervisorActor, namespace_of
from constellation.errors import ConfigError, RunError
from constellation.pipeline.serving import servable
from constellation.pipeline.status import ClusterStatus, folder_status
from constellation.storage.mirror import address_of

UP_S, ASK_S, DOWN_S = 600.0, 10.0, 30.0
RESTARTING = "the supervisor does not answer yet; Ray starts it again if it has ended"
Say = Callable[[str], None]


def up(
    run: Path,
    *,
    address: str | None = None,
    name: str | None = None,
    changes: Mapping[str, Any] | None = None,
    num_cpus: int | None = None,
    say: Say = print,
) -> ClusterStatus:
    """Let the constellation in `run` stay up, in the Ray at `address` or in one on this machine that stays too.

    `changes` may override cluster.*, such as {"cluster.gpus_per_kernel": 0}; `name` None is the folder's.
    Up already is no error. A failure on the way leaves nothing behind.
    """
    config = servable(run, changes)
    name, bundles = name or run.resolve().name, [share(config)] * len(config.kernels)
    with records.locked(run):
        now = status(run)
        if now.state in ("up", "starting"):
            say(f"{run} is up already, as {now.name} at {now.address}")
            return now
        _forget(run)
        head, address = None, where(address)
        if address is None and not inside():
            size = machine(num_cpus, config.constellation.kernels)
            check(bundles, [size], "this machine")
            say("starting a Ray on this machine that stays")
            head = start_head(int(size["CPU"]))
        record = None
        try:
            with connected(head.address if head else address, token=head.token if head else None):
                check_cluster(bundles)
                if _supervisor(name) is not None:
                    raise ConfigError(f"a constellation named {name} is up in this cluster; choose another --name")
                record = Record(name, ray.get_runtime_context().gcs_address, head)
                records.write(run, record)
                options = options_of({}, 1, "DEFAULT") | {"name": SUPERVISOR, "namespace": namespace_of(name)}
                actor = SupervisorActor.options(**options, lifetime="detached").remote(address_of(run), name, config)
                return _until_up(actor, run, say)
        except BaseException:
            if record is not None:
                _take_down(record)
            elif head is not None:
                stop_head(head)
            records.remove(run)
            raise


def status(run: Path | None = None, *, name: str | None = None, address: str | None = None) -> ClusterStatus:
    """The constellation in the folder `run`, or the one called `name` in the Ray at `address`. Answers in seconds."""
    if run is None:
        with connected(where(address)):
            actor = _supervisor(name or "")
            if actor is None:
                raise ConfigError(f"no constellation named {name} is up in this cluster")
            unknown = ClusterStatus("", name or "", "starting", where(address), RESTARTING, ())
            return _ask(actor) or unknown
    folder, record = folder_status(run), records.read(run)
    if record is None:
        return folder
    if why := record.unreachable():
        return dataclasses.replace(folder, detail=f"{why}; {folder.detail}")
    with records.in_use(run, record), record.connected():
        actor = _supervisor(record.name)
        if actor is None:
            return dataclasses.replace(folder, detail=f"its actors are gone; {folder.detail}")
        live = _ask(actor)
    if live is None:
        unheard = [dataclasses.replace(kernel, state="waiting", pid=None) for kernel in folder.kernels]
        unseen = dataclasses.replace(folder, name=record.name, address=record.address, kernels=tuple(unheard))
        return dataclasses.replace(unseen, state="starting", detail=RESTARTING)
    trained = {kernel.role: kernel for kernel in folder.kernels}
    kernels = [
        dataclasses.replace(kernel, steps=known.steps, loss_nats=known.loss_nats)
        if (known := trained.get(kernel.role))
        else kernel
        for kernel in live.kernels
    ]
    return dataclasses.replace(live, run=str(run), kernels=tuple(kernels))


def down(run: Path | None = None, *, name: str | None = None, address: str | None = None, say: Say = print) -> bool:
    """End what `up` began: actors, then their room, then the Ray if it was ours. False if there was nothing."""
    if run is None:
        with connected(where(address)):
            return _end_actors(name or "")
    with records.locked(run, wait_s=DOWN_S):
        record = records.read(run)
        if record is None:
            say(f"{run} is not up")
            return False
        _check_here(run, record)
        if why := dataclasses.replace(record, ending=False).unreachable():  # a `down` before us may have been killed
            say(f"{run} was up, but {why}; forgotten")
            _forget(run)
            return True
        with records.ended(run, record):
            _take_down(record)
        say(f"{run} is down")
        return True


def _until_up(actor: Any, run: Path, say: Say) -> ClusterStatus:
    began, said = time.monotonic(), ""
    while True:
        now = _ask(actor)
        if now is not None and now.state == "up":
            return dataclasses.replace(now, run=str(run))
        if now is not None and now.state == "failed":
            raise RunError(now.detail)
        detail = RESTARTING if now is None else now.detail
        if time.monotonic() - began > UP_S:
            raise RunError(f"not up within {UP_S:g} s: {detail}")
        if detail != said:
            said = detail
            say(said)
        time.sleep(0.25)


def _supervisor(name: str) -> Any:
    try:
        return ray.get_actor(SUPERVISOR, namespace=namespace_of(name))
    except ValueError:
        return None


def _ask(actor: Any) -> ClusterStatus | None:
    """The supervisor's status; None while it has no time to answer, or Ray starts it again after its end."""
    try:
        found: ClusterStatus = ray.get(actor.status.remote(), timeout=ASK_S)
        return found
    except RayTaskError as error:
        raise RunError(f"supervisor: {error.cause!r}") from None
    except (ActorUnavailableError, GetTimeoutError):
        return None
    except RayError as error:
        raise RunError(f"the supervisor has ended ({type(error).__name__}); constellation down") from None


def _take_down(record: Record) -> None:
    """End actors, room and our own Ray; the Ray is ended even if the actors cannot be reached."""
    try:
        with contextlib.suppress(ConfigError, RayError), record.connected():
            _end_actors(record.name)
    finally:
        if record.head is not None:
            stop_head(record.head)


def _end_actors(name: str) -> bool:
    """Through the supervisor, and whatever it leaves by hand."""
    supervisor = _supervisor(name)
    if supervisor is not None:
        with contextlib.suppress(RayError):
            ray.get(supervisor.shutdown.remote(), timeout=DOWN_S)
        ray.kill(supervisor)
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == namespace_of(name):
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
    with contextlib.suppress(ValueError):
        remove_placement_group(get_placement_group(namespace_of(name)))
    return supervisor is not None


def _forget(run: Path) -> None:
    """Remove a record whose Ray does not answer, and what is left of that Ray if it was ours."""
    record = records.read(run)
    if record is not None and record.head is not None:
        _check_here(run, record)
        stop_head(record.head)
    records.remove(run)


def _check_here(run: Path, record: Record) -> None:
    """ConfigError when another machine holds the Ray of `run`: its processes can be ended there alone."""
    if record.head is not None and not record.head.here():
        raise ConfigError(f"{run} is up on {record.head.host}: constellation down --run {run} there")
