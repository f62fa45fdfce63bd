"""RateGovernor: a factor on the learning rate, raised slowly while the loss is calm and halved when it is not.

    grounding    the first steps: factor from start to 1, linearly
    grow         x growth every step, up to `most`, while nothing speaks against it
    cut          x shrink, then `patience` steps of rest, when
                   spike     the loss stands more than `spike` standard deviations above its running mean
                   coupling  a number that shall stay in a window, such as I(X;K), is outside it
                   plateau   the running mean has not fallen by `progress` deviations in `plateau` steps
    recovery     growth as before, up to a ceiling below the rate that failed, which rises PROBING times slower; what
                 a plateau has cut stays cut
    cap          x cap / ratio, at once, when the step moved a tensor by more than `cap` of its norm

Additive patience and multiplicative decrease, as in congestion control (Chiu & Jain 1989); the signal is the task's own
loss without any weight that a controller sets, and enters as differences over its own deviation alone: adding a
constant to the loss, or a lambda-weighted term to what is minimised, changes no rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from constellation.errors import ConfigError

FAST, SLOW = 0.9, 0.98  # memories of the means of the loss and of its squared differences
PROBING = 20.0


@dataclass
class RateGovernor:
    """Of anybody's loop: `observe(seen)` after a step, `rate(step, scheduled)` before the next."""

    signal: str = "loss_nats"  # name of the task's loss among what is seen
    growth: float = 1.02
    shrink: float = 0.5
    start: float = 0.1
    grounding: int = 0  # steps
    least: float = 1e-3
    most: float = 1.0  # of the schedule's rate
    spike: float = 4.0  # standard deviations
    patience: int = 20  # steps
    plateau: int = 0  # steps without progress; 0: no such rule
    progress: float = 0.1  # standard deviations
    cap: float = 0.0  # largest |d theta| / |theta| of a step, seen as update_ratio; 0: none
    window: tuple[str, float, float] | None = None  # name, low, high
    memory: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sound = self.growth >= 1 > self.shrink > 0 and 0 < self.least <= self.start <= self.most and self.spike > 0
        if not sound or (self.window is not None and not self.window[1] <= self.window[2]):
            raise ConfigError(
                f"RateGovernor: growth={self.growth} from 1 on, shrink={self.shrink} in (0, 1), 0 < least={self.least} "
                f"<= start={self.start} <= most={self.most}, spike={self.spike} above 0, window={self.window} in order"
            )
        first = self.start if self.grounding else min(1.0, self.most)
        fresh = {"factor": first, "seen": 0, "rest": 0, "mean": None, "spread": None, "last": None, "best": None,
                 "stale": 0, "cuts": 0, "why": "", "ceiling": self.most, "top": self.most}  # fmt: skip
        self.memory = {**fresh, **self.memory}

    @property
    def factor(self) -> float:
        """What the scheduled rate is multiplied with, [least, most]."""
        return float(self.memory["factor"])

    def rate(self, step: int, scheduled: float) -> float:
        return scheduled * self.factor

    def observe(self, seen: Mapping[str, float]) -> None:
        """What a step showed; ConfigError when the signal is not among it."""
        if self.signal not in seen:
            raise ConfigError(f"RateGovernor: {self.signal!r} is not seen; there are {', '.join(sorted(seen))}")
        m, loss = self.memory, float(seen[self.signal])
        m["seen"] += 1
        reason = self._judged(loss)
        if m["seen"] <= self.grounding:
            m["factor"] = min(self.most, self.start + (1 - self.start) * m["seen"] / self.grounding)
            reason = ""
        elif self.window is not None and self.window[0] in seen:
            name, low, high = self.window
            reason = reason or ("" if low <= seen[name] <= high else f"coupling: {name}={seen[name]:.4g}")
        if reason and m["rest"] == 0:
            self._cut(reason)
        elif not reason and m["seen"] > self.grounding and m["rest"] == 0:
            m["factor"] *= self.growth
            m["ceiling"] *= 1 + (self.growth - 1) / PROBING
        m["rest"] = max(0, m["rest"] - 1)
        m["ceiling"] = min(m["ceiling"], m["top"])
        m["factor"] = min(m["factor"], m["ceiling"])
        if self.cap and (ratio := seen.get("update_ratio", 0.0)) > self.cap:
            m["factor"] *= self.cap / ratio
        m["factor"] = max(self.least, m["factor"])

    def _cut(self, reason: str) -> None:
        m = self.memory
        if reason == "plateau":
            m["top"] = max(self.least, m["factor"] * self.shrink)
        else:
            m["ceiling"] = m["factor"] * math.sqrt(self.shrink)
        m |= {"factor": m["factor"] * self.shrink, "rest": self.patience, "cuts": m["cuts"] + 1, "why": reason,
              "stale": 0}  # fmt: skip

    def _judged(self, loss: float) -> str:
        """Why the rate is to be cut, "" where nothing speaks against it; keeps the running numbers."""
        m = self.memory
        if not math.isfinite(loss):
            return f"spike: the loss is {loss}"
        if m["last"] is None:
            m |= {"last": loss, "mean": loss, "spread": 0.0, "best": loss}
            return ""
        deviation, calm = math.sqrt(m["spread"]), m["seen"] > 10
        spike = calm and loss - m["mean"] > self.spike * max(deviation, 1e-12)
        change = (loss - m["last"]) ** 2 / 2  # of independent noise the variance; of a trend next to nothing
        bounded = min(change, (self.spike**2) * m["spread"]) if spike else change
        warm = min(SLOW, 1 - 1 / m["seen"])
        m["spread"] = warm * m["spread"] + (1 - warm) * bounded
        m["last"] = loss
        m["mean"] = FAST * m["mean"] + (1 - FAST) * (m["mean"] + self.spike * deviation if spike else loss)
        if m["mean"] < m["best"] - self.progress * deviation:
            m |= {"best": m["mean"], "stale": 0}
        else:
            m["stale"] += 1
        if spike:
            return f"spike: {loss:.4g} beside {m['mean']:.4g}"
        return "plateau" if self.plateau and m["stale"] >= self.plateau else ""

    def state(self) -> dict[str, Any]:
        return dict(self.memory)

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.memory = dict(state)
