"""constellation: small language models trained by natural gradients and routed by Fisher-Rao geometry.

    import constellation

    for step in constellation.train("texts/", "runs/first", preset="tiny"):
        print(step.role, step.step, step.loss_nats)
    with constellation.open("runs/first") as run:
        print(run.generate("The import statement").text)

Nothing is imported before it is used: `import constellation` alone loads neither torch nor numpy nor Ray.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from constellation.api import Constellation, Stream, load_kernel, open, train
    from constellation.config import Config
    from constellation.errors import ConstellationError
    from constellation.presets import preset
    from constellation.telemetry.step import Step
    from router.answer.query import Answer, Piece
    from router.decide.policy import RouteChoice

__version__ = "0.1.0"

_HOME = {
    "Answer": "router.answer.query", "RouteChoice": "router.decide.policy", "Config": "constellation.config",
    "Constellation": "constellation.api", "ConstellationError": "constellation.errors",
    "Piece": "router.answer.query", "Step": "constellation.telemetry.step", "Stream": "constellation.api",
    "load_kernel": "constellation.api", "open": "constellation.api", "preset": "constellation.presets",
    "train": "constellation.api",
}  # fmt: skip
__all__ = [
    "Answer",
    "Config",
    "Constellation",
    "ConstellationError",
    "Piece",
    "RouteChoice",
    "Step",
    "Stream",
    "__version__",
    "load_kernel",
    "open",
    "preset",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'constellation' has no attribute {name!r}; there is {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__]


class _Package(ModuleType):
    """`constellation.train` is the function, also once a module of the folder `train` was imported.

    Python then sets the folder as an attribute of this package; `from constellation.train.loop import fit` does not
    ask for it.
    """

    @property
    def train(self) -> Any:
        return __getattr__("train")

    @train.setter
    def train(self, folder: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
