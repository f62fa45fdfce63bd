"""Room for a constellation: one bundle per kernel, all equal, in one placement group.

OCEAN trains in the first bundle before the kernels exist; when the constellation serves, it shares
that bundle with its kernel, half each. So training and serving need the same, and a host with eight
GPUs holds both.

An outer group, such as a Tune trial's, is used and never nested: a group asked for inside a group
waits for resources that its own parent holds, for ever (measured).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from constellation.config import Config
from constellation.errors import ConfigError, PlacementError
from constellation.processor import cores

Resources = dict[str, float]
KINDS = ("CPU", "GPU")
GROWS = "autoscaling"  # a node resource by which cluster.yaml and deploy/ say: more nodes can come
SAY_EVERY_S = 5.0


@dataclass(frozen=True)
class Placement:
    """Where the bundles are; `group` is None for a constellation that reserves nothing."""

    bundles: tuple[Resources, ...]  # what each kernel has
    group: PlacementGroup | None
    indices: tuple[int, ...]  # bundle of `group` that each kernel is in
    own: bool  # whether release() removes the group

    def strategy(self, kernel: int) -> Any:
        """Scheduling strategy of an actor in the room of kernel number `kernel`."""
        if self.group is None:
            return "DEFAULT"
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.indices[kernel])

    def still_fits(self) -> bool:
        """Whether the nodes that are alive are enough, busy or not."""
        return self.group is None or not self.own or pack(self.bundles, nodes()) is not None

    def release(self) -> None:
        """Give the room back, after the actors in it are dead."""
        if self.own and self.group is not None:
            remove_placement_group(self.group)


def share(config: Config) -> Resources:
    """What one kernel needs."""
    wanted = {"CPU": config.cluster.cpus_per_kernel, "GPU": config.cluster.gpus_per_kernel}
    if wanted["GPU"] > 1 and wanted["GPU"] != int(wanted["GPU"]):
        raise ConfigError(f"cluster.gpus_per_kernel={wanted['GPU']}: a part of one GPU, or whole GPUs")
    return {kind: amount for kind, amount in wanted.items() if amount}


def resident(config: Config, kernels: int, gpus: float | None = None) -> int:
    """How many of `kernels` train at once: cluster.resident, else all, or what the cores or `gpus` of our machine hold.

    At least 1, for OCEAN. More processes than cores share caches and take turns: measured in `constellation bench
    train`, they are slower together than one after another, and their memory is that of all.
    """
    if config.cluster.resident or gpus is None:
        return max(1, min(kernels, config.cluster.resident or kernels))
    each = config.cluster.gpus_per_kernel
    fit = gpus // each if each else cores() // config.train.threads
    return max(1, min(kernels, int(fit)))


def halves(whole: Resources) -> tuple[Resources, Resources]:
    """`whole` for two actors, kernel and OCEAN; more than one GPU is shared in whole GPUs, as Ray wants it."""
    ocean = {kind: amount / 2 if amount <= 1 or kind == "CPU" else float(amount // 2) for kind, amount in whole.items()}
    return {kind: amount - ocean[kind] for kind, amount in whole.items()}, ocean


def pack(bundles: Sequence[Resources], rooms: Sequence[Resources]) -> tuple[int, ...] | None:
    """For each of the equal `bundles` the index of a room with space for it; None when they do not all fit."""
    left = [dict(room) for room in rooms]
    found = []
    for bundle in bundles:
        for index, room in enumerate(left):
            if all(room.get(kind, 0.0) >= amount - 1e-9 for kind, amount in bundle.items()):
                left[index] = {kind: amount - bundle.get(kind, 0.0) for kind, amount in room.items()}
                found.append(index)
                break
        else:
            return None
    return tuple(found)


def check(bundles: Sequence[Resources], rooms: Sequence[Resources], where: str) -> tuple[int, ...]:
    """`pack`, or PlacementError with what is needed and what there is."""
    found = pack(bundles, rooms)
    if found is None:
        spread = "" if len(rooms) == 1 else f" on {len(rooms)} nodes"
        raise PlacementError(
            f"the constellation needs {needs(bundles)}; {where} has {total(rooms)}{spread}; "
            "lower cluster.cpus_per_kernel or cluster.gpus_per_kernel, or join a larger cluster with --address"
        )
    return found


def check_cluster(bundles: Sequence[Resources]) -> None:
    """PlacementError if the Ray we are connected to, or the group we are in, can never hold `bundles`."""
    outer = get_current_placement_group()
    if outer is not None:
        check(bundles, _rooms_of(outer), "the placement group around it")
        return
    rooms = nodes()
    if not any(GROWS in room for room in rooms):
        check(bundles, rooms, "the cluster")


def reserve(
    bundles: Sequence[Resources],
    timeout_s: float,
    say: Callable[[str], None],
    name: str | None = None,
    purpose: str = "",
) -> Placement:
    """Room for `bundles`, in the group around us or in a new one (detached and found again if it has a `name`).

    Ray's dashboard shows the `purpose` of one without a name.

    What can never fit is a PlacementError at once; a cluster that is busy, or can grow, is waited for.
    """
    check_cluster(bundles)
    kept, in_order = tuple(bundles), tuple(range(len(bundles)))
    outer = get_current_placement_group()
    if outer is not None:
        return Placement(kept, outer, pack(bundles, _rooms_of(outer)) or (), own=False)
    if not any(bundles):
        return Placement(kept, None, (), own=False)
    if name is not None:
        try:
            return Placement(kept, get_placement_group(name), in_order, own=True)
        except ValueError:
            pass  # none of this name yet
    shown = f"{purpose or 'constellation'} {ray.get_runtime_context().get_job_id()}-{time.monotonic_ns():x}"
    lifetime = {"name": name, "lifetime": "detached"} if name else {"name": shown}
    group = placement_group([dict(bundle) for bundle in bundles], strategy="PACK", **lifetime)
    try:
        _wait(group, bundles, timeout_s, say)
    except BaseException:
        remove_placement_group(group)
        raise
    return Placement(kept, group, in_order, own=True)


def _wait(group: PlacementGroup, bundles: Sequence[Resources], timeout_s: float, say: Callable[[str], None]) -> None:
    began = time.monotonic()
    while not group.wait(min(SAY_EVERY_S, timeout_s)):
        waited, free = time.monotonic() - began, total([ray.available_resources()])
        if waited >= timeout_s:
            raise PlacementError(
                f"no room within {timeout_s:g} s: the constellation needs {needs(bundles)}; the cluster has "
                f"{total(nodes())}, free {free}; end something there or raise cluster.placement_timeout_s"
            )
        say(f"waiting for room ({waited:.0f} of {timeout_s:g} s): needs {needs(bundles)}; free {free}")


def needs(bundles: Sequence[Resources]) -> str:
    return f"{len(bundles)} x ({words(bundles[0])}), in all {total(bundles)}"


def total(rooms: Sequence[Resources]) -> str:
    return words({kind: sum(room.get(kind, 0.0) for room in rooms) for kind in KINDS})


def words(resources: Resources) -> str:
    return ", ".join(f"{kind} {resources[kind]:g}" for kind in KINDS if kind in resources) or "nothing"


def nodes() -> list[Resources]:
    """Total resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _rooms_of(group: PlacementGroup) -> list[Resources]:
    """Bundles of `group`, less what we ourselves hold of the first one."""
    rooms: list[Resources] = [dict(bundle) for bundle in group.bundle_specs]
    own = ray.get_runtime_context().get_assigned_resources()
    rooms[0] = {kind: amount - own.get(kind, 0.0) for kind, amount in rooms[0].items()}
    return rooms
