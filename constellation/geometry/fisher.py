"""The Fisher information of a block of parameters, as something one can multiply with.

N rows of outputs f_NV (a token, a sample), J_(NV)P their Jacobian in the P parameters of the block. Four kinds:

exact      F = (1/N) sum_n J_n^T H_n J_n              H_n = E_{y ~ p_n} s_n s_n^T, the Fisher information = generalised
                                                      Gauss-Newton matrix (Martens 2020); softmax: diag p - p p^T
sampled    (1/NM) sum_nm J_n^T s_nm s_nm^T J_n        labels y_nm ~ p_n drawn from the model, M a row: unbiased for F
empirical  (1/N) sum_n J_n^T s_n s_n^T J_n            given labels: not F, biased away from the optimum (Kunstner 2019)
hessian    (1/N) sum_n d^2 (-log p(y_n | f_n))        not a Fisher information: indefinite, equal to F where f is linear

with the score s = d(-log p(y | f)) / df of likelihood.py. `reduction="sum"` drops 1/N.

Products take two reverse passes. The pullback J^T u is linear in u, so differentiating it once more, in u, gives the
pushforward J v; its graph is made once a block and each product walks it, then the pullback. Forward mode
(torch.func.jvp) would need the model as a function, run it anew for each product, and does not exist for the fused
attention of CPUs. Fused attention has no second derivative either: where it lies between the block and the logits,
make the logits under `twice_differentiable()`.

Each of the first three is F = A^T A for a factor A with R rows (`rows`, `factor`), S_n^T J_n / sqrt N for the exact
one: what sample-space solvers use. Rows that are known cheaper than by R reverse passes, when samples do not mix,
come in as `jacobian` (`jacobian_rows`); then no graph is needed.

    block = FisherBlock(logits, [head.weight])
    v = block.matvec(flatten([head.weight.grad]))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.geometry.likelihood import likelihood as likelihood_of

KINDS = {
    "exact": "Fisher information (generalised Gauss-Newton)",
    "sampled": "Fisher information, labels sampled from the model",
    "empirical": "empirical Fisher, given labels",
    "hessian": "Hessian, not Fisher",
}
CHUNK_ELEMENTS = 1 << 22  # numbers in one batch of reverse passes: 32 MB in float64


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """The entries of all tensors in one vector (P,), float64 if any is, else float32."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """`vector` (..., P) cut into the shapes and types of `like`; leading axes stay."""
    parts = vector.split([t.numel() for t in like], dim=-1)
    return [v.reshape(vector.shape[:-1] + t.shape).to(t.dtype) for v, t in zip(parts, like, strict=True)]


def twice_differentiable() -> AbstractContextManager[Any]:
    """Attention made within can be differentiated twice: torch's plain products instead of a fused kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def jacobian_rows(function: Callable[..., Tensor], params: Sequence[Tensor], *samples: Tensor) -> Tensor:
    """J_NVP of f = function(params, *sample) -> (V,) for each of N samples on the leading axes, which must not mix.

    One vectorised reverse pass a output V, instead of N V passes over the whole batch.
    """
    params = tuple(p.detach() for p in params)
    rows = torch.func.vmap(torch.func.jacrev(function), in_dims=(None, *[0] * len(samples)))(params, *samples)
    return torch.cat([r.flatten(2) for r in rows], dim=-1)


class FisherBlock:
    """The curvature of `params` seen through `logits` (..., V): symmetric, P x P, multiplied with, seldom formed.

    logits    with their graph alive (`loss.backward(retain_graph=True)`), parameters unchanged since they were made
    targets   class numbers (...), rows with `ignore_index` left out; for gaussian and bernoulli values (..., V).
              Needed by empirical, hessian and `residual`; the exact kind takes them only to leave rows out
    jacobian  J (..., V, P), when known; the graph is not used then

    Vectors are flat, (P,), of the type of `flatten(params)`. Under bf16 parameters the passes run in bf16.
    """

    def __init__(
        self,
        logits: Tensor,
        params: Sequence[Tensor],
        *,
        kind: str = "exact",
        likelihood: str = "softmax",
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,  # of the sampled labels, on the device of the logits
        samples: int = 1,  # M, labels drawn for a row by the sampled kind
        reduction: str = "mean",
        ignore_index: int = -100,
        jacobian: Tensor | None = None,
    ):
        if kind not in KINDS:
            raise ConfigError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
        if reduction not in ("mean", "sum"):
            raise ConfigError(f"reduction={reduction!r}: choose mean or sum")
        if not params:
            raise ConfigError("the block has no parameters; name at least one")
        if jacobian is None and not all(p.requires_grad for p in params):
            raise ConfigError("a parameter of the block has requires_grad=False; leave it out or unfreeze it")
        if logits.dim() < 2:
            raise ConfigError(f"logits of shape {tuple(logits.shape)}: rows and outputs (..., V) are wanted")
        if targets is None and kind in ("empirical", "hessian"):
            raise ConfigError(f"kind={kind!r} needs targets; exact and sampled do without")
        self.kind, self.label, self.likelihood = kind, KINDS[kind], likelihood_of(likelihood)
        self.params, self.generator = list(params), generator
        self.size = sum(p.numel() for p in self.params)  # P
        self.dtype = flatten([p.new_empty(0) for p in self.params]).dtype
        with torch.enable_grad():  # steps run without gradients, and this belongs to the graph
            outputs = logits.flatten(0, -2)  # (N, V)
        rows = None if jacobian is None else jacobian.detach().reshape(*outputs.shape, self.size)
        self._keep: Tensor | None = None
        if targets is not None:
            wanted = logits.shape[:-1] if likelihood == "softmax" else logits.shape
            if targets.shape != wanted:
                raise ConfigError(f"targets of shape {tuple(targets.shape)}: {tuple(wanted)} is wanted")
            targets = targets.detach().flatten() if likelihood == "softmax" else targets.detach().flatten(0, -2)
            if likelihood == "softmax" and not bool((keep := targets != ignore_index).all()):
                with torch.enable_grad():
                    self._keep, outputs, targets = keep, outputs[keep], targets[keep]
                rows = None if rows is None else rows[keep]
        if not len(outputs):
            raise ConfigError("no row of logits is left: every target is ignored, or the batch is empty")
        self.outputs, self.targets, self.jacobian = outputs, targets, rows
        self.means = self.likelihood.mean(outputs.detach().to(_wide(outputs.dtype)))
        self.weight = 1 / len(outputs) if reduction == "mean" else 1.0
        self._graph: tuple[Tensor, list[int], list[Tensor]] | None = None
        self._labels = [] if kind != "empirical" or targets is None else [targets]
        if kind == "sampled":
            if samples < 1:
                raise ConfigError(f"samples={samples}: at least one label a row is wanted")
            self._labels = [self.likelihood.draw(self.means, generator) for _ in range(samples)]

    @property
    def rows(self) -> int:
        """R, rows of the factor: N V, N M sampled, N empirical; 0 for the Hessian, which has none."""
        if self.kind == "hessian":
            return 0
        return self.means.numel() if self.kind == "exact" else len(self.means) * len(self._labels)

    def loss_nats(self, logits: Tensor | None = None) -> float:
        """Mean (or sum) over rows of -log p(y | f), a constant in f left out, at the block's logits or at others."""
        return float(self.likelihood.loss_nats(self._rows_of(logits), self._wanted(None)).sum() * self.weight)

    def divergence_nats(self, logits: Tensor) -> float:
        """Mean (or sum) over rows of KL(p(. | f) || p(. | f')), f' other logits: 1/2 d^T F d for a small step d."""
        return float(self.likelihood.divergence_nats(self._rows_of(None), self._rows_of(logits)).sum() * self.weight)

    def matvec(self, vector: Tensor) -> Tensor:
        """F v, (P,) -> (P,), or (C, P) -> (C, P) all at once.

        v is brought near unit length by a power of two, and 1/N comes last: cotangents stay of order one, so graphs
        made in float16 neither underflow nor overflow.
        """
        size = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
        scale = torch.exp2(torch.where(size > 0, size, 1).log2().round())
        return self._product(vector / scale) * (scale * self.weight)

    def pushforward(self, vector: Tensor) -> Tensor:
        """J v, (P,) -> (N, V), or (C, P) -> (C, N, V): how far the outputs move when the parameters do."""
        if self.jacobian is not None:
            return torch.einsum("nvp,...p->...nv", self.jacobian, vector.to(self.jacobian.dtype))
        seed, used, pullback = self._linearised()
        parts = unflatten(vector, self.params)
        moved = _grad(pullback, [seed], [parts[i] for i in used], vector.dim() == 2)[0]
        return moved.to(self.means.dtype)

    def pullback(self, cotangent: Tensor) -> Tensor:
        """J^T u, (N, V) -> (P,), or (C, N, V) -> (C, P)."""
        if self.jacobian is not None:
            return torch.einsum("nvp,...nv->...p", self.jacobian, cotangent.to(self.jacobian.dtype)).to(self.dtype)
        self._alive()
        lead = cotangent.shape[:-2]
        return self._join(_grad([self.outputs], self.params, [cotangent.to(self.outputs.dtype)], len(lead) > 0), lead)

    def gradient(self, targets: Tensor | None = None) -> Tensor:
        """Gradient of the loss, J^T score / N, (P,), for the block's targets or for others of their shape."""
        return self.pullback(self.likelihood.score(self.means, self._wanted(targets))) * self.weight

    def residual(self) -> Tensor:
        """r (R,) with A^T r = gradient, for the exact and the empirical kind."""
        targets = self._wanted(None)
        if self.kind == "empirical":
            return self.means.new_full((self.rows,), self.weight**0.5)
        assert self.kind == "exact", f"{self.kind} has no residual"
        return self.likelihood.residual(self.means, targets).flatten() * self.weight**0.5

    def factor(self) -> Tensor:
        """A_RP with F = A^T A, R reverse passes in batches; rows of the exact kind run over (n, v).

        A row of the exact softmax factor is sqrt(p_v / N) times the gradient of -log p_v: F by enumerating labels.
        """
        if self.kind == "hessian":
            raise ConfigError("kind='hessian' is indefinite and has no factor; use cg or dense")
        return torch.cat(list(self._factor_chunks()))

    def matrix(self) -> Tensor:
        """F itself, (P, P), by whichever of its columns and its factor's rows takes fewer passes."""
        if self.kind != "hessian" and (self.jacobian is not None or self.rows <= 2 * self.size):
            total = self.means.new_zeros(self.size, self.size, dtype=self.dtype)
            for part in self._factor_chunks():
                total.addmm_(part.mT, part)
            return total
        eye = torch.eye(self.size, dtype=self.dtype, device=self.means.device)
        columns = torch.cat([self.matvec(part) for part in eye.split(self._chunk)])
        return (columns + columns.mT) / 2

    def diagonal(self, samples: int | None = None) -> tuple[Tensor, Tensor]:
        """diag F and its standard error, both (P,).

        None: exact, from all R rows, standard error 0. samples = k: mean over k draws of labels y ~ p of N g^2, g the
        gradient with those labels; unbiased, since scores of different rows are independent with mean 0 (the
        estimate of Sophia, Liu et al. 2023). One reverse pass a draw; the standard error of one draw is unknown, nan.
        """
        if self.kind == "hessian":
            raise ConfigError("kind='hessian': its diagonal has no sampled form; probe it with Hutchinson's vectors")
        if samples is None:
            total = torch.stack([part.square().sum(0) for part in self._factor_chunks()]).sum(0)
            return total, torch.zeros_like(total)
        if self.kind == "empirical" or samples < 1:
            raise ConfigError(f"samples={samples}, kind={self.kind!r}: at least 1, and labels drawn from the model")
        draws_KP = torch.stack([
            self.pullback(self.likelihood.score(self.means, self.likelihood.draw(self.means, self.generator)))
            for _ in range(samples)
        ])  # fmt: skip
        draws_KP = draws_KP.square_() * self.weight
        if samples == 1:
            return draws_KP[0], torch.full_like(draws_KP[0], torch.nan)
        return draws_KP.mean(0), draws_KP.std(0) / samples**0.5

    def _product(self, v: Tensor) -> Tensor:
        if self.kind == "hessian":
            _, used, gradient = self._linearised()
            parts = unflatten(v, self.params)
            lead = v.shape[:-1]
            return self._join(_grad(gradient, self.params, [parts[i] for i in used], len(lead) > 0), lead)
        w = self.pushforward(v)
        if self.kind == "exact":
            return self.pullback(self.likelihood.metric(self.means, w))
        scores = [self.likelihood.score(self.means, y) for y in self._labels]
        along = sum(s * (s * w).sum(-1, keepdim=True) for s in scores)
        assert isinstance(along, Tensor)
        return self.pullback(along / len(scores))

    def _join(self, grads: Sequence[Tensor], lead: torch.Size) -> Tensor:
        """One flat vector (*lead, P); autograd leaves the axes `lead` out of zeros that it fills in."""
        whole = [g.expand(*lead, *p.shape) for g, p in zip(grads, self.params, strict=True)]
        return torch.cat([g.reshape(*lead, -1).to(self.dtype) for g in whole], dim=-1)

    def _factor_chunks(self) -> Any:
        """The rows of A, some at a time, (C, P) each."""
        like, m = self.likelihood, self.means
        scale = (self.weight / max(1, len(self._labels))) ** 0.5
        if self.jacobian is not None:
            known = (self.jacobian, m, *(like.score(m, y) for y in self._labels))
            for rows, means, *parts in zip(*(t.split(self._chunk) for t in known), strict=True):
                for score in parts:
                    yield torch.einsum("nvp,nv->np", rows, score) * scale
                if not parts:
                    yield like.root_transposed(means[:, None], rows.mT).mT.flatten(0, 1) * scale
            return
        places = m.numel() if self.kind == "exact" else len(m)
        scores: list[Tensor | None] = [like.score(m, y) for y in self._labels]
        for score in scores or [None]:
            for index in torch.arange(places, device=m.device).split(self._chunk):
                u = m.new_zeros(len(index), *m.shape)
                c = torch.arange(len(index), device=m.device)
                if score is None:
                    row, column = index // m.shape[-1], index % m.shape[-1]
                    one = torch.nn.functional.one_hot(column, m.shape[-1]).to(m.dtype)
                    u[c, row] = like.root(m[row], one)
                else:
                    u[c, index] = score[index]
                yield self.pullback(u) * scale

    @property
    def _chunk(self) -> int:
        return max(1, CHUNK_ELEMENTS // max(self.size, self.means.numel()))

    def _rows_of(self, logits: Tensor | None) -> Tensor:
        if logits is None:
            return self.outputs.detach().to(self.means.dtype)
        rows = logits.detach().flatten(0, -2)
        return (rows if self._keep is None else rows[self._keep]).to(self.means.dtype)

    def _wanted(self, targets: Tensor | None) -> Tensor:
        targets = self.targets if targets is None else targets
        if targets is None:
            raise ConfigError("the gradient and the residual need targets")
        return targets

    def _alive(self) -> None:
        if not self.outputs.requires_grad:
            raise ConfigError(
                "the logits have no graph: make them with gradients on and call loss.backward(retain_graph=True)"
            )

    def _linearised(self) -> tuple[Tensor, list[int], list[Tensor]]:
        """(u, indices of the parameters in use, their J^T u) with a graph in u; for the Hessian the gradient's own."""
        if self._graph is None:
            self._alive()
            with torch.enable_grad():
                if self.kind == "hessian":
                    seed = self.likelihood.loss_nats(self.outputs, self._wanted(None)).sum()
                    grads = _grad([seed], self.params, None, keep=True)
                else:  # zero will do, the pullback is linear in it
                    seed = torch.zeros_like(self.outputs, requires_grad=True)
                    grads = _grad([self.outputs], self.params, [seed], keep=True)
            used = [i for i, g in enumerate(grads) if g.requires_grad]
            self._graph = seed, used, [grads[i] for i in used]
        return self._graph


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    seeds: Sequence[Tensor] | None,
    batched: bool = False,
    *,
    keep: bool = False,
) -> Sequence[Tensor]:
    """torch.autograd.grad that keeps the graph and says in our words what is wrong with it."""
    try:
        return torch.autograd.grad(
            outputs, inputs, seeds, retain_graph=True, create_graph=keep, is_grads_batched=batched,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
    except RuntimeError as error:
        text = str(error)
        ways_out = {
            "a second time": "the graph of the logits is freed: call loss.backward(retain_graph=True)",
            "does not currently support double backward": "a compiled model has no second derivative: pass logits as"
            " a callable that runs the module before torch.compile",
            "attention": "fused attention has no second derivative: make the logits under twice_differentiable(),"
            " or pass them as a callable",
            "modified by an inplace operation": "a parameter changed since the logits were made: multiply before any"
            " optimizer steps",
        }
        for sign, way_out in ways_out.items():
            if sign in text:
                raise ConfigError(f"curvature: {way_out}") from error
        raise
