"""What a tracker is, which there are, and telling several of them.

    with tracking(named("tensorboard,mlflow"), folder, settings, say) as track:
        for step in train(...): track(step)

Who trains knows nothing of them: Steps are told where they arrive, in the driver, so no bit of a run depends on it. One
that fails is told in one line and left out from then on. A resumed run tells the steps after its checkpoint again, with
the same values. Nothing is opened before the first Step.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from constellation.errors import ConfigError

FOLDER = "trackers"  # of what they write, in the run folder


class Told(Protocol):
    """What is told: a kernel's Step, or an epoch of another model."""

    @property
    def role(self) -> str: ...

    @property
    def step(self) -> int: ...

    @property
    def sample(self) -> str | None: ...

    def numbers(self) -> dict[str, float]:
        """By name; units are in the names."""
        ...


class Tracker(Protocol):
    """One tracker, open for one run."""

    def tell(self, step: Told) -> None:
        """Write the step's numbers down, as role/name against its step."""
        ...

    def close(self, status: str) -> None:
        """Everything told is on disk, or sent, when it returns. `status` is "done" or "failed"."""
        ...


@dataclass(frozen=True)
class Kept:
    """A tracker's row: the module here whose `begin` makes one, the package it needs, and how to get that."""

    module: str
    needs: str
    install: str


TRACKERS = {
    "tensorboard": Kept("tensorboard", "tensorboardX", "tensorboardX"),
    "mlflow": Kept("mlflow", "mlflow", "'constellation[track]'"),
    "wandb": Kept("wandb", "wandb", "'constellation[wandb]'"),
}
DEFAULT = "tensorboard"  # where it is installed


def named(words: str | None) -> tuple[str, ...]:
    """The trackers that "a,b" names; "none" is none, None is TensorBoard where it is installed.

    ConfigError for a name that is none, or one whose package is not installed.
    """
    if words is None:
        return (DEFAULT,) if importlib.util.find_spec(TRACKERS[DEFAULT].needs) else ()
    names = tuple(dict.fromkeys(word.strip() for word in words.split(",")))
    if names == ("none",):
        return ()
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--log {words!r}: {name!r} is no tracker; choose of {', '.join(TRACKERS)}, or none")
        if importlib.util.find_spec(TRACKERS[name].needs) is None:
            raise ConfigError(f"--log {name} needs {TRACKERS[name].needs}: pip install {TRACKERS[name].install}")
    return names


@contextmanager
def tracking(
    names: Sequence[str],
    folder: Path,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
    title: str | None = None,
) -> Iterator[Callable[[Told], None]]:
    """A function that tells each Step to the trackers `names`, which keep their files in `folder`/trackers/<name>.

    settings  of the run by dotted name, written down once
    title     of the run where a tracker shows several; None: the folder's name
    say       hears of a tracker that failed
    """
    opened: dict[str, Tracker] = {}
    failed: set[str] = set()

    def guarded(name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # whatever a tracker, its disk or its network does, training goes on
            failed.add(name)
            what = " ".join(str(error).split())[:200] or type(error).__name__
            say(f"tracker {name} failed and is left out from here on: {what}")

    def one(name: str, step: Told) -> None:
        if name not in opened:
            module = importlib.import_module(f"constellation.trackers.{TRACKERS[name].module}")
            opened[name] = module.begin(folder / FOLDER / name, title or folder.resolve().name, settings)
        opened[name].tell(step)

    def tell(step: Told) -> None:
        for name in names:
            if name not in failed:
                guarded(name, lambda name=name: one(name, step))  # type: ignore[misc]

    status = "failed"
    try:
        yield tell
        status = "done"
    finally:
        for name, tracker in opened.items():
            if name not in failed:
                guarded(name, lambda tracker=tracker: tracker.close(status))  # type: ignore[misc]
