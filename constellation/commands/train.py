"""constellation train"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from constellation.commands import options
from constellation.config import parse_assignments, values
from constellation.errors import ConfigError
from constellation.optim.registry import OPTIMIZERS
from constellation.pipeline.beginning import begun_with
from constellation.pipeline.request import REQUEST, check_request, open_request
from constellation.presets import preset as make_preset
from constellation.trackers.tracker import named, tracking

NAMES = "\n".join(f"  {name:<19}{row.words}" for name, row in OPTIMIZERS.items())


@click.command(epilog=f"\b\noptim.name chooses the optimizer, whose settings the other optim.* are:\n{NAMES}")
@options.corpus
@options.run
@click.option("--preset", default=None, metavar="NAME", help="tiny | small (default) | 23m | 100m | FILE.toml")
@click.option(
    "--from",
    "folder",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="OCEAN is this pretrained Llama (config.json, safetensors, tokenizer.json); with train.ocean_share trained on",
)
@click.option(
    "--embeddings", type=click.Path(path_type=Path), default=None, metavar="DIR|FILE",
    help="the embeddings of such a folder, or a safetensors file in it, alone: frozen, projected to kernel.width",
)  # fmt: skip
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), default=None, metavar="FOLDER",
    help="of `coordizer train`; kernel.vocab_size becomes its own; default: learnt, settings coordizer.*",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="go on with the run in DIR")
@options.address
@click.option(
    "--ray-auth",
    type=click.Choice(["token", "disabled"]),
    default=None,
    help="of a Ray that is started here; disabled: whoever is on this machine can run code as you",
)
@click.option(
    "--log", "log", default=None, metavar="NAMES",
    help="tensorboard, mlflow, wandb, several with commas, or none; default: tensorboard, in DIR/trackers",
)  # fmt: skip
@options.as_json
@options.overrides
def command(
    corpus: Path | None,
    run: Path,
    preset: str | None,
    folder: Path | None,
    embeddings: Path | None,
    tokenizer: Path | None,
    resume: bool,
    address: str | None,
    ray_auth: str | None,
    log: str | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train OCEAN, fit the router, then branch and train the kernels, each a Ray actor.

    KEY=VALUE changes one setting of the preset, such as optim.lr=2e-3; heart.optim.lr=2e-3 changes it
    for one kernel alone.
    """
    if topo := next((word for word in overrides if word.startswith("topo.")), None):
        raise ConfigError(f"{topo}: topo.* are settings of constellation topo train; a constellation has none of them")
    changes = parse_assignments(overrides)
    if tokenizer is not None:
        changes = {**_settings_of(tokenizer), **changes}
    config = None
    if not resume or preset or changes or folder or embeddings:
        own = resume and not preset and (run / REQUEST).exists()
        base = open_request(run)[1] if own else make_preset(preset or "small")
        config = begun_with(base, changes, folder=folder, embeddings=embeddings)
    trackers = named(log)
    options.check_writable(run)
    check_request(run, corpus, config, resume)  # told before torch and Ray are imported
    from actors import launch
    from constellation.commands.display import Display, result_table

    with (
        Display(as_json) as display,
        tracking(trackers, run, values(config or open_request(run)[1]), display.say) as track,
    ):
        how: dict[str, Any] = {"address": address, "auth": ray_auth, "resume": resume, "say": display.say}
        for step in launch.train(run, corpus, config, **how):
            display.show(step)
            track(step)
    summary: dict[str, Any] = launch.summary(run)
    options.print_json(summary) if as_json else result_table(summary)


def _settings_of(tokenizer: Path) -> dict[str, str]:
    """The settings that take the tokenizer of a folder."""
    from constellation.coordizer.trainer import load

    size = load(tokenizer).tokenizer.vocab_size
    return {"coordizer.folder": str(tokenizer.resolve()), "kernel.vocab_size": str(size)}
