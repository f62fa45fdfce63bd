"""What a recovery can do to a run: operations on weights, optimizer or rate, named as the original design has them.

    rollback        the newest checkpoint on disk
    cooldown        the learning rate x 0.5 for n steps, then as scheduled (Brake)
    light_sleep     n steps on earlier batches of cross-entropy + lambda D^2 to a teacher, the mean of the weights now
                    and of the newest checkpoint
    deep_sleep      optimizer state x 0.5; the tenth of every matrix with the least saliency w^2 F_ii set to 0 and held
                    there through n steps of fine-tuning, then free (Han et al. 2017, dense-sparse-dense)
    dream           text that the model writes itself, half of it kept, learned from the teacher's predictions
    mushroom        W <- |W| polar(W) by Newton-Schulz (FIRE, 2602.08040), bounded by D <= delta, then n steps
    shrink_perturb  w <- .8 w + .1 noise std(w), bounded likewise, then n steps (Ash, Adams 2020)

F_ii is the mean squared gradient of a batch of these steps; D the functional Fisher-Rao distance on the last batch. The
teacher is no running average of all weights, which a checkpoint could not hold as plain numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from constellation.geometry import simplex
from constellation.optim.polar import polar
from constellation.regime.protocol import Recoverable
from constellation.telemetry.training import Language

LIGHT_LAMBDA = 1.0  # nats per squared radian
PRUNED = 0.1  # share of a matrix
SHRINK, NOISE = 0.8, 0.1
DELTA = 0.5  # radians that mushroom and shrink_perturb may move predictions
RATE = 3e-4  # of AdamW in the steps of an action
DREAM_TOKENS, DREAMS = 48, 16
REST = 0.5  # of the rate, and of the optimizer's state


class Brake:
    """The governor of a cooldown: the rate is halved for some steps."""

    def __init__(self) -> None:
        self.left = 0

    def observe(self, seen: Mapping[str, float]) -> None:
        self.left = max(0, self.left - 1)

    def rate(self, step: int, scheduled: float) -> float:
        return scheduled * REST if self.left else scheduled

    def state(self) -> dict[str, Any]:
        return {"left": self.left} if self.left else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.left = state["left"]


def rollback(training: Recoverable, steps: int, brake: Brake) -> None:
    if (saved := training.last_checkpoint()) is not None:
        training.roll_back(saved)


def cooldown(training: Recoverable, steps: int, brake: Brake) -> None:
    brake.left = steps


def light_sleep(training: Recoverable, steps: int, brake: Brake) -> None:
    teacher = _teacher(training)

    def loss(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits, theirs = _logits(training.model, inputs_BT), _logits(teacher, inputs_BT).detach()
        far = simplex.squared_distance(logits.softmax(-1), theirs.softmax(-1)).mean()
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten()) + LIGHT_LAMBDA * far

    _learn(training, steps, loss)


def deep_sleep(training: Recoverable, steps: int, brake: Brake) -> None:
    for entry in training.optimizer.state.values():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.is_floating_point() and name != "step":
                value.mul_(REST)
    matrices = [p for p in training.model.parameters() if p.dim() == 2]
    inputs, targets = _earlier(training, 1)
    loss = F.cross_entropy(_logits(training.model, inputs).flatten(0, 1), targets.flatten())
    grads = torch.autograd.grad(loss, matrices, allow_unused=True)
    kept = []
    for p, g in zip(matrices, grads, strict=True):
        saliency = p.detach().square() * (torch.ones_like(p) if g is None else g.square())
        kept.append(saliency > saliency.flatten().kthvalue(max(1, int(PRUNED * p.numel()))).values)

    def prune() -> None:
        with torch.no_grad():
            for p, mask in zip(matrices, kept, strict=True):
                p.mul_(mask)

    prune()
    _learn(training, steps, None, after=prune)


def dream(training: Recoverable, steps: int, brake: Brake) -> None:
    teacher = _teacher(training)
    tokens = _written(training.model, min(DREAM_TOKENS, training.batch[0].shape[1] - 1), training.step)
    with torch.no_grad():
        theirs = _logits(teacher, tokens[:, :-1]).log_softmax(-1)
        nats = -theirs.gather(-1, tokens[:, 1:, None])[..., 0].mean(-1)
        usual = nats.argsort()[: len(nats) // 2]  # what the teacher finds likeliest
    tokens, theirs = tokens[usual], theirs[usual].exp()

    def loss(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits = _logits(training.model, inputs_BT)
        dreamt = F.cross_entropy(_logits(training.model, tokens[:, :-1]).flatten(0, 1), theirs.flatten(0, 1))
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten()) + dreamt

    _learn(training, steps, loss)


def mushroom(training: Recoverable, steps: int, brake: Brake) -> None:
    with torch.no_grad():
        targets = []
        for p in training.model.parameters():
            if p.dim() != 2:
                targets.append(p.clone())
                continue
            direction = polar(p[None])[0].reshape(p.shape)
            targets.append(direction * (p.norm() / direction.norm().clamp(min=1e-12)))
    _move_within(training, targets)
    _learn(training, steps, None)


def shrink_perturb(training: Recoverable, steps: int, brake: Brake) -> None:
    with torch.no_grad():
        targets = [
            SHRINK * p + NOISE * p.std() * torch.randn_like(p) if p.dim() == 2 else p.clone()
            for p in training.model.parameters()
        ]
    _move_within(training, targets)
    _learn(training, steps, None)


Action = Callable[[Recoverable, int, Brake], None]
ACTIONS: dict[str, Action] = {
    action.__name__: action for action in (rollback, cooldown, light_sleep, deep_sleep, dream, mushroom, shrink_perturb)
}


def _logits(model: torch.nn.Module, inputs_BT: Tensor) -> Tensor:
    language = cast(Language, model)
    return language.logits(language.hidden(inputs_BT)).float()


def _teacher(training: Recoverable) -> torch.nn.Module:
    """The mean of the weights now and of the newest checkpoint; the latter's where those now are not finite."""
    teacher = copy.deepcopy(training.model)
    teacher.zero_grad(set_to_none=True)
    saved = training.last_checkpoint()
    if saved is not None:
        saved.restore(teacher)
        with torch.no_grad():
            for theirs, p in zip(teacher.parameters(), training.model.parameters(), strict=True):
                if bool(torch.isfinite(p).all()):
                    theirs.lerp_(p, 0.5)
    return teacher.requires_grad_(False)


def _earlier(training: Recoverable, which: int) -> tuple[Tensor, Tensor]:
    """A batch that was trained on before, spread over the run so far."""
    return training.batch_at(which * 7919 % max(1, training.step))


def _learn(
    training: Recoverable,
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor] | None,
    after: Callable[[], None] = lambda: None,
) -> None:
    """`steps` of AdamW of its own on earlier batches; loss None: cross-entropy. A loss that is not finite ends them."""
    kept = [p.grad for p in training.model.parameters()]
    optimizer = torch.optim.AdamW(training.model.parameters(), lr=RATE, weight_decay=0.0)
    for which in range(steps):
        inputs, targets = _earlier(training, which + 2)
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            if loss is None:
                value = F.cross_entropy(_logits(training.model, inputs).flatten(0, 1), targets.flatten())
            else:
                value = loss(inputs, targets)
            value.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0))
        if not math.isfinite(norm):
            break
        optimizer.step()
        after()
    for p, g in zip(training.model.parameters(), kept, strict=True):
        p.grad = g


@torch.no_grad()
def _move_within(training: Recoverable, targets: list[Tensor]) -> None:
    """As far toward `targets` as D to where it was stays within DELTA: the whole way, or halves of it, at most 8."""
    inputs, before = training.batch[0][:1], [p.clone() for p in training.model.parameters()]
    was = _logits(training.model, inputs).softmax(-1)
    part = 1.0
    for _ in range(8):
        for p, old, new in zip(training.model.parameters(), before, targets, strict=True):
            p.copy_(torch.lerp(old, new, part))
        moved = simplex.distance(was, _logits(training.model, inputs).softmax(-1))
        if float(moved.square().mean().sqrt()) <= DELTA:
            return
        part /= 2


@torch.no_grad()
def _written(model: torch.nn.Module, length: int, seed: int) -> Tensor:
    """Text of the model from nothing, (DREAMS, length + 1), token by token: the naive way, for a moment's use."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.zeros(DREAMS, 1, dtype=torch.int64, device=device)
    for _ in range(length):
        p = _logits(model, tokens)[:, -1].softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(p, 1, generator=generator)), 1)
    return tokens
