"""constellation doctor"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import tempfile
import time
from pathlib import Path

import click

from constellation.commands import options
from constellation.errors import RunError

NEEDED_DISK = 2 * 2**30  # bytes; Ray spills and a run of the default preset fit well below


@click.command()
@click.option(
    "--architecture", "run", type=options.RunPlace(), default=None, metavar="RUN", help="check a trained model instead"
)
@click.option("--role", default="ocean", show_default=True, help="which model of RUN")
@options.as_json
def command(run: Path | None, role: str, as_json: bool) -> None:
    """Check Python, torch, Ray, GPUs and disk, then run a self-test: train a few steps, save, load, call an actor.

    With --architecture: parameters, causality, loops, geometry, gradients and round trips of a trained model.
    """
    if run is not None:
        _architecture(run, role, as_json)
        return
    checks = (
        ("python", _python), ("torch", _torch), ("ray", _ray), ("gpus", _gpus), ("disk", _disk),
        ("memory", _memory),
        ("decoding", _decoding),
        ("self-test: geometry", _geometry), ("self-test: train, save, load", _train), ("self-test: ray actor", _actor),
    )  # fmt: skip
    rows, failed = [], []
    for name, check in checks:
        began = time.perf_counter()
        try:
            ok, text = True, check()
        except Exception as error:  # whatever is wrong with this machine is what the user asked to see
            ok, text = False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            failed.append(name)
        rows.append({"check": name, "ok": ok, "found": text, "seconds": round(time.perf_counter() - began, 2)})
        if not as_json:
            click.echo(f"{'ok  ' if ok else 'FAIL'} {name:<30} {text}")
    if as_json:
        options.print_json({"ok": not failed, "checks": rows})
    if failed:
        raise RunError(f"doctor: {', '.join(failed)} failed")


def _architecture(run: Path, role: str, as_json: bool) -> None:
    from dataclasses import asdict

    from constellation.pipeline.architecture import check_architecture

    rows = check_architecture(run, role)
    failed = [row.name for row in rows if row.ok is False]
    if as_json:
        options.print_json({"ok": not failed, "run": run, "role": role, "checks": [asdict(row) for row in rows]})
    else:
        for row in rows:
            click.echo(f"{'-   ' if row.ok is None else 'ok  ' if row.ok else 'FAIL'} {row.name:<12} {row.found}")
    if failed:
        raise RunError(f"doctor: {', '.join(failed)} failed for {role} of {run}")


def _python() -> str:
    from constellation.processor import cores

    return f"{platform.python_version()} on {platform.system()} {platform.machine()}, {cores()} cores"


def _torch() -> str:
    import torch

    from constellation.config import Config
    from constellation.train.job import resolve_precision

    return f"{torch.__version__}, trains in {resolve_precision(Config()).train.precision} here"


def _ray() -> str:
    return importlib.metadata.version("ray")


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none; kernels share the CPU"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in names)


def _disk() -> str:
    folders = {Path.cwd(), Path(tempfile.gettempdir())}
    free = {folder: shutil.disk_usage(folder).free for folder in folders}
    for folder, size in free.items():
        if size < NEEDED_DISK:
            raise RuntimeError(f"{folder}: {size / 2**30:.1f} GiB free, at least {NEEDED_DISK / 2**30:.0f} are needed")
    return ", ".join(f"{folder}: {size / 2**30:.0f} GiB free" for folder, size in sorted(free.items()))


def _memory() -> str:
    from actors.memory import check_memory, free_bytes, gib, needed_bytes
    from constellation.presets import small, tiny
    from constellation.processor import cores

    at_once = min(cores(), small().constellation.kernels)
    check_memory(tiny(), at_once, free := free_bytes())
    return f"{gib(free)} free; training the preset small takes at least {gib(needed_bytes(small(), at_once))}"


def _decoding() -> str:
    from constellation.decoding.compiled import Unavailable, library

    try:
        library()
    except Unavailable as error:  # slower, not broken
        return f"by torch's operations: {error}"
    return "native"


def _geometry() -> str:
    import torch

    from constellation.geometry import simplex

    found = float(simplex.distance(torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])))
    if abs(found - 0.927295) > 1e-5:
        raise RuntimeError(f"d_FR(Bernoulli .5, Bernoulli .9) = {found}, 0.927295 is right")
    return f"d_FR(Bernoulli .5, Bernoulli .9) = {found:.6f} rad"


def _train() -> str:
    from constellation.config import override
    from constellation.coordizer.tokenizer import Tokenizer
    from constellation.data.cache import build_cache
    from constellation.data.corpus import Document
    from constellation.presets import tiny
    from constellation.train.checkpoint import load_model
    from constellation.train.job import Job, resolve_precision
    from constellation.train.loop import fit

    text = "The basin of a text is a point of the Fisher-Rao sphere. " * 50
    config = resolve_precision(override(tiny(), {"train.checkpoint_every": 10}))
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Tokenizer.train([text], config.kernel.vocab_size)
        cache = build_cache([Document(text, None, "doctor", None, {})], tokenizer, Path(scratch))
        losses = [s.loss_nats for s in fit(Job("ocean", Path(scratch) / "run", config, 10, cache.path))]
        load_model(Path(scratch) / "run")
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss did not fall: {losses[0]:.3f} -> {losses[-1]:.3f}")
    return f"loss {losses[0]:.2f} -> {losses[-1]:.2f} nats/token in {len(losses)} steps"


def _actor() -> str:
    from actors.ping import ping

    return ping()
