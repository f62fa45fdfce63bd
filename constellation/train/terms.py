"""The terms that a configuration can weigh, train.lambda_*, and what is measured with them.

    lambda_lm      cross_entropy, 1 by default
    lambda_basin   basin: the basin head's divergence (basin.py); needs kernel.basin_head
    lambda_beta    beta_match: (beta - 0.44)^2 of the learned coupling. A run with it says nothing about where beta
                   goes by itself

By default cross-entropy stands alone, and a run is what it is without this file.
"""

from __future__ import annotations

from torch import Tensor

from constellation.errors import ConfigError
from constellation.train.basin import BasinProbe, NextBasin, byte_bins
from constellation.train.job import Job
from constellation.train.objective import CROSS_ENTROPY, Forward, Objective, Term

BETA = 0.44


def beta_match(forward: Forward) -> Tensor:
    """(beta - 0.44)^2, at least 0."""
    return (forward.model.beta - BETA).square()


def objective_of(job: Job, given: Objective | None) -> Objective:
    """What the configuration asks for, or the objective that is given; ConfigError where both say something."""
    t = job.config.train
    asked = {"lambda_lm": t.lambda_lm != 1, "lambda_basin": t.lambda_basin > 0, "lambda_beta": t.lambda_beta > 0}
    if given is not None:
        if said := [name for name, own in asked.items() if own]:
            raise ConfigError(f"train.{said[0]} and fit(objective=...) both say what is minimised: leave one out")
        return given
    terms: dict[str, tuple[Term, float]] = {}
    if t.lambda_basin:
        if job.tokenizer is None:
            raise ConfigError(f"train.lambda_basin={t.lambda_basin}: the job needs its tokenizer, to know bytes")
        terms["basin"] = NextBasin(byte_bins(job.tokenizer)), t.lambda_basin
    if t.lambda_beta:
        terms["beta_match"] = beta_match, t.lambda_beta
    weights = {CROSS_ENTROPY: t.lambda_lm, **{name: weight for name, (_, weight) in terms.items()}}
    return Objective({name: term for name, (term, _) in terms.items()}, weights)


def probes_of(job: Job) -> list[BasinProbe]:
    """The basin head's probe, as often as the run is evaluated."""
    t = job.config.train
    if not t.lambda_basin or job.dev is None or job.tokenizer is None:
        return []
    every = t.eval_every or job.steps
    return [BasinProbe(byte_bins(job.tokenizer), job.dev, job.config.kernel.context, every)]
