"""An experiment: runs that answer one question.

DIR/manifest.json        schema, question, when it was begun, whatever else is to be known; sealed
DIR/runs/<id>/           a run each (run.py)
DIR/table.parquet, .csv  a row a run, built from the summaries alone (table.py); may be deleted and built again
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from constellation.artifacts import schema, table
from constellation.errors import ArtifactError, ConfigError
from constellation.storage.atomic import write_json

MANIFEST = "manifest.json"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,127}")


@dataclass(frozen=True)
class Experiment:
    """The folder of an experiment and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    def folder(self, run_id: str) -> Path:
        """Where the run of this id is, or is to be; ConfigError for an id that is no plain name."""
        if not _ID.fullmatch(run_id):
            raise ConfigError(f"run id {run_id!r}: letters, digits and ._=+- are wanted, at most 128, no dot first")
        return self.path / "runs" / run_id

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows."""
        return table.rows_of(self.path)

    def write_table(self) -> list[Path]:
        """The table as Parquet and CSV."""
        return table.write(self.rows(), self.path)


def begin(path: Path, question: str, **facts: Any) -> Experiment:
    """A new experiment in `path`, or the one there if it asks the same; ConfigError when it asks another."""
    if (path / MANIFEST).exists():
        found = open_experiment(path)
        if found.manifest["question"] != question:
            raise ConfigError(f"{path} asks {found.manifest['question']!r}, not {question!r}; choose another folder")
        return found
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    manifest = {**facts, "schema": schema.NEWEST["manifest"], "question": question, "created": created}
    write_json(path / MANIFEST, manifest, sealed=True)
    return open_experiment(path)


def open_experiment(path: Path) -> Experiment:
    """The experiment in `path`; ArtifactError when there is none, or its manifest is damaged."""
    manifest = schema.read(path / MANIFEST, "manifest")
    if not isinstance(manifest.get("question"), str):
        raise ArtifactError(f"{path / MANIFEST} is damaged: a question is wanted")
    return Experiment(path, manifest)
