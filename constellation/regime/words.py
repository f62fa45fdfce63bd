"""Regime and mood of a measurement by name, as logs and an optimizer's gate have them (optim/gate.py)."""

from __future__ import annotations

from collections.abc import Mapping

from constellation.regime.detector import detect_regime
from constellation.telemetry.curiosity import Mood


def words(measured: Mapping[str, float]) -> dict[str, str]:
    """regime and curiosity_regime, as far as `measured` has phi and mood; a degenerate phi has no regime.

    >>> words({"phi": 0.5, "mood": 4.0}), words({})
    ({'regime': 'geometric', 'curiosity_regime': 'STUCK'}, {})
    """
    found: dict[str, str] = {}
    if "phi" in measured and not measured.get("phi_degenerate"):
        found["regime"] = detect_regime(measured["phi"])[0]
    if "mood" in measured:
        found["curiosity_regime"] = Mood(int(measured["mood"])).name
    return found
