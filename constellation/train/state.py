"""TrainState: a run under way, everything that a checkpoint holds and what one step does to it.

    open       model and optimizer: new, branched from another run's checkpoint, or resumed from one's own
    remaining  the steps to go
    apply      clip, learning rate, optimizer step
    record     trace, evaluation, checkpoint, Step

A resumed run goes on as if it had never stopped: batches are a pure function of (seed, step), and weights, optimizer,
generator, history and what the added parts remember are in the checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from constellation import optim, processor
from constellation.artifacts import segments
from constellation.artifacts.run import THETA_UP_TO, RunFolder, Trace
from constellation.artifacts.saved import open_run
from constellation.artifacts.signal import write_signals
from constellation.data.batches import Batches
from constellation.data.cache import open_cache
from constellation.errors import ConfigError, RunError
from constellation.kernel.model import KernelLM
from constellation.optim.natural import wants
from constellation.regime.protocol import Advice, Saved
from constellation.regime.words import words
from constellation.telemetry.step import NUMBERS, Step
from constellation.train import checkpoint, score
from constellation.train.clipping import clipped
from constellation.train.job import Job, Source, device
from constellation.train.objective import CROSS_ENTROPY
from constellation.train.parts import Parts
from constellation.train.recording import Records
from constellation.train.sample import sample_text
from constellation.train.schedule import Schedule
from constellation.train.summary import converged, describe, optimizer_stats
from constellation.train.terms import objective_of

CURVATURE_PART = 8  # an optimizer that sees curvature sees it in one sequence of so many
TOLD = ("logits", "targets", "telemetry")  # what an optimizer's step may want to be told


class TrainState:
    """`batch` and `numbers` are of the last step, `step` counts steps done."""

    batch: tuple[Tensor, Tensor]
    numbers: dict[str, float]
    failure: str | None = None
    tokens = 0  # that were trained on

    def __init__(self, job: Job, source: Source | None, say: checkpoint.Say, parts: Parts, records: Records):
        t = job.config.train
        torch.set_num_threads(job.threads)
        processor.keep_memory()
        self.job, self.steps, self.device = job, job.steps, device()
        self.source = batches_of(job) if source is None else source
        self.dev = None if job.dev is None else open_cache(job.dev)
        self.objective, self.parts, self.records = objective_of(job, parts.objective), parts, records
        self.model = KernelLM(job.config.kernel, seed=t.seed).to(self.device)
        self.model.embedding.weight.requires_grad_(not job.config.pretrained.embeddings)
        self.optimizer = optim.build(job.config.optim, self.model)
        self.schedule = Schedule.of(job)
        self._rates = [group["lr"] / job.config.optim.lr for group in self.optimizer.param_groups]  # relative
        self._wants = wants(self.optimizer, TOLD)
        self._autocast: AbstractContextManager[Any] = (
            torch.autocast(self.device.type, torch.bfloat16) if t.precision == "bf16" else nullcontext()
        )
        self._traced = list(self.model.parameters()) if self.model.num_parameters() <= THETA_UP_TO else None
        self._theta: np.ndarray | None = None  # before the last step
        self._tokens = 0  # likewise
        self._best, self._paused = math.inf, False
        self._logged: list[Step] = []
        self.folder = RunFolder(job.folder)
        layout = [{"name": n, "shape": list(p.shape), "dtype": str(p.dtype)} for n, p in self.model.named_parameters()]
        self.folder.begin(job.config, job.role, layout, {"steps": job.steps, "parameters": self.model.num_parameters()})
        self.step, self.trace = self._begin(say)
        if len(self.objective.terms) > 1 and self.step < self.steps:
            x, y = (one.chunk(t.accumulation)[0] for one in self.batch_at(self.step))
            self.objective.refuse_idle(self.model, x, y, t.loss_chunk)
        self.folder.truncate(self.step)
        records.begin(self.model, self.step, self.steps)
        self._began = self._tick = time.perf_counter()

    def _begin(self, say: checkpoint.Say) -> tuple[int, Trace]:
        """Steps done and their trace: of the run's newest whole checkpoint, else none, new or branched."""

        def restored(found: checkpoint.Checkpoint) -> tuple[checkpoint.Checkpoint, Trace]:
            found.restore(self.model, self.optimizer)
            return found, Trace(found.trace)

        last = checkpoint.use_newest(self.job.folder, restored, say)
        if last is not None:
            self.parts.load_state(last[0].parts)
            self.tokens = int(last[0].state.get("tokens", last[0].step * self.tokens_per_step))
            return last[0].step, last[1]
        if self.job.branch is not None:
            keep = self.optimizer if self.job.config.train.inherit_optimizer else None
            checkpoint.open_checkpoint(self.job.branch).inherit(self.model, keep)
        return 0, Trace()

    @property
    def latest(self) -> Mapping[str, float]:
        """Of every name that a probe has measured the newest value."""
        return self.parts.probes.latest if self.parts.probes else {}

    @property
    def tokens_per_step(self) -> int:
        return self.job.batch * self.job.config.kernel.context

    def remaining(self) -> Iterator[int]:
        """How many steps were done before each that is still to do."""
        if not self.steps and not self.folder.is_done():
            self._keep_beginning()
        if self.step >= self.steps and not self.folder.is_done():  # killed between the last checkpoint and the summary
            self._write_trace()
            self._summarise("done")
        while self.step < self.steps and not self._paused:
            self._tick = time.perf_counter()
            yield self.step

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `step`, int64 (batch, context), on the device."""
        x, y = (torch.from_numpy(a).to(self.device, non_blocking=True) for a in self.source.at(step))
        return x, y

    def losses(self, batch: tuple[Tensor, Tensor], *, gradient: bool = True) -> dict[str, float]:
        """The terms of the objective, means over micro-batches; the gradient of their weighted sum goes to `.grad`."""
        t = self.job.config.train
        self.batch = batch
        x, y = batch
        sums = torch.zeros(len(self.objective.terms), device=self.device)
        with torch.set_grad_enabled(gradient):
            for xs, ys in zip(x.chunk(t.accumulation), y.chunk(t.accumulation), strict=True):
                with self._autocast:
                    terms = self.objective(self.model, xs, ys, t.loss_chunk)
                if gradient:
                    (self.objective.total(terms) / t.accumulation).backward()
                sums += torch.stack([term.detach() for term in terms.values()]) / t.accumulation
        return dict(zip(self.objective.terms, sums.tolist(), strict=True))

    def apply(self, losses: Mapping[str, float]) -> None:
        """One optimizer step along the gradient that is there; a loss or gradient that is not finite is a `failure`."""
        lr = self.schedule.at(self.step)
        if self.parts.governor is not None:
            lr = self.parts.governor.rate(self.step, lr)
            if not 0 <= lr < math.inf:
                raise ConfigError(f"governor: the rate of step {self.step} is {lr}; it must be finite and at least 0")
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = lr * rate
        self._theta, self._tokens = self._flat(), self.tokens
        norm = clipped(list(self.model.parameters()), self.job.config.train.clip, self.parts.clipping)
        loss = self.objective.total(losses)
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step(**self._told(loss, norm))
        else:
            self.failure = f"{self.job.role}: loss {loss} and gradient norm {norm} at step {self.step}"
        self.step += 1
        self.tokens += self.batch[0].numel()
        terms = {name: value for name, value in losses.items() if name != CROSS_ENTROPY}
        self.numbers = {
            "step": self.step, "loss_nats": losses[CROSS_ENTROPY], "grad_norm": norm, "lr": lr, **terms
        }  # fmt: skip

    def rest(self) -> None:
        """A step without training: nothing is computed, its numbers are those of the step before."""
        self._theta, self._tokens = self._flat(), self.tokens
        last = self.trace.last()
        self.step += 1
        self.numbers = {
            "step": self.step, "loss_nats": last["loss_nats"], "grad_norm": last["grad_norm"], "lr": 0.0
        }  # fmt: skip

    def record(self, seen: Mapping[str, float], advice: Advice = Advice.GO_ON) -> Step:
        """The step into trace, log and, where one is due, checkpoint; RunError when it failed and nobody helped."""
        job, t, done, now = self.job, self.job.config.train, self.step, self.numbers
        self.optimizer.zero_grad(set_to_none=True)
        if self.failure is not None:
            self._summarise("failed", self.failure)
            raise RunError(f"{self.failure}; train anew with optim.lr below {job.config.optim.lr}")
        if self.parts.governor is not None:
            self.parts.governor.observe(seen)
        self._trace(self._theta, done - 1, self._tokens, now["loss_nats"], now["grad_norm"], now["lr"])
        final = done == job.steps
        due = final or (t.eval_every and done % t.eval_every == 0)
        bits = self.evaluate() if due else None
        sample = name = None
        if bits is not None:
            self._best = min(self._best, bits)
            sample = sample_text(self.model, job, t.sample_bytes)
        if final:  # the state after the last step, on the batch that would have come next
            loss = self.losses(self.batch_at(done), gradient=False)[CROSS_ENTROPY]
            self._trace(self._flat(), done, self.tokens, loss, math.nan, 0.0)
        if final or self._paused or done % t.checkpoint_every == 0:
            name = self._save(bits)
        step = Step(
            job.role, done, job.steps, self.tokens, now["loss_nats"], now["grad_norm"], now["lr"],
            time.perf_counter() - self._tick, bits, sample, name,
            {key: value for key, value in seen.items() if key not in NUMBERS} or None,
            advice.value if advice else None,
        )  # fmt: skip
        self._logged.append(step)
        if name:
            self.folder.log(self._logged)
            self._logged.clear()
            self._write_trace()
            if final:
                self._summarise("done")
        return step

    def _keep_beginning(self) -> None:
        """The checkpoint, trace and summary of a run of no steps: what it branched from, evaluated."""
        bits = self.evaluate()
        self._best = math.inf if bits is None else bits
        loss = self.losses(self.batch_at(0), gradient=False)[CROSS_ENTROPY]
        self._trace(self._flat(), 0, 0, loss, math.nan, 0.0)
        self._save(bits)

    def _save(self, bits: float | None) -> str:
        t = self.job.config.train
        self.records.save()
        return checkpoint.save(
            self.job.folder, self.step, self.model, self.optimizer, self.trace.arrays(),
            tokens=self.tokens, dev_bits_per_byte=bits, parts=self.parts.state(),
            keep_last=t.keep_last, keep_best=t.keep_best,
        ).name  # fmt: skip

    def snapshot(self) -> checkpoint.Snapshot:
        """This moment, in memory."""
        return checkpoint.Snapshot.of(self.model, self.optimizer)

    def last_checkpoint(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint on disk, None before the first."""
        return checkpoint.newest(self.job.folder)

    def keep(self) -> None:
        """This moment, on disk under recovery/, the newest alone; RunError where that cannot be written."""
        checkpoint.save(
            self.job.folder / "recovery", self.step, self.model, self.optimizer, self.trace.arrays(),
            tokens=self.tokens, dev_bits_per_byte=None, parts=None, keep_last=1, keep_best=0,
        )  # fmt: skip

    def roll_back(self, saved: Saved) -> None:
        """Weights, optimizer and random numbers as `saved`, the failure forgotten; steps and data go on."""
        saved.restore(self.model, self.optimizer)
        self.failure = None

    def pause(self) -> None:
        """End this sitting with a checkpoint after the step; `fit` of the same job goes on from there."""
        self._paused = True

    def evaluate(self) -> float | None:
        """Bits per byte on the first `train.eval_bytes` of the held-out text, None without one."""
        t = self.job.config.train
        return None if self.dev is None else score.evaluate(self.model, self.dev, t.eval_bytes, t.precision)

    def _told(self, loss: float, norm: float) -> dict[str, Any]:
        """What the optimizer wants: a part of the batch to see curvature in, and what was measured."""
        if not self._wants:
            return {}
        x, y = self.batch
        part = max(1, len(x) // CURVATURE_PART)
        told = {
            "logits": lambda: self.model(x[:part]).flatten(0, 1),
            "targets": y[:part].flatten(),
            "telemetry": {
                **self.latest,
                **words(self.latest),
                "loss": loss,
                "grad_norm": norm,
                "progress": self.step / self.steps,
            },
        }
        return {name: told[name] for name in self._wants}

    def _flat(self) -> np.ndarray | None:
        """All parameters of a model that is small enough to be traced."""
        return torch.cat([p.detach().flatten() for p in self._traced]).cpu().numpy() if self._traced else None

    def _trace(self, theta: np.ndarray | None, step: int, tokens: int, loss: float, norm: float, lr: float) -> None:
        self.trace.append(theta, step=step, tokens=tokens, loss_nats=loss, grad_norm=norm, lr=lr)

    def _write_trace(self) -> None:
        self.folder.write_trace(self.trace.arrays())
        if self.records.signals:
            write_signals(self.job.folder / "signals.npz", open_run(self.job.folder).signals)

    def _summarise(self, status: str, reason: str | None = None) -> None:
        losses = self.trace.arrays()["loss_nats"]
        self.folder.summarise(
            status=status, failure=reason, role=self.job.role, steps=len(losses) - (status == "done"),
            planned=self.steps, tokens=self.tokens, **describe(losses),
            best_dev_bits_per_byte=self._best if self._best < math.inf else None,
            runtime_s=time.perf_counter() - self._began, converged=converged(losses),
            **({"optimizer": optimizer_stats(self.optimizer)} if "telemetry" in self._wants else {}),
        )  # fmt: skip


def batches_of(job: Job) -> Source:
    """Windows of the job's own token ranges, in an order drawn by its seed."""
    ranges = None if job.segments is None else segments.read(job.segments)
    return Batches(open_cache(job.train), ranges, job.config.kernel.context, job.batch, job.config.train.seed)
