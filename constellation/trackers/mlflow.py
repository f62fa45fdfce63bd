"""MLflow: one run for a constellation, metrics named role/name.

It goes to MLFLOW_TRACKING_URI where that is set, else to MLflow's file store in trackers/mlflow, which its current
versions open when MLFLOW_ALLOW_FILE_STORE=true. The run's id is kept beside it, so that a resumed run goes on with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from constellation.errors import ArtifactError
from constellation.storage.atomic import read_object, write_json
from constellation.trackers.tracker import Told

EXPERIMENT = "constellation"
FLUSH_S, LARGEST = 2.0, 1000  # MLflow takes so many metrics at once
LONGEST = 500  # characters of a parameter


class MLflow:
    """One MLflow run."""

    def __init__(self, client: Any, run: str):
        self._client, self.run = client, run
        self._waiting: list[Any] = []
        self._flushed = time.monotonic()

    def tell(self, step: Told) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(f"{step.role}/{n}", float(v), now, step.step) for n, v in step.numbers().items()]
        if len(self._waiting) > LARGEST // 2 or time.monotonic() - self._flushed > FLUSH_S:
            self._flush()

    def close(self, status: str) -> None:
        self._flush()
        self._client.set_terminated(self.run, "FINISHED" if status == "done" else "FAILED")

    def _flush(self) -> None:
        while self._waiting:
            self._client.log_batch(self.run, metrics=self._waiting[:LARGEST])
            del self._waiting[:LARGEST]
        self._flushed = time.monotonic()


def begin(folder: Path, title: str, settings: Mapping[str, Any]) -> MLflow:
    where = os.environ.get("MLFLOW_TRACKING_URI")
    if where is None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.entities import Param
    from mlflow.tracking import MlflowClient

    client, page = MlflowClient(where or (folder / "mlruns").resolve().as_uri()), folder / "run.json"
    try:
        run = str(read_object(page)["run"])
        client.set_terminated(run, "RUNNING")
        return MLflow(client, run)
    except (ArtifactError, KeyError):
        pass
    found = client.get_experiment_by_name(EXPERIMENT)
    experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT)
    run = client.create_run(experiment, run_name=title).info.run_id
    client.log_batch(run, params=[Param(name, str(value)[:LONGEST]) for name, value in settings.items()])
    write_json(page, {"run": run})
    return MLflow(client, run)
