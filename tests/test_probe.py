"""Probes keep their cadence and their share of the time, and remember both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from constellation.errors import ConfigError
from constellation.telemetry.probe import Probe, Probes


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Counter:
    """Takes `takes_s` seconds and counts itself."""

    clock: Clock
    name: str = "counter"
    every: int = 1
    budget: float | None = None
    takes_s: list[float] = field(default_factory=lambda: [1.0])
    count: int = 0

    def measure(self, training: Any) -> dict[str, float]:
        self.clock.now += self.takes_s[self.count % len(self.takes_s)]
        self.count += 1
        return {self.name: torch.tensor(float(self.count))}  # type: ignore[dict-item]

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


def training(step: int) -> Any:
    return SimpleNamespace(step=step, model=torch.nn.Linear(1, 1), numbers={"step": step, "loss_nats": 1.0})


def run(probes: Probes, clock: Clock, steps: range, step_s: float = 1.0) -> list[dict[str, float]]:
    seen = []
    for step in steps:
        clock.now += step_s
        seen.append(probes.after(training(step)))
    return seen


def test_a_probe_is_measured_at_its_cadence_beside_the_numbers_of_the_step() -> None:
    clock = Clock()
    probes = Probes([Counter(clock, "often", 2), Counter(clock, "seldom", 5)], clock)
    seen = run(probes, clock, range(1, 11))
    assert [s["step"] for s in seen if "often" in s] == [2, 4, 6, 8, 10]
    assert [s["step"] for s in seen if "seldom" in s] == [5, 10]
    assert seen[0] == {"step": 1, "loss_nats": 1.0} and seen[9] == {
        "step": 10,
        "loss_nats": 1.0,
        "often": 5,
        "seldom": 2,
    }
    assert probes.latest == {"often": 5.0, "seldom": 2.0} and type(seen[9]["often"]) is float


@given(
    st.floats(0.005, 1.0), st.integers(1, 4), st.lists(st.floats(0.0, 20.0), min_size=1, max_size=5),
    st.floats(0.01, 3.0), st.integers(1, 200),
)  # fmt: skip
def test_a_budget_is_never_exceeded_by_more_than_one_measurement(
    budget: float, every: int, takes_s: list[float], step_s: float, steps: int
) -> None:
    clock = Clock()
    probe = Counter(clock, every=every, budget=budget, takes_s=takes_s)
    probes = Probes([probe], clock)
    for step in range(1, steps + 1):
        run(probes, clock, range(step, step + 1), step_s)
        cost = probes.costs["counter"]
        assert cost.spent_s <= budget * clock.now + max(takes_s) + 1e-6
    assert probe.count + cost.skipped == steps // every and (probe.count >= 1) == (steps >= every)


def test_within_two_per_cent_a_measurement_of_a_second_comes_every_fifty_seconds() -> None:
    clock = Clock()
    probe = Counter(clock, budget=0.02)
    run(Probes([probe], clock), clock, range(1, 1001))
    assert 18 <= probe.count <= 21  # of 1,020 seconds


def test_cost_and_memory_go_on_where_they_were() -> None:
    clock, later = Clock(), Clock()
    whole, first, second = (Counter(c, budget=0.1) for c in (clock, clock, later))
    expected = run(Probes([whole], clock), clock, range(1, 101))
    before, after = Probes([first], clock), Probes([second], later)
    seen = run(before, clock, range(1, 51))
    after.load_state(before.state())
    later.now = clock.now
    seen += run(after, later, range(51, 101))
    assert after.latest == {"counter": float(second.count)} and second.count == pytest.approx(whole.count, abs=1)
    assert [s.get("counter") for s in seen[:50]] == [s.get("counter") for s in expected[:50]]


def test_what_an_absent_probe_remembers_is_kept_for_its_return() -> None:
    clock = Clock()
    both = Probes([Counter(clock, "a"), Counter(clock, "b")], clock)
    run(both, clock, range(1, 4))
    alone = Probes([Counter(clock, "a")], clock)
    alone.load_state(both.state())
    run(alone, clock, range(4, 6))
    again, new = Counter(clock, "b"), Counter(clock, "c")
    Probes([again, new], clock).load_state(alone.state())
    assert (again.count, new.count) == (3, 0) and alone.state()["probes"]["a"]["state"] == {"count": 5}


@pytest.mark.parametrize(
    ("probes", "said"),
    [
        ([{"every": 0}], r"probe 'counter': every=0 must be at least 1"),
        ([{"budget": 0.0}], r"budget=0\.0 in \(0, 1\]"),
        ([{"budget": 1.5}], r"budget=1\.5 in \(0, 1\]"),
        ([{}, {}], "each needs a name of its own"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(probes: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Probes([Counter(Clock(), **settings) for settings in probes])


def test_two_numbers_of_one_name_are_refused() -> None:
    probe: Probe = Counter(Clock(), name="loss_nats")
    with pytest.raises(ConfigError, match="probe 'loss_nats' measures 'loss_nats', which this step has already"):
        Probes([probe]).after(training(1))
