"""Where a Prometheus finds a constellation: every Ray node (with the kernels' gauges) and every front.

targets(run)    what `file_sd_configs` of Prometheus reads: a list of {"targets": [host:port], "labels": {...}}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from actors import record as records
from actors.connect import connected, where
from actors.fronts import FRONT
from actors.supervisor_actor import namespace_of
from constellation.errors import ConfigError

ANSWER_S = 10.0


def targets(run: Path | None = None, *, address: str | None = None) -> list[dict[str, Any]]:
    """Of the constellation that is up in `run`, or of all in the Ray at `address`; ConfigError when there is none."""
    if run is None:
        with connected(where(address)):
            return _found(None)
    record = records.read(run)
    if record is None:
        raise ConfigError(f"{run} is not up, so nothing of it can be asked; constellation up --run {run}")
    if why := record.unreachable():
        raise ConfigError(f"{run}: {why}; constellation up --run {run}")
    with records.in_use(run, record), record.connected():
        return _found(record.name)


def _found(name: str | None) -> list[dict[str, Any]]:
    nodes = [node for node in ray.nodes() if node["Alive"] and node["MetricsExportPort"] > 0]
    told = [_group([f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes], "ray")]
    for actor in ray.util.list_named_actors(all_namespaces=True):
        mine = name is None or actor["namespace"] == namespace_of(name)
        if mine and actor["name"].startswith(FRONT):
            constellation = actor["namespace"].partition(".")[2]
            try:
                front = ray.get_actor(actor["name"], actor["namespace"])
                target: str = ray.get(front.target.remote(), timeout=ANSWER_S)
            except (RayError, ValueError):  # it has just ended, or has not begun
                continue
            told.append(_group([target], "constellation-front", constellation=constellation, front=actor["name"]))
    return told


def _group(where: list[str], job: str, **labels: str) -> dict[str, Any]:
    return {"targets": where, "labels": {"job": job, **labels}}
