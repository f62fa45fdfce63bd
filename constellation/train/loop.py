"""fit(job): train one model as a generator of Steps.

    for step in fit(job): ...

serves the command line, Ray actors and sweeps without callbacks. A job is plain data; everything it
did so far lies in its folder, so `fit` of the same job goes on from the newest checkpoint, to the
same bits on a CPU as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from constellation.control.governor import RateGovernor
from constellation.regime.protocol import Advice, Recovery, Regime
from constellation.telemetry.probe import Probe, Probes
from constellation.telemetry.step import Step
from constellation.train import checkpoint
from constellation.train.clipping import clipping_of
from constellation.train.job import Job, Source
from constellation.train.measuring import telemetry_of
from constellation.train.objective import Objective
from constellation.train.parts import Parts
from constellation.train.recording import Records
from constellation.train.repair import Repair
from constellation.train.schedule import Governor
from constellation.train.state import TrainState
from constellation.train.terms import probes_of


def fit(
    job: Job,
    source: Source | None = None,
    say: checkpoint.Say = checkpoint.warn,
    *,
    objective: Objective | None = None,
    probes: Sequence[Probe] = (),
    regime: Regime | None = None,
    recovery: Recovery | None = None,
    governor: Governor | None = None,
) -> Iterator[Step]:
    """Train until `job.steps`, yielding a Step after each optimizer step; resumes by itself.

    source      of batches; None: the job's token ranges
    say         hears of a damaged checkpoint
    objective   what is minimised (objective.py); None: what the configuration weighs (terms.py), cross-entropy alone
    probes      what is measured on the way (telemetry/probe.py)
    regime      judges every step (regime/protocol.py); its advice is in the Step
    recovery    acts on advice, also on a step that failed
    governor    corrects the learning rate (schedule.py); None: what control.rate says, by default nobody

    The last three are the configuration's own where regime.enabled (repair.py), probes too where telemetry.enabled.
    What the parts remember is in the checkpoint, so a run that is resumed is to be given them again. RunError when
    loss or gradient are not finite and no recovery helps.
    """
    c = job.config.control
    if governor is None and c.rate == "governor":
        governor = RateGovernor(
            growth=c.growth, shrink=c.shrink, spike=c.spike, patience=c.patience, plateau=c.plateau
        )  # fmt: skip
    records = Records(job.config.record, job.folder)
    measured = Probes([*records.probes, *probes, *probes_of(job), *telemetry_of(job)])
    repair = Repair.of(job, regime, recovery, governor)
    parts = Parts(objective, measured, **vars(repair), clipping=clipping_of(job.config.train.clip_kind))
    state = TrainState(job, source, say, parts, records)
    for step in state.remaining():
        batch = repair.share(state.batch_at(step))
        if len(batch[0]):
            state.apply(state.losses(batch))
        else:
            state.rest()
        seen = measured.after(state)
        advice = repair.regime.judge(seen) if repair.regime else Advice.GO_ON
        if advice and repair.recovery:
            repair.recovery.act(state, advice)
        yield state.record(seen, advice)
