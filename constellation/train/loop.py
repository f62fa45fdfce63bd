"""fit(job): train one model as a generator of Steps.

    for step in fit(job): ...

serves the command line, Ray actors and sweeps without callbacks. A job is plain data; everything it
did so far lies in its folder, so `fit` of the same job goes on from the newest checkpoint, to the
same bits on a CPU as if it had never stopped: batches are a pure function of (seed, step), and
weights, optimizer, generator and history are in the checkpoint.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from constellation import optim, processor
from constellation.artifacts import segments
from constellation.artifacts.run import THETA_UP_TO, RunFolder, Trace
from constellation.config import OCEAN, Config, override
from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.batches import Batches
from constellation.data.cache import TokenCache, open_cache
from constellation.errors import RunError
from constellation.kernel.loss import linear_cross_entropy
from constellation.kernel.model import KernelLM
from constellation.optim.natural import renamed
from constellation.telemetry.step import Step
from constellation.train import checkpoint, score

CURVATURE_PART = 8  # an optimizer that sees curvature sees it in one sequence of so many


@dataclass(frozen=True)
class Job:
    """Everything that the training of one model needs; small, plain, picklable."""

    role: str  # "ocean" or a kernel's role
    folder: Path  # its run folder
    config: Config  # as this role sees it
    steps: int
    train: Path  # token cache of the training text
    dev: Path | None = None  # token cache of the held-out text
    tokenizer: Path | None = None  # for sample texts
    segments: Path | None = None  # .npy (S, 2) token ranges this role reads; None: everything
    branch: Path | None = None  # checkpoint to start from; None: random weights


def steps_for(config: Config, role: str, kernels: int) -> int:
    """Steps of `role` when the constellation may see `train.tokens` tokens in all."""
    t = config.train
    share = t.ocean_share if role == OCEAN else (1 - t.ocean_share) / kernels
    batch = t.batch if role == OCEAN else t.kernel_batch
    return max(1, round(t.tokens * share / (batch * config.kernel.context)))


def learning_rate(step: int, steps: int, peak: float, warmup: float, decay: float) -> float:
    """Rises linearly over the first `warmup` part, stays, falls linearly to 0 over the last `decay` part."""
    rise = (step + 1) / max(1.0, warmup * steps)
    fall = (steps - step) / max(1.0, decay * steps)
    return peak * min(1.0, rise, fall)


def device_of(config: Config) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(config: Config) -> Config:
    """`auto` of train.precision and optim.ns_precision decided by processor.py, as a config that says so.

    Where kernels get GPUs of their own it is those that count: the driver's machine may have none.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = "bf16" if config.cluster.gpus_per_kernel > 0 else processor.precision(device)
    asked = {"train.precision": config.train.precision, "optim.ns_precision": getattr(config.optim, "ns_precision", "")}
    return override(config, {name: found for name, precision in asked.items() if precision == "auto"})


def inherit(source: checkpoint.Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Weights of `source`, and what its optimizer remembers if this one is of its kind; settings stay one's own.

    Of one kind are optimizers that divide the parameters alike and know the same options; else nothing is
    remembered, as with `train.inherit_optimizer=0`.
    """

    def kind(groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return [(len(g["params"]), *(g.get(name) for name in ("method", "variant", "source"))) for g in groups]

    saved = [renamed(group) for group in source.state["optimizer"]["groups"]]
    if (
        optimizer is None
        or kind(saved) != kind(optimizer.param_groups)
        or not set(saved[0]) <= set(optimizer.param_groups[0])  # options younger than the state are one's own
    ):
        source.restore(model)
        return
    own = [dict(group) for group in optimizer.param_groups]
    source.restore(model, optimizer)
    for group, mine in zip(optimizer.param_groups, own, strict=True):
        group.update(mine)


class Source(Protocol):
    """Where batches come from: a pure function of the step."""

    def at(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...


def fit(job: Job, source: Source | None = None, say: checkpoint.Say = checkpoint.warn) -> Iterator[Step]:
    """Train until `job.steps`, yielding a Step after each optimizer step; resumes by itself.

    Batches come from the job's segments, or from the `source` of an experiment. `say` hears of a damaged checkpoint.
    """
    t = job.config.train
    torch.set_num_threads(t.ocean_threads if job.role == OCEAN else t.threads)
    processor.keep_memory()
    device = device_of(job.config)
    folder = RunFolder(job.folder)
    is_kernel = job.role != OCEAN
    batch = t.kernel_batch if is_kernel else t.batch
    decay = t.decay if is_kernel else t.ocean_decay
    warmup = t.kernel_warmup if is_kernel else t.warmup
    peak = job.config.optim.lr * (t.kernel_lr_scale if is_kernel else 1.0)

    if source is None:
        ranges = None if job.segments is None else segments.read(job.segments)
        source = Batches(open_cache(job.train), ranges, job.config.kernel.context, batch, t.seed)
    dev = None if job.dev is None else open_cache(job.dev)
    model = KernelLM(job.config.kernel, seed=t.seed).to(device)
    optimizer = optim.build(job.config.optim, model)
    rates = [group["lr"] / job.config.optim.lr for group in optimizer.param_groups]  # of each group, relative
    asked = set(inspect.signature(optimizer.step).parameters)  # what its step wants to be told
    layout = [{"name": n, "shape": list(p.shape), "dtype": str(p.dtype)} for n, p in model.named_parameters()]
    folder.begin(job.config, job.role, layout, {"steps": job.steps, "parameters": model.num_parameters()})

    def restored(found: checkpoint.Checkpoint) -> tuple[int, Trace]:
        found.restore(model, optimizer)
        return found.step, Trace(found.trace)

    best, last = math.inf, checkpoint.use_newest(job.folder, restored, say)
    start, trace = last or (0, Trace())
    if last is None and job.branch is not None:
        inherit(checkpoint.open_checkpoint(job.branch), model, optimizer if t.inherit_optimizer else None)
    folder.truncate(start)
    autocast: AbstractContextManager[Any] = (
        torch.autocast(device.type, torch.bfloat16) if t.precision == "bf16" else nullcontext()
    )
    traced = list(model.parameters()) if model.num_parameters() <= THETA_UP_TO else None
    began, logged = time.perf_counter(), []
    tokens_per_step = batch * job.config.kernel.context

    def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (torch.from_numpy(a).to(device, non_blocking=True) for a in source.at(step))
        return x, y

    def loss_of(x: torch.Tensor, y: torch.Tensor, backward: bool) -> torch.Tensor:
        total = torch.zeros((), device=device)
        for xs, ys in zip(x.chunk(t.accumulation), y.chunk(t.accumulation), strict=True):
            with autocast:
                loss = linear_cross_entropy(model.hidden(xs), model.embedding.weight, ys, t.loss_chunk)
            if backward:
                (loss / t.accumulation).backward()
            total += loss.detach() / t.accumulation
        return total

    def told(x: torch.Tensor, y: torch.Tensor, loss: float, norm: float) -> dict[str, Any]:
        """Keywords of the optimizer's step: a part of the batch to see curvature in, and what was measured."""
        part = max(1, len(x) // CURVATURE_PART)
        everything = {
            "logits": lambda: model(x[:part]).flatten(0, 1),
            "targets": y[:part].flatten(),
            "telemetry": {"loss": loss, "grad_norm": norm},
        }
        return {name: value for name, value in everything.items() if name in asked}

    def theta() -> np.ndarray | None:
        return torch.cat([p.detach().flatten() for p in traced]).cpu().numpy() if traced else None

    def summarise(status: str, reason: str | None = None) -> None:
        losses = trace.arrays()["loss_nats"]
        folder.summarise(
            status=status, failure=reason, role=job.role, steps=len(losses) - (status == "done"), planned=job.steps,
            tokens=min(len(losses), job.steps) * tokens_per_step, first_loss_nats=_first(losses),
            last_loss_nats=_first(losses[::-1]), best_loss_nats=float(losses.min()) if len(losses) else None,
            best_dev_bits_per_byte=best if best < math.inf else None, runtime_s=time.perf_counter() - began,
            converged=_converged(losses), **({"optimizer": _stats(optimizer)} if "telemetry" in asked else {}),
        )  # fmt: skip

    if start >= job.steps and not folder.is_done():  # killed between the last checkpoint and the summary
        folder.write_trace(trace.arrays())
        summarise("done")
    for step in range(start, job.steps):
        tick = time.perf_counter()
        lr = learning_rate(step, job.steps, peak, warmup, decay)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * rate
        before = theta()
        x, y = batch_at(step)
        loss = float(loss_of(x, y, backward=True))
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            reason = f"{job.role}: loss {loss} and gradient norm {norm} at step {step}"
            summarise("failed", reason)
            raise RunError(f"{reason}; train anew with optim.lr below {job.config.optim.lr}")
        optimizer.step(**told(x, y, loss, norm))
        optimizer.zero_grad(set_to_none=True)
        trace.append(before, step=step, tokens=step * tokens_per_step, loss_nats=loss, grad_norm=norm, lr=lr)

        done = step + 1
        final = done == job.steps
        bits = sample = name = None
        if dev is not None and (final or (t.eval_every and done % t.eval_every == 0)):
            bits = evaluate(model, dev, t.eval_bytes, t.precision)
            best = min(best, bits)
            sample = sample_text(model, job, t.sample_bytes)
        if final:  # the state after the last step, on the batch that would have come next
            with torch.no_grad():
                last_loss = float(loss_of(*batch_at(done), backward=False))
            trace.append(
                theta(), step=done, tokens=done * tokens_per_step, loss_nats=last_loss, grad_norm=math.nan, lr=0.0
            )
        if final or done % t.checkpoint_every == 0:
            name = checkpoint.save(
                job.folder, done, model, optimizer, trace.arrays(), tokens=done * tokens_per_step,
                dev_bits_per_byte=bits, keep_last=t.keep_last, keep_best=t.keep_best,
            ).name  # fmt: skip
        record = Step(
            job.role,
            done,
            job.steps,
            done * tokens_per_step,
            loss,
            norm,
            lr,
            time.perf_counter() - tick,
            bits,
            sample,
            name,
        )
        logged.append(record)
        if name:
            folder.log(logged)
            logged.clear()
            folder.write_trace(trace.arrays())
            if final:
                summarise("done")
        yield record


def evaluate(model: KernelLM, dev: TokenCache, max_bytes: int, precision: str) -> float:
    """Bits per byte on the first documents of `dev` that together reach `max_bytes`."""
    count = int(np.searchsorted(np.cumsum(dev.byte_length), max_bytes)) + 1
    documents = np.arange(min(count, len(dev.byte_length)))
    nats = score.score(model, dev, documents, stride=model.config.context, precision=precision)
    return score.bits_per_byte(nats, dev.byte_length[documents])


def sample_text(model: KernelLM, job: Job, length: int) -> str | None:
    """A greedy-free look at the model: `length` bytes sampled from an empty prompt, seeded by the run."""
    if not length or job.tokenizer is None:
        return None
    from constellation.decoding.decode import generate
    from constellation.decoding.sample import Sampling

    tokenizer = Tokenizer.load(job.tokenizer)
    room = min(length, model.config.context - 1)
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=job.config.train.seed, max_new_tokens=room)
    tokens = generate(model, [[tokenizer.eos]], [sampling])[0]
    return tokenizer.decode(tokens)[:length].decode("utf-8", "replace")


def _stats(optimizer: Any) -> dict[str, float]:
    """What a gated optimizer says of itself: how often it took its dear step, and what that cost."""
    return {name: value for name, value in optimizer.get_stats().items() if math.isfinite(value)}


def _first(values: np.ndarray) -> float | None:
    return float(values[0]) if len(values) else None


def _converged(losses: np.ndarray) -> bool | None:
    """Whether the mean loss of the last tenth is within 1 % of that of the tenth before; None under 40 states."""
    tenth = len(losses) // 10
    if tenth < 4:
        return None
    return bool(abs(losses[-tenth:].mean() - losses[-2 * tenth : -tenth].mean()) < 0.01 * losses[-tenth:].mean())
