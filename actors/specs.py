"""ActorSpec: how to create an actor and what to tell it first, as plain data that can be used again after a death."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.kernel_actor import KernelActor
from actors.placement import Placement, Resources, halves
from actors.router_actor import RouterActor
from constellation.config import Config
from constellation.roster import OCEAN

if TYPE_CHECKING:
    from constellation.train.job import Job

ROUTER = "router"


@dataclass(frozen=True)
class ActorSpec:
    """One actor to be."""

    role: str
    actor_class: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    task: tuple[Any, ...]  # method and arguments of its first call, which may be repeated
    steps: int | None = None  # planned
    lasting: dict[str, Any] = field(default_factory=dict)  # name and namespace of a detached actor

    def create(self) -> Any:
        """A new actor; of a detached one the one that is there already, if any."""
        own = {**self.lasting, "lifetime": "detached", "get_if_exists": True} if self.lasting else {}
        return self.actor_class.options(**self.options, **own).remote(*self.arguments)

    def begin(self, actor: Any) -> Any:
        """Tell `actor` what to do; the answer comes when it has begun."""
        method, *arguments = self.task
        return getattr(actor, method).remote(*arguments)

    def name_is_free(self) -> bool:
        """Whether a detached actor of this name can be created: a killed one keeps it for a moment."""
        if not self.lasting:
            return True
        try:
            ray.get_actor(**self.lasting)
        except ValueError:
            return True
        return False


def trainer(placement: Placement, number: int, job: Job) -> ActorSpec:
    """An actor for `job` in bundle `number`."""
    t, part = job.config.train, placement.bundles[number]
    threads = t.ocean_threads if job.role == OCEAN else t.threads
    arguments = (job.role, part.get("GPU", 0.0))
    options = options_of(part, threads, placement.strategy(number))
    return ActorSpec(job.role, KernelActor, arguments, options, ("train", job), job.steps)


def servers(placement: Placement, run: Path | str, config: Config, namespace: str | None = None) -> list[ActorSpec]:
    """The router and all models of `run`, a shared folder or a URL; detached and named if there is a `namespace`."""
    threads = config.train.threads
    with_first, with_ocean = halves(placement.bundles[0])
    rooms = {role: (number, placement.bundles[number]) for number, role in enumerate(config.kernels)}
    rooms |= {config.kernels[0]: (0, with_first), OCEAN: (0, with_ocean)}
    specs = [ActorSpec(ROUTER, RouterActor, (run,), options_of({}, 1, "DEFAULT"), ("report", 0))]
    for role, (number, part) in rooms.items():
        options = options_of(part, threads, placement.strategy(number))
        specs.append(
            ActorSpec(role, KernelActor, (role, part.get("GPU", 0.0)), options, ("serve", run, threads, config.decode))
        )
    if namespace is None:
        return specs
    return [ActorSpec(**{**vars(h), "lasting": {"name": h.role, "namespace": namespace}}) for h in specs]


def options_of(part: Resources, threads: int, strategy: Any) -> dict[str, Any]:
    """Ray options of an actor: its resources, its threads, and no GPU in sight if it has none (Ray shows all)."""
    variables = {"OMP_NUM_THREADS": str(threads)}
    if not part.get("GPU"):
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return {
        "num_cpus": part.get("CPU", 0.0),
        "num_gpus": part.get("GPU", 0.0),
        "scheduling_strategy": strategy,
        "runtime_env": {"env_vars": variables},
    }
