"""One of each part that may be added to a run, as small as it can be and still remember something."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from constellation.regime.protocol import Advice, Recoverable
from constellation.telemetry.training import Training
from constellation.train.objective import Forward, Objective


class Remembering:
    """Remembers all its fields but those in `settings`."""

    settings: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.settings}

    def load_state(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


@dataclass
class Norm(Remembering):
    """The norm of all weights, and how far it is from the one before. It leaves gradients and draws numbers."""

    settings = ("name", "every", "budget")
    name: str = "norm"
    every: int = 3
    budget: float | None = None
    before: list[float] = field(default_factory=list)

    def measure(self, training: Training) -> dict[str, float]:
        norm = torch.stack([p.norm() for p in training.model.parameters()]).norm()
        norm.backward()  # type: ignore[no-untyped-call]
        assert training.batch[0].shape == training.batch[1].shape and float(torch.rand(()))
        self.before.append(float(norm.detach()))
        return {"norm": self.before[-1], "norm_moved": self.before[-1] - self.before[max(0, len(self.before) - 2)]}


@dataclass
class EveryFifth(Remembering):
    """Asks for help at every fifth step, and at one that failed."""

    judged: int = 0
    norms: list[float] = field(default_factory=list)

    def judge(self, seen: Mapping[str, float]) -> Advice:
        assert {"step", "loss_nats", "grad_norm", "lr"} <= set(seen)
        self.judged += 1
        self.norms += [seen["norm"]] if "norm" in seen else []
        failed = not seen["grad_norm"] < float("inf")
        return Advice.RECOVER if failed or self.judged % 5 == 0 else Advice.GO_ON


@dataclass
class Ladder(Remembering):
    """Tries noise that ruins the model, then noise that does not; keeps what costs less than a tenth of a bit."""

    settings = ("say",)
    say: Callable[[str], None] = lambda text: None
    kept: int = 0
    rolled_back: int = 0

    def act(self, training: Recoverable, advice: Advice) -> None:
        self.say(f"acting at {training.step}")
        before, bits = training.snapshot(), training.evaluate()
        assert advice is Advice.RECOVER and bits is not None
        for noise in (1.0, 1e-4):
            with torch.no_grad():
                for p in training.model.parameters():
                    p.add_(noise * torch.randn_like(p))
            found = training.evaluate()
            if found is not None and found < bits + 0.1:
                self.kept += 1
                return
            self.rolled_back += 1
            training.roll_back(before)


@dataclass
class Brake(Remembering):
    """The rate falls with the loss."""

    first: float | None = None
    last: float = 1.0

    def observe(self, seen: Mapping[str, float]) -> None:
        self.last = seen["loss_nats"]
        self.first = self.first or self.last

    def rate(self, step: int, scheduled: float) -> float:
        return scheduled * (self.last / self.first if self.first else 1.0)


def spread(forward: Forward) -> torch.Tensor:
    """Mean square of the hidden states, 0 or more."""
    return forward.hidden_BTD.square().mean()


def every_part(say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Keywords of fit."""
    return {
        "objective": Objective({"spread": spread}, {"spread": 0.01}), "probes": [Norm()], "regime": EveryFifth(),
        "recovery": Ladder(say), "governor": Brake(),
    }  # fmt: skip
