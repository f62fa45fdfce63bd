"""What is asked of a topo run: RUN/topo.json, and how it is found again. Neither torch nor Ray here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from constellation.config import Config, from_json, override
from constellation.errors import ArtifactError, ConfigError
from constellation.storage.atomic import read_object, write_json

REQUEST = "topo.json"
CONV = {"topo.model.encoder": "conv", "topo.model.hidden": 192, "topo.model.latent": 16}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "mnist": {"topo.train.epochs": 100, "topo.train.lr": 4e-3, "topo.train.eval_every": 10},
    "cifar10": {**CONV, "topo.model.codes": 51, "topo.train.epochs": 40, "topo.train.lr": 3e-3, "topo.train.batch": 200,
                "topo.model.texture": 8},
}  # fmt: skip


def preset(name: str) -> Config:
    """The configuration of digits | mnist | cifar10, or of a file as constellation/presets.py reads it."""
    if name in PRESETS:
        return override(Config(), PRESETS[name])
    if name.endswith(".toml"):
        from constellation.presets import preset as from_file

        return from_file(name)
    raise ConfigError(f"--preset {name}: choose one of {', '.join(PRESETS)}, or a FILE.toml")


def named(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` with the group's name before those that are without: train.lr is topo.train.lr."""
    return {name if name.startswith("topo.") else f"topo.{name}": value for name, value in changes.items()}


def request(
    run: Path, source: str | None, config: Config | None, resume: bool, digest: Callable[[str], str]
) -> tuple[str, Config]:
    """Source and configuration of the run in `run`, written down when it is new; ConfigError where they do not match.

    source, config   None: the run's own, with --resume
    digest           of the images that a source names: a run goes on with the same pixels alone
    """
    file = run / REQUEST
    if not file.exists():
        if resume:
            raise ConfigError(f"--resume: {run} holds no topo run; leave it out to begin one")
        if run.exists() and any(path.name != ".lock" for path in run.iterdir()):
            raise ConfigError(f"--run {run} exists already and is no topo run; choose another")
        chosen, settings = source or "digits", config or preset("digits")
        page = {"source": chosen, "digest": digest(chosen), "config": settings.to_json()}
        write_json(file, page, sealed=True)
        return chosen, settings
    if not resume:
        raise ConfigError(f"{run} holds a topo run already; go on with --resume, or choose another --run")
    known, own = opened(run)
    if config is not None and config.topo != own.topo:
        raise ConfigError(f"--resume: {run} was begun with other settings; leave them out, or begin another run")
    chosen = source or known
    if digest(chosen) != read_object(file)["digest"]:
        raise ConfigError(f"--data {chosen}: not the images that {run} was begun with ({known})")
    return chosen, own


def opened(run: Path) -> tuple[str, Config]:
    """Source and configuration of the run in `run`; ArtifactError when it is none or damaged."""
    if not (run / REQUEST).exists():
        raise ArtifactError(f"{run} is no topo run (no {REQUEST}); train one: constellation topo train --run {run}")
    page = read_object(run / REQUEST)
    try:
        return str(page["source"]), from_json(page["config"])
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{run / REQUEST} is damaged ({error!r})") from None
