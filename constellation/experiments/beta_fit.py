"""How a quantity y grows with the context length L: two laws, fitted to the mean over documents, and their bootstrap.

    running   y = a (1 + beta ln(L / L_ref))     least squares in ln L; what `inverse_temperature` computes
    power     y = a (L / L_ref)^beta             least squares of ln y in ln L

beta of the running law depends on L_ref: with the slope b = a beta it is beta' = b / (a + b ln(L'_ref / L_ref)) under
another, so an s ln L, which has no L_ref, is 1 / ln L_ref, .43 at L_ref = 10. That law is fitted too, apart:

    s         y = s ln L                         least squares through the origin

Intervals are 95 % of `RESAMPLES` draws of documents; std_error is their deviation. R_squared, p_value (slope 0, t with
n - 2 degrees of freedom) and AIC = n ln(RSS / n) + 2 k are of the means. A law that cannot be fitted (y = 0 everywhere,
an intercept that is not positive) has None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray

RESAMPLES = 2000
Array = NDArray[np.float64]


def fits(y_DL: Array, lengths: Sequence[int], ref: int, others: Sequence[int] = (), seed: int = 0) -> dict[str, Any]:
    """Both laws and s of D documents at the lengths L; `others` are further L_ref."""
    documents = len(y_DL)
    drawn = np.random.default_rng(seed).integers(documents, size=(RESAMPLES, documents))
    means_RL = y_DL[drawn].mean(1)
    mean_L, log_L = y_DL.mean(0), np.log(np.asarray(lengths, np.float64))
    x_L = log_L - math.log(ref)
    a, b = line(mean_L[None], x_L)
    running: dict[str, Any] = law(mean_L, a + b * x_L, x_L, mean_L, 2)
    running |= spread("value", *ratio(a, b), *ratio(*line(means_RL, x_L)))
    running["under_other_L_ref"] = {str(o): number(ratio(a + b * math.log(o / ref), b)[0]) for o in others}
    with np.errstate(divide="ignore", invalid="ignore"):
        log_a, beta = line(np.log(mean_L)[None], x_L)
        power: dict[str, Any] = law(mean_L, np.exp(log_a + beta * x_L), x_L, np.log(mean_L), 2)
        power |= spread("value", *beta, *line(np.log(means_RL), x_L)[1])
    s_R = means_RL @ log_L / (log_L @ log_L)
    s = float(mean_L @ log_L / (log_L @ log_L))
    origin = law(mean_L, s * log_L, log_L, mean_L, 1) | spread("value", s, *s_R)
    return {"L_ref": ref, "running": running, "power": power, "s_ln_L": origin}


def line(y_RL: Array, x_L: Array) -> tuple[Array, Array]:
    """Intercepts and slopes (R,) of least squares."""
    centred = x_L - x_L.mean()
    slope = (y_RL - y_RL.mean(1, keepdims=True)) @ centred / (centred @ centred)
    return y_RL.mean(1) - slope * x_L.mean(), slope


def ratio(a: Array, b: Array) -> Array:
    """b / a, NaN where a is not positive."""
    return np.where(a > 0, b / np.where(a > 0, a, 1.0), np.nan)


def law(y_L: Array, fitted: Array, x_L: Array, straight_L: Array, parameters: int) -> dict[str, Any]:
    """What is said of a fit; `straight_L` is what lies on a line in x."""
    left, n = float(np.square(y_L - np.ravel(fitted)).sum()), len(y_L)
    total = float(np.square(y_L - y_L.mean()).sum())
    flat = not np.isfinite(straight_L).all() or np.ptp(straight_L) == 0
    return {
        "R_squared": number(1 - left / total if total else math.nan),
        "p_value": None if flat or n < 3 else number(scipy.stats.linregress(x_L, straight_L).pvalue),
        "AIC": number(n * math.log(left / n) + 2 * parameters if left else math.nan),
    }


def spread(name: str, value: float, *drawn: float) -> dict[str, Any]:
    """The value with its standard error and interval; None where a draw has none."""
    whole = bool(np.isfinite([value, *drawn]).all())
    low, high = np.quantile(drawn, [0.025, 0.975]) if whole else (math.nan, math.nan)
    return {
        name: number(value), "std_error": number(np.std(drawn)) if whole else None,
        "interval": [number(low), number(high)] if whole else None,
    }  # fmt: skip


def number(value: Any) -> float | None:
    """As JSON has it."""
    found = float(np.ravel(value)[0])
    return found if math.isfinite(found) else None
