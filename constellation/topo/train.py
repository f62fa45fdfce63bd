"""Training a TopoEncoder: a generator of epochs that goes on from its folder, to the same bits on a CPU.

    RUN/meta.json, summary.json, diag_steps.jsonl, signals.npz, checkpoints/     as a kernel's (artifacts/, train/)

The order of images is a function of (seed, epoch); weights, Adam's moments, the generator, what the controllers
remember and the history are in the checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from constellation.artifacts.run import RunFolder
from constellation.artifacts.signal import Signal, write_signals
from constellation.config import Config
from constellation.control.precision import LearnedPrecisions
from constellation.control.update import copied, update_ratio
from constellation.errors import ConfigError, RunError
from constellation.topo.adaptive import SHORTFALL, Adaptive
from constellation.topo.evaluate import evaluate
from constellation.topo.images import Images, checked
from constellation.topo.losses import LOSSES, VIEWS, Seen, information, weights_of
from constellation.topo.model import TopoEncoder
from constellation.topo.views import moved
from constellation.train import checkpoint
from constellation.train.schedule import learning_rate

ROLE = "topo"
SQUARES = ("reconstruction", "vq")  # what learned precisions weigh
REVIVED = 0.7  # part of the run in which unused codes are moved
UNITS = {"bits": "bits", "index_bits": "bits", "lr": "1"}


@dataclass(frozen=True)
class Epoch:
    """One pass over the images: means of what its steps minimised, what controllers set, and evaluations."""

    role: str
    step: int  # optimizer steps done
    steps: int  # planned
    epoch: int
    epochs: int
    images: int  # read so far, repetitions counted
    lr: float  # of the last step
    wall_s: float
    losses: dict[str, float]  # unweighted, means over the epoch
    held: dict[str, float] | None = None  # on held-out images (topo/evaluate.py)
    checkpoint: str | None = None
    sample: str | None = None

    def numbers(self) -> dict[str, float]:
        """What trackers are told."""
        return {"lr": self.lr, "images": float(self.images), **self.losses,
                **{f"held_{name}": value for name, value in (self.held or {}).items()}}  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


def fit(config: Config, images: Images, folder: Path, say: checkpoint.Say = checkpoint.warn) -> Iterator[Epoch]:
    """Train `config.topo` on `images` in `folder`, yielding an Epoch after each; resumes by itself.

    DataError or ConfigError where images and settings do not go together, RunError when the loss is no number.
    """
    run = Training(config, images, folder, say)
    while run.epoch < run.settings.train.epochs:
        began = time.perf_counter()
        losses = run.pass_over()
        yield run.record(losses, time.perf_counter() - began)
    run.finish()


class Training:
    """A run under way; `epoch` counts those done."""

    def __init__(self, config: Config, images: Images, folder: Path, say: checkpoint.Say = checkpoint.warn):
        self.config, self.settings, self.images = config, config.topo, images
        s, t = self.settings, self.settings.train
        checked(images, s.model.charts * s.model.codes, s.loss.supervised > 0)
        torch.set_num_threads(t.threads)
        torch.manual_seed(t.seed)
        self.model = TopoEncoder(s.model, images.shape, images.classes, t.seed)
        self.precisions = LearnedPrecisions(SQUARES) if s.control.weights == "precision" else None
        if self.precisions is not None:
            self.model.add_module("precisions", self.precisions)
        self.optimizer = torch.optim.Adam(self.model.parameters(), t.lr, fused=True)
        self.x = torch.from_numpy(images.train.x)
        self.y = None if images.train.y is None else torch.from_numpy(images.train.y)
        self.variance = float((self.x - self.x.mean(0)).square().mean())
        self.batch = min(t.batch, len(self.x))
        self.per_epoch = len(self.x) // self.batch
        self.steps = self.per_epoch * t.epochs
        self.adaptive = Adaptive(s, weights_of(s.loss, s.model.nuisance, s.model.texture), self.steps)
        self.probing = t.probe and self.y is not None
        self._tuned = [p for name, p in self.model.named_parameters() if not name.startswith("probe.")]
        self.history: dict[str, list[float]] = {}
        self.epoch, self.folder = 0, RunFolder(folder)
        self.lr, self._began, self._logged = 0.0, time.perf_counter(), list[Any]()
        named = self.model.named_parameters()
        layout = [{"name": name, "shape": list(p.shape), "dtype": str(p.dtype)} for name, p in named]
        self.folder.begin(config, ROLE, layout, {
            "data": images.name, "data_hash": images.digest, "official_split": images.official,
            "steps": self.steps, "parameters": self.model.size,
        })  # fmt: skip
        self._resume(say)

    @property
    def step(self) -> int:
        return self.epoch * self.per_epoch

    @property
    def bias(self) -> Tensor | None:
        bias = self.adaptive.bias
        return None if bias is None else torch.tensor(bias)

    def pass_over(self) -> dict[str, float]:
        """One epoch of steps; means of the losses."""
        s, t = self.settings, self.settings.train
        order = np.random.default_rng([t.seed, self.epoch]).permutation(len(self.x))
        order_T = torch.from_numpy(order)
        used = torch.zeros(s.model.charts, s.model.codes)
        rows: list[Tensor] = []
        names: list[str] = []
        for number in range(self.per_epoch):
            at = order_T[number * self.batch : (number + 1) * self.batch]
            seen = self._seen(self.x[at], None if self.y is None else self.y[at])
            losses = self._losses(seen)
            self._step(losses, seen, self.step + number)
            placed = seen.encoded.placed
            used.view(-1).index_add_(0, placed.chart_B * s.model.codes + placed.code_B, torch.ones(len(at)))
            names = list(losses)
            rows.append(torch.stack([loss.detach() for loss in losses.values()]))
        means = dict(zip(names, torch.stack(rows).mean(0).tolist(), strict=True))
        self.adaptive.after_epoch(means, self._norms(seen) if s.control.commitment == "balanced" else None)
        if t.reset and self.epoch < REVIVED * t.epochs:
            means["revived"] = float(self.model.atlas.revive(used, seen.encoded.v_BD, placed.chart_B, t.reset))
        self.epoch += 1
        return means

    def _seen(self, x: Tensor, y: Tensor | None) -> Seen:
        encoded = self.model.encode(x, self.bias)
        drawn, back = self.model.decode(encoded.placed.point_BD, self.model.sent(encoded))
        view = self.model.routed(moved(x)) if any(self.adaptive.weights.get(name) for name in VIEWS) else None
        return Seen(self.model, self.settings.loss, x, y, encoded, drawn, back, self.variance, view)

    def _losses(self, seen: Seen) -> dict[str, Tensor]:
        """What is weighted now, and what controllers want to see."""
        found = {name: LOSSES[name](seen) for name in self.adaptive.weights}
        if self.adaptive.dual is not None:
            found[SHORTFALL] = self.settings.loss.window_nats - information(seen)
        if self.settings.control.commitment == "balanced":
            v, z = seen.encoded.v_BD, seen.encoded.placed.nearest_BD
            found["vq"] = F.mse_loss(z, v.detach()) + self.adaptive.commitment * F.mse_loss(v, z.detach())
        if self.probing:
            assert seen.y is not None
            point = seen.encoded.placed.nearest_BD.detach()
            found["probe"] = F.cross_entropy(self.model.probe(point), seen.y)
        return found

    def _total(self, losses: Mapping[str, Tensor], step: int) -> Tensor:
        weights = dict(self.adaptive.weights)
        if step < self.settings.loss.jump_warmup * self.steps:
            weights["jump"] = 0.0
        parts = [weight * losses[name] for name, weight in weights.items()
                 if weight and not (self.precisions is not None and name in SQUARES)]  # fmt: skip
        if self.precisions is not None:
            squares = {name: losses[name] for name in SQUARES if name in losses}
            parts.append(self.precisions(squares, dict.fromkeys(squares, 1.0)))
        if SHORTFALL in losses:
            parts.append(self.adaptive.pressure * losses[SHORTFALL])
        if "probe" in losses:
            parts.append(losses["probe"])
        if not parts:
            raise ConfigError("topo.loss: every weight is 0, so there is nothing to minimise; give one a weight")
        return torch.stack(parts).sum()

    def _step(self, losses: Mapping[str, Tensor], seen: Seen, step: int) -> None:
        t = self.settings.train
        governor = self.adaptive.governor
        if governor is None:
            self.lr = learning_rate(step, self.steps, t.lr, t.warmup, t.decay)
        else:
            self.lr = governor.rate(step, t.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        total = self._total(losses, step)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._tuned, t.clip)
        if not math.isfinite(float(total.detach()) + float(norm)):
            self.folder.summarise(status="failed", failure=f"loss {float(total.detach())} at step {step}", role=ROLE)
            raise RunError(
                f"topo: loss {float(total.detach())} at step {step}; train anew with topo.train.lr below {t.lr}"
            )
        before = copied(self._tuned) if governor is not None and governor.cap else None
        self.optimizer.step()
        if governor is not None or self.adaptive.balance is not None:
            ratio = None if before is None else update_ratio(before, self._tuned)
            loads = torch.bincount(seen.encoded.placed.chart_B, minlength=self.settings.model.charts).numpy()
            self.adaptive.after_step(float(losses["reconstruction"].detach()), ratio, loads)

    def _norms(self, seen: Seen) -> tuple[float, float]:
        """Gradient norms at the points, of reconstruction and commitment, on images that were just seen."""
        again = self._seen(seen.x, seen.y)
        v, z = again.encoded.v_BD, again.encoded.placed.nearest_BD
        pull, drawn = F.mse_loss(v, z.detach()), LOSSES["reconstruction"](again)
        norms = [float(torch.autograd.grad(loss, v, retain_graph=True)[0].norm()) for loss in (drawn, pull)]
        return norms[0], norms[1]

    def record(self, losses: dict[str, float], wall_s: float) -> Epoch:
        """The epoch into history and log; evaluation and checkpoint where they are due."""
        t = self.settings.train
        final = self.epoch == t.epochs
        held = None
        if final or (t.eval_every and self.epoch % t.eval_every == 0):
            held = evaluate(self.model, self.images.test, self.bias)
        numbers = {**losses, **self.adaptive.numbers()}
        if self.precisions is not None:
            numbers |= {f"weight_{name}": value for name, value in self.precisions.weights().items()}
        row = {"step": float(self.step), "lr": self.lr, **numbers,
               **{f"held_{name}": value for name, value in (held or {}).items()}}  # fmt: skip
        for name in {**self.history, **row}:
            past = self.history.setdefault(name, [math.nan] * (self.epoch - 1))
            past.append(row.get(name, math.nan))
        saved = None
        if final or self.epoch % t.checkpoint_every == 0:
            saved = checkpoint.save(
                self.folder.path, self.step, self.model, self.optimizer, self._arrays(), tokens=self.step * self.batch,
                dev_bits_per_byte=None, keep_last=2, keep_best=0,
                parts={"epoch": self.epoch, "adaptive": self.adaptive.state()},
            ).name  # fmt: skip
        done = Epoch(
            ROLE, self.step, self.steps, self.epoch, t.epochs, self.step * self.batch, self.lr, wall_s, numbers, held,
            saved,
        )  # fmt: skip
        self._logged.append(done)
        if saved:
            self.folder.log(self._logged)
            self._logged.clear()
            write_signals(self.folder.path / "signals.npz", self.signals())
        return done

    def signals(self) -> dict[str, Signal]:
        """The history as signals, with the setpoints as their truth where there are any."""
        step, found = np.array(self.history["step"]), {}
        for name, values in self.history.items():
            known = np.isfinite(values)
            if name != "step" and known.any():
                target = self.adaptive.targets.get(name) if self.adaptive.loops else None
                truth = None if target is None else np.array(target)
                unit = UNITS.get(
                    name.removeprefix("held_"), "nats" if "entropy" in name or "information" in name else "1"
                )
                found[name] = Signal(np.array(values)[known], step[known].astype(np.int64), unit, truth=truth)
        return found

    def finish(self) -> None:
        """summary.json, once all epochs are done."""
        held = {n.removeprefix("held_"): v[-1] for n, v in self.history.items() if n.startswith("held_")}
        standing = self.adaptive.standing()
        self.folder.summarise(
            status="done", failure=None, role=ROLE, steps=self.step, planned=self.steps, tokens=self.step * self.batch,
            last_loss_nats=None, runtime_s=time.perf_counter() - self._began, held=held,
            **({} if standing is None else {"constraints": str(standing), "infeasible": list(standing.infeasible)}),
        )  # fmt: skip

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: np.array(values) for name, values in self.history.items()}

    def _resume(self, say: checkpoint.Say) -> None:
        def restored(found: checkpoint.Checkpoint) -> checkpoint.Checkpoint:
            found.restore(self.model, self.optimizer)
            return found

        last = checkpoint.use_newest(self.folder.path, restored, say)
        if last is not None:
            self.epoch = int(last.parts["epoch"])
            self.adaptive.load_state(last.parts["adaptive"])
            self.history = {name: array.tolist() for name, array in last.trace.items()}
            self.lr = self.history["lr"][-1]
        self.folder.truncate(self.step)
