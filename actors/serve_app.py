"""The same application on Ray Serve, for those who run a RayService (deploy/kuberay/rayservice.yaml).

    serve run actors.serve_app:app run=/shared/runs/first

Needs Ray's own extra, `pip install 'ray[serve]'`. `constellation serve` does without it and answers sooner; what Serve
adds is a proxy on every node and the operator's health checks and upgrades. Kernels are the actors that `constellation
up` would start, brought up here if they are not: they are no replicas of one another, so Serve does not scale them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.supervisor_actor import namespace_of
from constellation.errors import ConfigError
from constellation.storage.mirror import address_of, resolve

if TYPE_CHECKING:
    from fastapi import FastAPI

    from router.http.limits import Front

KNOWN = {"run": "", "name": "", "api_key_file": "", "replicas": "1", "ongoing": "256"}  # arguments and defaults


def arguments(args: Mapping[str, str]) -> dict[str, str]:
    """All arguments; ConfigError when one is unknown or the run is missing."""
    unknown = sorted(set(args) - set(KNOWN))
    if unknown:
        raise ConfigError(f"serve argument {unknown[0]!r}: choose of {', '.join(KNOWN)}")
    found = {**KNOWN, **{name: str(value) for name, value in args.items()}}
    if not found["run"]:
        raise ConfigError("serve argument 'run': a run folder that every node sees is needed, or a URL")
    for name in ("replicas", "ongoing"):
        if not found[name].isdigit() or int(found[name]) < 1:
            raise ConfigError(f"serve argument {name}={found[name]}: a whole number of at least 1 is wanted")
    return found


def app(args: Mapping[str, str]) -> Any:
    """The Serve application: brings the constellation up, then fronts that ask its kernels by name."""
    given = arguments(args)
    from ray import serve

    from actors import lifecycle

    run, keys = resolve(given["run"]), Path(given["api_key_file"]) if given["api_key_file"] else None
    name = lifecycle.up(run, name=given["name"] or None).name

    home = address_of(run)

    def front() -> FastAPI:
        return front_of(home, name, keys)

    deployment = serve.deployment(
        name="front", num_replicas=int(given["replicas"]), max_ongoing_requests=int(given["ongoing"]),
        graceful_shutdown_timeout_s=30, ray_actor_options={"num_cpus": 0},
    )  # fmt: skip
    return deployment(serve.ingress(front)()).bind()


def front_of(run: Path | str, name: str, keys: Path | None, front: Front | None = None) -> FastAPI:
    """The application over the kernels of the constellation called `name`, for a process that is part of its Ray."""
    from actors.remote import RayKernels
    from constellation.pipeline.serving import application
    from constellation.pipeline.status import models_of

    run = resolve(run)
    kernels = RayKernels(models_of(run), lambda role: ray.get_actor(role, namespace=namespace_of(name)))
    return application(run, kernels, keys, front)
