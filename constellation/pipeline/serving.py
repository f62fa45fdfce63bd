"""What a run offers: its service, and the application in front of it. No Ray here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from constellation.config import Config, override
from constellation.errors import ConfigError
from constellation.pipeline.request import open_plan
from constellation.pipeline.status import check_complete

if TYPE_CHECKING:
    from fastapi import FastAPI

    from router.answer.kernels import Kernels
    from router.answer.service import Service
    from router.http.limits import Front

NAME = "constellation"  # of the model that is asked, whatever the run's folder is called


def servable(run: Path, changes: Mapping[str, Any] | None = None) -> Config:
    """The configuration to serve `run` with; ConfigError unless everything that answers is there."""
    plan = check_complete(run)
    foreign = [key for key in changes or {} if not key.startswith(("cluster.", "decode."))]
    if foreign:
        raise ConfigError(f"{foreign[0]}: a trained constellation can change cluster.* and decode.* only")
    return override(plan.config, changes or {})


def service_of(run: Path, kernels: Kernels) -> Service:
    """The service of a run whose kernels are `kernels`."""
    from constellation.coordizer.tokenizer import Tokenizer
    from constellation.decoding.basins import read
    from router.answer.service import Service
    from router.decide.fisher_rao import FisherRaoRouter

    plan, created = open_plan(run), int((run / "constellation.json").stat().st_mtime)
    router, tokenizer = FisherRaoRouter.load(plan.router), Tokenizer.load(plan.tokenizer)
    basins = read(run, tokenizer.hash, plan.config.kernel.context)
    return Service(plan.config, router, tokenizer, kernels, name=NAME, created=created, basins=basins)


def application(run: Path, kernels: Kernels, key_file: Path | None = None, front: Front | None = None) -> FastAPI:
    """The application in front of a run; without a key file everyone may ask."""
    try:
        from router.app import AppSettings, make_app
        from router.http.keys import Keys
        from router.http.limits import Front
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'constellation[serve]'") from None
    front = front or Front()
    if front.access_log:
        _log_on_stderr("constellation.access")
    return make_app(service_of(run, kernels), AppSettings(keys=Keys(key_file), front=front))


def _log_on_stderr(name: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger(name)
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
