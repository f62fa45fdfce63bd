"""The gate's rules one by one, its phase table, and that a budget closes over everything."""

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from constellation.errors import ConfigError
from constellation.optim.gate import AdaptiveConfig, GateDecision, get_recommended_config_for_phase, should_apply_ng
from constellation.optim.registry import PhaseSchedule

MIDDLE = AdaptiveConfig()
NEVER = AdaptiveConfig(math.inf, math.inf, 0, False, False, False, False)
TABLE = {  # min_kappa, min_basin_distance, force every, exploration, geometric, stuck, use_curiosity, min
    "early": (30, 0.4, 20, True, True, True, True, 0.03),
    "middle": (40, 0.6, 50, True, True, True, True, 0.05),
    "late": (50, 0.8, 100, True, False, True, True, 0.08),
    "fine_tune": (60, 1.0, 200, False, False, True, False, 0.10),
}


def rules(decision: GateDecision) -> list[str]:
    return [reason.split(":")[0] for reason in decision.reasons]


@pytest.mark.parametrize("phase", TABLE)
def test_the_phase_table(phase: str) -> None:
    config = get_recommended_config_for_phase(phase)
    assert dataclasses.astuple(config)[:8] == TABLE[phase]
    assert dataclasses.astuple(config)[8:] == dataclasses.astuple(MIDDLE)[8:]


def test_of_the_scheduled_phases_that_have_begun_the_last_is_in_force() -> None:
    schedule = PhaseSchedule(middle=0.25, late=0.5, fine_tune=1.0, late_gate="never")
    seen = [schedule.at(progress) for progress in (0.0, 0.2499, 0.25, 0.5, 0.9, 1.0)]
    assert seen == ["early", "early", "middle", "never", "never", "fine_tune"]
    assert PhaseSchedule(middle=0.8, late=0.3).at(0.85) == "late", "middle, which begins after late, is left out"


def test_the_controls_never_and_always() -> None:
    told = {"kappa_eff": 1e9, "basin_distance": 3.0, "curiosity": 9.0, "curiosity_regime": "STUCK", "phi": 1.0}
    never = get_recommended_config_for_phase("never")
    assert not any(should_apply_ng({**told, "regime": "geometric"}, step, never) for step in range(100))
    always = dataclasses.replace(get_recommended_config_for_phase("always"), max_overhead=0.0)
    assert all(should_apply_ng({}, step, always) for step in range(100))


def test_middle_is_the_default_and_an_unknown_phase_names_the_choices() -> None:
    assert get_recommended_config_for_phase("middle") == MIDDLE
    with pytest.raises(ConfigError, match=r"'dawn'.*early, middle, late, fine_tune"):
        get_recommended_config_for_phase("dawn")


@pytest.mark.parametrize(
    ("telemetry", "fires"),
    [
        ({}, []),
        ({"kappa_eff": 40.0}, []),
        ({"kappa_eff": 40.1}, ["kappa"]),
        ({"basin_distance": 0.6}, []),
        ({"basin_distance": 0.61}, ["far"]),
        ({"curiosity_regime": "EXPLORATION"}, ["exploration"]),
        ({"curiosity_regime": "exploitation"}, []),
        ({"curiosity_regime": "STUCK"}, ["stuck"]),
        ({"regime": "geometric", "phi": 0.8, "kappa_eff": 31.0}, ["geometric"]),
        ({"regime": "geometric", "phi": 0.7, "kappa_eff": 31.0}, []),
        ({"regime": "geometric", "phi": 0.8, "kappa_eff": 30.0}, []),
        ({"regime": "linear", "phi": 0.8, "kappa_eff": 31.0}, []),
        ({"curiosity": 0.06, "kappa_eff": 26.0}, ["curious"]),
        ({"curiosity": 0.06, "basin_distance": 0.41}, ["curious"]),
        ({"curiosity": 0.06}, []),
        ({"curiosity": 0.05, "kappa_eff": 26.0}, []),
        ({"kappa_eff": math.nan, "basin_distance": None, "curiosity": math.nan}, []),
        ({"kappa_eff": 99, "basin_distance": 9, "curiosity_regime": "Stuck"}, ["kappa", "far", "stuck"]),
    ],
)
def test_each_rule_of_the_seeds_fires_on_its_own(telemetry: dict[str, Any], fires: list[str]) -> None:
    decision = should_apply_ng(telemetry, 1, MIDDLE)
    assert rules(decision) == fires and decision.apply == bool(fires)


@pytest.mark.parametrize(
    ("telemetry", "switch"),
    [
        ({"curiosity_regime": "EXPLORATION"}, "exploration_triggers_ng"),
        ({"regime": "geometric", "phi": 0.8, "kappa_eff": 31.0}, "geometric_triggers_ng"),
        ({"curiosity_regime": "STUCK"}, "stuck_triggers_ng"),
        ({"curiosity": 0.06, "kappa_eff": 26.0}, "use_curiosity"),
    ],
)
def test_each_switch_turns_its_rule_off(telemetry: dict[str, Any], switch: str) -> None:
    assert should_apply_ng(telemetry, 1, MIDDLE)
    assert not should_apply_ng(telemetry, 1, dataclasses.replace(MIDDLE, **{switch: False}))


def test_forced_steps_are_the_multiples_and_zero_means_never() -> None:
    assert [s for s in range(151) if should_apply_ng({}, s, MIDDLE)] == [0, 50, 100, 150]
    assert not any(should_apply_ng({}, s, dataclasses.replace(MIDDLE, force_ng_every_n_steps=0)) for s in range(60))


@pytest.mark.parametrize(
    ("telemetry", "config", "rule"),
    [
        ({"reduction_ratio": 0.1}, {"min_reduction_ratio": 0.2}, "model"),
        ({"natural_s_per_nat": 2.0, "cheap_s_per_nat": 1.0}, {"must_pay": True}, "price"),
    ],
)
def test_a_poor_model_or_price_closes_what_telemetry_opened_but_not_a_forced_step(
    telemetry: dict[str, Any], config: dict[str, Any], rule: str
) -> None:
    gate = dataclasses.replace(MIDDLE, **config)
    decision = should_apply_ng({"kappa_eff": 50, **telemetry}, 1, gate)
    assert rules(decision) == ["kappa", rule] and not decision
    assert should_apply_ng({"kappa_eff": 50, **telemetry}, 50, gate)
    assert should_apply_ng({"kappa_eff": 50, **telemetry}, 1, MIDDLE)  # off by default


def test_a_stale_direction_opens_where_it_is_measured() -> None:
    gate = dataclasses.replace(NEVER, max_staleness=0.5)
    assert rules(should_apply_ng({"staleness_rad": 0.6}, 1, gate)) == ["stale"]
    assert not should_apply_ng({"staleness_rad": 0.4}, 1, gate) and not should_apply_ng({"staleness_rad": 9}, 1, NEVER)


numbers = st.floats(0, 100) | st.just(math.nan)
anything = st.fixed_dictionaries({}, optional={
    "kappa_eff": numbers, "basin_distance": numbers, "phi": numbers, "curiosity": numbers, "staleness_rad": numbers,
    "reduction_ratio": numbers, "natural_s_per_nat": numbers, "cheap_s_per_nat": numbers,
    "regime": st.sampled_from(["linear", "geometric"]), "curiosity_regime": st.sampled_from(["STUCK", "EXPLORATION"]),
})  # fmt: skip


@given(anything, st.integers(0, 1000))
def test_the_budget_closes_over_everything_and_zero_is_no_budget(telemetry: dict[str, Any], step: int) -> None:
    over = {**telemetry, "overhead_after": 1.31}
    decision = should_apply_ng(over, step, MIDDLE)
    assert not decision
    assert (rules(decision)[-1:] == ["budget"]) == bool(should_apply_ng(over, step, MIDDLE).reasons)
    unlimited = dataclasses.replace(MIDDLE, max_overhead=0.0)
    assert should_apply_ng(over, step, unlimited).apply == should_apply_ng(telemetry, step, MIDDLE).apply


@given(anything, st.integers(0, 1000))
def test_a_gate_that_never_opens_never_opens(telemetry: dict[str, Any], step: int) -> None:
    assert should_apply_ng(telemetry, step, NEVER) == GateDecision(False)


def test_a_decision_is_the_flag_of_backward() -> None:
    x = torch.ones(1, requires_grad=True)
    loss = (x**2).sum()
    loss.backward(retain_graph=should_apply_ng({}, 0, MIDDLE))
    loss.backward()  # the graph was kept
    assert x.grad is not None and float(x.grad) == 4.0


@pytest.mark.parametrize("bad", [{"min_kappa_for_ng": -1}, {"max_overhead": 0.5}, {"min_curiosity": math.nan}])
def test_impossible_settings_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        AdaptiveConfig(**bad)


def test_the_gate_needs_no_torch() -> None:
    code = "import sys; from constellation.optim import gate, AdaptiveConfig; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
