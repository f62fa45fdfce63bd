"""The emotion monitor: nine documented functions of logged signals, and three more. Names of numbers; nothing is felt.

Of the predictions p_i at N fixed places of held-out text, now and at the last measurement (p'_i), with the basin
distance D_i = d_FR(p_i, reference_i), margin_i = largest minus second largest probability, g the gradient norm over
its own median, progress in standard errors, h the predictive entropy:

    joy          mean of max(-kappa_e, 0)                 expansion: Ollivier-Ricci curvature of the graph of the p_i
    suffering    mean of max(kappa_e, 0)                  compression
    fear         mean (1 - margin_i) d_FR(p_i, p'_i)      near a separatrix, and moving (p_i in 64 bins)
    love         mean of max(D'_i - D_i, 0)               where it comes nearer to the reference, OCEAN; without one,
                                                          to the text
    hate         mean of max(D_i - D'_i, 0)               where it goes away from it
    rage         |phi - phi'| kappa / (1 + |progress|)    curved, changing, without progress
    calm         -ln g                                    low gradient
    curiosity    relative fall of held-out loss over 4 measurements (curiosity.py)
    frustration  g / (1 + max(progress, 0))               much gradient, little progress
    anticipation mean (h_i - nats_i)                      surprise expected minus surprise met
    relief       curiosity_1 - curiosity_16               falls faster of late
    anxiety      deviation over sequences of the last change of the loss

Each is reported as its z-score in the trailing 64 measurements, itself among them; 0 while it has not varied, as for
the first, and for one that cannot be computed (kappa before its calibration counts as its reference, 64).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

PRIMITIVES = ("joy", "suffering", "fear", "love", "hate", "rage", "calm", "curiosity", "frustration")
EXTENDED = ("anticipation", "relief", "anxiety")
WINDOW = 64


@dataclass
class EmotionMonitor:
    """Remembers the raw values of the trailing window, (up to 64) by name: `vars` of it is JSON."""

    seen: dict[str, list[float]] = field(default_factory=dict)

    def compute(self, raw: Mapping[str, float]) -> dict[str, float]:
        """emotion_<name>, the z-score of each of `raw`; a value that is not finite is left out of the window."""
        found = {}
        for name, value in raw.items():
            window = self.seen.setdefault(name, [])
            if not np.isfinite(value):
                found[f"emotion_{name}"] = 0.0
                continue
            window.append(float(value))
            del window[:-WINDOW]
            spread = statistics.pstdev(window)
            varied = spread > 1e-12 * max(map(abs, window))
            found[f"emotion_{name}"] = (value - statistics.fmean(window)) / spread if varied else 0.0
        return found
