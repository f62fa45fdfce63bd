"""What a step costs, and how exact the curvature products are: the part of `bench optim` without training.

step_costs   optimizer.step() alone on the parameters of a kernel of 0.1, 1 and 13 M parameters with fixed random
             gradients: turns of ten steps (a whole period of those that refresh every ten) alternate with turns
             of AdamW(fused) in one process; CPU time, the median over turns of the ratio
products     F v of FisherBlock against matrices made by other means, float64: explicit Jacobians with
             torch.func, label enumeration, and torch's own Hessian; largest error relative to the largest entry
"""

from __future__ import annotations

import contextlib
import io
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from constellation.config import Kernel
from constellation.experiments.optim_peers import BASELINE, ROWS, Optimizer
from constellation.experiments.optim_tasks import TaskProblem
from constellation.geometry.fisher import KINDS, FisherBlock, flatten
from constellation.kernel.model import KernelLM

SIZES = {
    "0.1 M": Kernel(vocab_size=256, width=64, layers=2, heads=2, hidden=176, context=64),
    "1 M": Kernel(vocab_size=1024, width=128, layers=4, heads=4, hidden=344, context=128),
    "13 M": Kernel(vocab_size=6144, width=384, layers=6, heads=6, hidden=1024, context=256),
}
TURN, TURNS = 10, 5
PATIENCE_S = 1.5  # a turn longer than this is cut to fewer steps and there are three of them
SKIP = ("exact_ng", "hybrid_diagonal", "hybrid_exact", "adaptive")  # they need a basin or a likelihood


def measure(sizes: Sequence[str], rows: Sequence[str] | None = None) -> dict[str, Any]:
    """Both parts, on the CPU and on a GPU where there is one; `rows` None: all."""
    torch.set_num_threads(1)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    costs = {d: {size: step_costs(SIZES[size], d, rows) for size in sizes} for d in devices}
    return {"step_costs": costs, "products": products()}


def step_costs(config: Kernel, device: str = "cpu", rows: Sequence[str] | None = None) -> dict[str, Any]:
    """{row: {"ms", "ratio"}} or {row: {"failed"}}; the baseline's ratio is 1."""
    baseline = _stepper(BASELINE, config, device)
    out: dict[str, Any] = {}
    for name in (r for r in ROWS if r not in SKIP and (rows is None or r in rows)):
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                out[name] = _against(_stepper(name, config, device), baseline, device)
        except Exception as error:
            out[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    return {"parameters": KernelLM(config).num_parameters(), "rows": out}


@dataclass(frozen=True)
class _Contestant:
    optimizer: Optimizer
    params: list[nn.Parameter]
    grads: list[Tensor]

    def step(self) -> None:
        for p, g in zip(self.params, self.grads):  # heavyball takes them away
            p.grad = g
        self.optimizer.step()


def _stepper(name: str, config: Kernel, device: str) -> _Contestant:
    model = KernelLM(config).to(device)
    generator = torch.Generator().manual_seed(0)
    grads = [(1e-3 * torch.randn(p.shape, generator=generator)).to(device) for p in model.parameters()]

    def nothing(*_: Any) -> Any:
        raise AssertionError("a step cost has no data")

    optimizer = ROWS[name].build(TaskProblem(model, nothing, nothing, nothing, nothing, ""), 1e-4, 0.5)
    if hasattr(optimizer, "train"):  # schedule-free steps in this mode only
        optimizer.train()
    return _Contestant(optimizer, list(model.parameters()), grads)


def _turn(contestant: _Contestant, steps: int, device: str) -> float:
    """Seconds of one step, the mean over `steps`."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    began = clock()
    for _ in range(steps):
        contestant.step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (clock() - began) / steps


def _against(mine: _Contestant, baseline: _Contestant, device: str) -> dict[str, Any]:
    for contestant in (mine, baseline):  # the first steps make state
        _turn(contestant, 2, device)
    once = _turn(mine, 1, device)
    steps = TURN if once * TURN <= PATIENCE_S else max(1, round(PATIENCE_S / once))
    turns = TURNS if steps == TURN else 3
    pairs = [(_turn(mine, steps, device), _turn(baseline, TURN, device)) for _ in range(turns)]
    times, ratios = [a for a, _ in pairs], [a / b for a, b in pairs]
    cut = {} if steps == TURN else {"note": f"turns of {steps} steps: refreshes may be missed or counted too often"}
    return {"ms": 1000 * statistics.median(times), "ratio": statistics.median(ratios), "turns": ratios, **cut}


def products(seed: int = 0) -> dict[str, float]:
    """{kind: largest |F v - oracle v| / largest |oracle v|} for the four kinds."""
    generator = torch.Generator().manual_seed(seed)
    first, last = nn.Linear(6, 8, dtype=torch.float64), nn.Linear(8, 5, dtype=torch.float64)
    params = [*first.parameters(), *last.parameters()]
    with torch.no_grad():
        for p in params:
            p.normal_(0, 0.5, generator=generator)
    x_ND = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    y_N = torch.randint(0, 5, (12,), generator=generator)

    def outputs(flat: Tensor) -> Tensor:
        cut = torch.split(flat, [p.numel() for p in params])
        w1, b1, w2, b2 = (v.view(p.shape) for v, p in zip(cut, params))
        return torch.tanh(x_ND @ w1.T + b1) @ w2.T + b2

    theta = flatten(params)
    jacobian = torch.func.jacrev(outputs)(theta)  # (N, V, P)
    p_NV = outputs(theta).softmax(-1)
    eye = torch.eye(5, dtype=torch.float64)

    def from_labels(labels: list[Tensor]) -> Tensor:
        """(1/N) sum of outer products of the gradients of -log p_y, mean over the draws."""
        grads = [torch.einsum("nvp,nv->np", jacobian, p_NV - eye[y]) for y in labels]
        return sum((g.T @ g for g in grads), torch.zeros(len(theta), len(theta), dtype=theta.dtype)) / (12 * len(grads))

    enumerated = torch.einsum(
        "nvp,nk,nkv,nkw,nwq->pq", jacobian, p_NV, p_NV[:, None] - eye, p_NV[:, None] - eye, jacobian
    )
    draw = torch.Generator().manual_seed(7)
    drawn = [torch.multinomial(p_NV, 1, generator=draw)[:, 0] for _ in range(3)]
    loss = lambda flat: nn.functional.cross_entropy(outputs(flat), y_N)  # noqa: E731
    oracles = {
        "exact": enumerated / 12, "sampled": from_labels(drawn), "empirical": from_labels([y_N]),
        "hessian": torch.func.hessian(loss)(theta),
    }  # fmt: skip
    errors = {}
    vectors = torch.randn(4, len(theta), generator=generator, dtype=torch.float64)
    for kind in KINDS:
        logits = last(torch.tanh(first(x_ND)))
        draws = {"generator": torch.Generator().manual_seed(7), "samples": 3} if kind == "sampled" else {}
        block = FisherBlock(logits, params, kind=kind, targets=y_N, **draws)  # type: ignore[arg-type]
        gaps = [(block.matvec(v) - oracles[kind] @ v).abs().max() / (oracles[kind] @ v).abs().max() for v in vectors]
        errors[kind] = float(max(gaps))
    assert all(math.isfinite(e) for e in errors.values())
    return errors
