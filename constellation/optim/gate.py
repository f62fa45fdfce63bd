"""The gate: whether this step is worth a natural step. Pure functions of what was measured; no torch.

Open when ANY trigger fires (kappa, phi, ... are `telemetry`'s; an absent one fires nothing):

    forced       step is a multiple of force_ng_every_n_steps
    kappa        kappa_eff > min_kappa_for_ng
    far          basin_distance > min_basin_distance
    exploration  curiosity_regime EXPLORATION            (exploration_triggers_ng)
    geometric    regime geometric, phi > 0.7, kappa > 30 (geometric_triggers_ng)
    stuck        curiosity_regime STUCK                  (stuck_triggers_ng)
    curious      curiosity > min_curiosity with kappa > 25 or distance > 0.4   (use_curiosity)
    stale        staleness_rad > max_staleness           (the optimizer's own measurement)

and nothing vetoes it:

    model        reduction_ratio < min_reduction_ratio   the quadratic model mispredicts; not over forced
    price        natural_s_per_nat > cheap_s_per_nat     (must_pay); not over forced
    budget       overhead_after > max_overhead           over everything: the budget is hard

The original design's rules are the first seven; the others are intrinsic, measured by AdaptiveMixedQIG itself
(reduction ratio and prices as in the trust-region tests of More 1978).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from constellation.optim.registry import AdaptiveConfig, phase_settings

__all__ = ["AdaptiveConfig", "GateDecision", "get_recommended_config_for_phase", "should_apply_ng"]

GEOMETRIC_PHI, GEOMETRIC_KAPPA = 0.7, 30.0  # the original design's constants
CURIOUS_KAPPA, CURIOUS_DISTANCE = 25.0, 0.4


@dataclass(frozen=True)
class GateDecision:
    """Whether to take a natural step, and every reason as "rule: what was measured".

    Usable as the flag of the original design's loop: `loss.backward(create_graph=decision)`.
    """

    apply: bool
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.apply

    def __index__(self) -> int:  # what torch's C++ flags ask for
        return int(self.apply)


def get_recommended_config_for_phase(phase: str) -> AdaptiveConfig:
    """The gate of a training phase: early, middle (the default), late or fine_tune."""
    return AdaptiveConfig(**phase_settings(phase))


def should_apply_ng(telemetry: Mapping[str, Any], step: int, config: AdaptiveConfig) -> GateDecision:
    """The rules above. A number that is absent or NaN fires nothing; names are compared without case."""

    def number(name: str, absent: float) -> float:
        value = telemetry.get(name)
        return absent if value is None else float(value)

    low = float("-inf")
    kappa, distance = number("kappa_eff", low), number("basin_distance", low)
    phi, curiosity, staleness = number("phi", low), number("curiosity", low), number("staleness_rad", low)
    regime, mood = (str(telemetry.get(name)).lower() for name in ("regime", "curiosity_regime"))
    every = config.force_ng_every_n_steps
    forced = every > 0 and step % every == 0

    triggers = (
        (forced, f"forced: step {step} is a multiple of {every}"),
        (kappa > config.min_kappa_for_ng, f"kappa: {kappa:.4g} > {config.min_kappa_for_ng:g}"),
        (distance > config.min_basin_distance, f"far: {distance:.4g} rad > {config.min_basin_distance:g}"),
        (config.exploration_triggers_ng and mood == "exploration", "exploration: curiosity regime EXPLORATION"),
        (
            config.geometric_triggers_ng and regime == "geometric" and phi > GEOMETRIC_PHI and kappa > GEOMETRIC_KAPPA,
            f"geometric: phi {phi:.4g} > {GEOMETRIC_PHI}, kappa {kappa:.4g} > {GEOMETRIC_KAPPA:g}",
        ),
        (config.stuck_triggers_ng and mood == "stuck", "stuck: curiosity regime STUCK"),
        (
            config.use_curiosity
            and curiosity > config.min_curiosity
            and (kappa > CURIOUS_KAPPA or distance > CURIOUS_DISTANCE),
            f"curious: {curiosity:.4g} > {config.min_curiosity:g} with kappa {kappa:.4g} or distance {distance:.4g}",
        ),
        (
            config.max_staleness > 0 and staleness > config.max_staleness,
            f"stale: {staleness:.4g} rad > {config.max_staleness:g}",
        ),
    )
    ratio = number("reduction_ratio", float("inf"))
    natural, cheap = number("natural_s_per_nat", 0.0), number("cheap_s_per_nat", float("inf"))
    overhead = number("overhead_after", 0.0)
    vetoes = (
        (
            not forced and ratio < config.min_reduction_ratio,
            f"model: actual / predicted reduction {ratio:.4g} < {config.min_reduction_ratio:g}",
        ),
        (
            not forced and config.must_pay and natural > cheap,
            f"price: {natural:.4g} s per nat, cheap steps {cheap:.4g}",
        ),
        (
            config.max_overhead > 0 and overhead > config.max_overhead,
            f"budget: overhead would be {overhead:.4g} > {config.max_overhead:g}",
        ),
    )
    opened = tuple(reason for fires, reason in triggers if fires)
    closed = tuple(reason for fires, reason in vetoes if fires) if opened else ()
    return GateDecision(bool(opened) and not closed, opened + closed)
