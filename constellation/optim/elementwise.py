"""The diagonal step of diagonal.py on lists of parameters: one formula, three ways to compute it.

    plain   parameter by parameter, every intermediate a tensor: differentiable, capturable, the oracle
    listed  torch._foreach operations, on a CPU in blocks that stay in the cache
    fused   power 1/2: torch's own AdamW kernel; without bias correction it is told that many steps have passed

`diagonal_step(params, state, group)` is what mixed optimizers call on their groups. `group` holds lr, fisher_decay,
damping, momentum, power and weight_decay, and may hold DiagonalNG's other options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from constellation.optim.natural import state_like

BLOCK = 2**17  # elements that a CPU's cache holds of parameter, gradient, averages and denominator
FUSED_ON = ("cpu", "cuda", "xpu", "mps")
SETTLED = 2.0**24  # a step count, the largest that float32 adds 1 to in vain: 1 - a^SETTLED = 1
TINY = 1e-30  # least denominator when damping is 0: 0 / 0 is no step


def adamw_step(params: Sequence[Tensor], state: Any, group: dict[str, Any]) -> None:
    """torch's AdamW on `params` with lr, betas, eps and weight_decay of `group`; fused where torch can."""
    b, a = group.get("betas", (0.9, 0.999))
    diagonal_step(params, state, {**group, "momentum": b, "fisher_decay": a, "damping": group["eps"], "power": 0.5})


def diagonal_step(
    params: Sequence[Tensor], state: Any, group: dict[str, Any], curvature: dict[Tensor, Tensor] | None = None
) -> None:
    """The formula of this file on those of `params` that have a gradient; their state is made when first seen.

    `curvature` maps parameters to f_i; those it lacks keep their F. None: f = B g^2.
    """
    params = [p for p in params if p.grad is not None]
    if not params:
        return
    plain = group.get("foreach") is False or group.get("differentiable", False)
    adam = group["power"] == 0.5 and group.get("batch_size", 1) == 1
    adam = adam and bool(group["momentum"] or not group.get("maximize"))  # its mean is the gradient, of other sign here
    on_device = group.get("capturable", False)
    fused = adam and not plain and not group.get("foreach") and curvature is None and params[0].device.type in FUSED_ON
    device = params[0].device if fused or on_device else torch.device("cpu")
    for p in params:
        if "fisher" not in state[p]:
            step = torch.zeros((), dtype=torch.float32, device=p.device if fused or on_device else device)
            state[p].update({"step": step, "fisher": state_like(p)})
    first = state[params[0]]
    if group["momentum"] and not all("momentum" in state[p] for p in params):
        for p in params:
            state[p].setdefault("momentum", state_like(p))
    if curvature is not None and not all("looks" in state[p] for p in params):
        for p in params:
            state[p].setdefault("looks", torch.zeros((), dtype=torch.float32))
    if first["step"].device != device:  # loaded from another way to step
        for p in params:
            state[p]["step"] = state[p]["step"].to(p.device if fused or on_device else device)
    if fused:
        _fused(params, state, group)
    elif plain or on_device:
        for p in params:
            _plain(p, state[p], group, curvature)
    else:
        _listed(params, state, group, curvature)


def _fused(params: list[Tensor], state: Any, group: dict[str, Any]) -> None:
    """Power 1/2 in torch's kernel; half-precision parameters pass through float32.

    Without momentum the gradient is its own mean, b = 0 writes it over itself.
    """
    fishers, steps = ([state[p][name] for p in params] for name in ("fisher", "step"))
    wide = [_laid_out(p, f) for p, f in zip(params, fishers, strict=True)]
    grads = [_laid_out(p.grad, f) for p, f in zip(params, fishers, strict=True) if p.grad is not None]
    momenta = [state[p]["momentum"] for p in params] if group["momentum"] else grads
    if not group.get("bias_correction", True):
        torch._foreach_add_(steps, 1.0)
        steps = [torch.full((), SETTLED, device=steps[0].device)] * len(steps)
    adamw(
        wide, grads, momenta, fishers, [], steps, fused=True, foreach=False, amsgrad=False, beta1=group["momentum"],
        beta2=group["fisher_decay"], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["damping"],
        maximize=group.get("maximize", False),
    )  # fmt: skip
    for p, w in zip(params, wide, strict=True):
        if w is not p:
            p.copy_(w)


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """`t`, or a copy of the dtype and strides of `like`: the kernel runs over memory as it lies."""
    same = (t.is_contiguous() and like.is_contiguous()) or t.stride() == like.stride()
    return t if same and t.dtype == like.dtype else torch.empty_like(like).copy_(t)


def _plain(p: Tensor, s: dict[str, Any], group: dict[str, Any], curvature: dict[Tensor, Tensor] | None) -> None:
    """The formula, one parameter, every number a tensor where it has to be: the oracle of the other paths."""
    a, b, power, lr = group["fisher_decay"], group["momentum"], group["power"], group["lr"]
    keep = group.get("differentiable", False)

    def store(name: str, value: Tensor) -> Tensor:
        s[name] = value if keep else s[name].copy_(value)
        return s[name]

    grad = p.grad if p.grad is not None else torch.zeros_like(p)
    g = (-grad if group.get("maximize") else grad).to(s["fisher"].dtype)
    theta, fisher, m = p, s["fisher"], s.get("momentum")
    step = store("step", s["step"] + 1)
    number = step if keep or group.get("capturable") else float(step)
    if curvature is None:
        f, looks = group.get("batch_size", 1) * g * g, number
    else:
        looks = float(store("looks", s["looks"] + (1 if p in curvature else 0)))
        f = curvature[p].to(fisher.dtype) if p in curvature else None
    if f is not None:
        fisher = a * fisher + (1 - a) * f
        store("fisher", fisher)
    direction = g
    if b:
        assert m is not None
        direction = b * m + (1 - b) * g
        store("momentum", direction)
    if group.get("bias_correction", True):
        if b:
            direction = direction / (1 - b**number)
        fisher = fisher / (1 - a**looks) if looks is number or looks else fisher
    scale = fisher.sqrt() if power == 0.5 else fisher if power == 1 else fisher**power
    delta = direction / (scale + group["damping"] if group["damping"] else scale.clamp(min=TINY))
    theta.mul_(1 - lr * group["weight_decay"]).add_(-lr * delta)


def _listed(params: list[Tensor], state: Any, group: dict[str, Any], curvature: dict[Tensor, Tensor] | None) -> None:
    """The formula on lists of tensors, block by block, so that on a CPU every block stays in the cache."""
    b, a, lr, power = group["momentum"], group["fisher_decay"], float(group["lr"]), group["power"]
    torch._foreach_add_([state[p]["step"] for p in params], torch.tensor(1.0), alpha=1.0)
    alike: dict[Any, list[Tensor]] = {}  # parameters that share every number
    for p in params:
        s, fresh = state[p], curvature is None or p in curvature
        if curvature is not None and fresh:
            s["looks"] += 1
        key = (s["step"].item(), s.get("looks", s["step"]).item(), fresh, p.dtype, p.device)
        alike.setdefault(key, []).append(p)
    for (step, looks, fresh, _, device), some in alike.items():
        c1 = c2 = 1.0
        if group.get("bias_correction", True):
            c1, c2 = 1 - b**step, (1 - a**looks) ** power or 1.0
        keep, gain = 1 - lr * group["weight_decay"], None
        if fresh:
            gain = (1 - a) * (group.get("batch_size", 1) if curvature is None else 1)
        sources = [(p.grad if curvature is None else curvature.get(p, p.grad)) for p in some]
        lists: list[list[Any]] = [some, [p.grad for p in some], [state[p].get("momentum") for p in some]]
        lists += [[state[p]["fisher"] for p in some], sources]
        for thetas, gs, ms, fs, hs in blocks(lists) if device.type == "cpu" else [lists]:
            if gs[0].dtype != fs[0].dtype:
                gs, hs = ([x.to(f.dtype) for x, f in zip(xs, fs, strict=True)] for xs in (gs, hs))
            if group.get("maximize"):
                gs = list(torch._foreach_neg(gs))
            ms = ms if b else gs
            damping, length = group["damping"] * c2, -lr * c2 / c1
            list_update(thetas, gs, ms, fs, hs, b, a, gain, curvature is None, power, damping, keep, length)


def list_update(
    thetas: Any, gs: Any, ms: Any, fs: Any, hs: Any, b: float, a: float, gain: float | None, squared: bool,
    power: float, damping: float, keep: float, length: float,
) -> None:  # fmt: skip
    """theta <- keep theta + length m / (F^power + damping), averages first; lists of tensors alike in dtype."""
    if b:
        torch._foreach_lerp_(ms, gs, 1 - b)
    if gain is not None:
        torch._foreach_mul_(fs, a)
        if squared:
            torch._foreach_addcmul_(fs, hs, hs, gain)
        else:
            torch._foreach_add_(fs, hs, alpha=gain)
    if power == 1:
        scale = torch._foreach_add(fs, damping)
    else:
        scale = torch._foreach_sqrt(fs) if power == 0.5 else torch._foreach_pow(fs, power)
        torch._foreach_add_(scale, damping)
    if damping == 0:
        torch._foreach_clamp_min_(scale, TINY)
    if keep != 1:
        torch._foreach_mul_(thetas, keep)
    if thetas[0].dtype == scale[0].dtype:
        torch._foreach_addcdiv_(thetas, ms, scale, length)
    else:
        torch._foreach_add_(thetas, torch._foreach_div(ms, scale), alpha=length)


def blocks(lists: list[list[Any]], size: int = BLOCK) -> Iterator[list[list[Any]]]:
    """The lists cut into pieces of at most about `size` elements: small tensors together, large ones in slices."""
    piece: list[list[Any]] = [[] for _ in lists]
    held = 0
    for row in zip(*lists, strict=True):
        n = row[0].numel()
        flat = n > size and type(row[0].data) is Tensor and all(t is None or t.is_contiguous() for t in row)
        for at in range(0, n, size) if flat else (0,):
            part = [t if t is None or not flat else t.detach().view(-1)[at : at + size] for t in row]
            if held and held + part[0].numel() > size:
                yield piece
                piece, held = [[] for _ in lists], 0
            for column, t in zip(piece, part, strict=True):
                column.append(t)
            held += part[0].numel()
    yield piece
