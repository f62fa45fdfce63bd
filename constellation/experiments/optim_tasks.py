"""The tasks of `bench optim`, one row each: a model, a batch as a pure function of the step, a held-out metric.

    char       character GPT, 0.12 M parameters, on text                      noisy, nats per byte
    bpe        BPE GPT, 0.9 M parameters, on text                             noisy, nats per token
    basin      BPE GPT whose embedding is factorised through basin coordinates noisy, nats per token
    digits     deep autoencoder of digits, Bernoulli pixels                   noisy, nats per image
    logistic   logistic regression, Hessian of condition 1e6 or more          deterministic, nats above the optimum
    rosenbrock chained Rosenbrock valley as least squares                     deterministic, f above 0
    poisson    physics-informed network of Poisson's equation, float64        deterministic, relative L2 error

A `TaskProblem` is a task at one seed. `outputs(x)` are the natural parameters of its likelihood, so that a
curvature product can be formed from them: class logits, Bernoulli logits or Gaussian residuals.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from constellation.config import Data, Kernel
from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.batches import Batches
from constellation.data.corpus import read_corpus
from constellation.experiments import optim_problems as problems
from constellation.kernel.model import KernelLM
from constellation.storage.atomic import read_json, write_folder, write_json

TRAIN_BYTES, DEV_WINDOWS, VOCAB = 6_000_000, 32, 1024


@dataclass(frozen=True)
class TaskProblem:
    """A task at one seed."""

    model: nn.Module
    batch: Callable[[int], tuple[Tensor, Tensor]]  # (x, y) of a step
    outputs: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]  # of outputs and y, mean nats
    metric: Callable[[], float]  # held out where there is something to hold out; lower is better
    likelihood: str  # softmax | bernoulli | gaussian
    jacobian: Callable[[], Tensor] | None = None  # d outputs / d parameters, where cheaper than the graph

    def rows(self, x: Tensor) -> Tensor:
        """Outputs as rows (N, V), what curvature is formed from."""
        return self.outputs(x).flatten(0, -2)

    def targets(self, y: Tensor) -> Tensor:
        """Targets of those rows."""
        return y.flatten() if self.likelihood == "softmax" else y.flatten(0, -2)


@dataclass(frozen=True)
class Task:
    """How one task is run. `rungs` are parts of `steps` (or of `seconds`), each run with its own whole schedule."""

    name: str
    title: str
    metric: str
    build: Callable[[Path, int], TaskProblem]  # of the data folder and a seed
    rows: tuple[str, ...]  # names in optim_peers.ROWS, the baseline first
    steps: int = 0
    seconds: float = 0.0  # CPU-seconds of a run, instead of steps
    tune: float = 0.5  # part of the run in which the rows are tuned; the baseline always on the whole where steps count
    rungs: tuple[float, ...] = (0.3, 0.45, 0.65, 1.0)
    studies: int = 3
    span: tuple[float, float] = (0.25, 16.0)  # learning rates tried, in units of each row's default
    log_metric: bool = False  # interpolate in log(metric)
    curvature: float = 0.125  # part of a batch an exact product is formed from
    step_ms: float = 5.0  # CPU time of an AdamW step on one core of a small server, for the estimate alone
    tags: frozenset[str] = field(default_factory=frozenset)  # "lm": counts towards the goals on small language models


def prepare(corpus: Path | None, digits: Path | None, folder: Path) -> str:
    """Write tokens and digits into `folder`, once; returns a hash of what was read."""
    key = f"{corpus.resolve() if corpus else 'embedded'} {digits.resolve() if digits else 'load_digits'}"
    made = folder / "data.json"
    if made.exists() and read_json(made)["key"] == key:
        return str(read_json(made)["hash"])
    documents = read_corpus(corpus, Data())
    train, dev = documents.split(0.05)
    order = sorted(train, key=lambda d: d.id)  # ids are hashes: all domains among the first bytes
    kept, total = [], 0
    for document in order:
        if total < TRAIN_BYTES:
            kept.append(document.text)
            total += document.num_bytes
    held = [d.text for d in sorted(dev, key=lambda d: d.id)]
    tokenizer = Tokenizer.train(kept, VOCAB)

    def bytes_of(texts: list[str]) -> NDArray[np.uint16]:
        return np.frombuffer(b"\0".join(t.encode() for t in texts), np.uint8).astype(np.uint16)

    def merged(texts: list[str]) -> NDArray[np.uint16]:
        return np.array([i for ids in tokenizer.encode_batch(texts) for i in [*ids, tokenizer.eos]], np.uint16)

    arrays: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {
        "char": (bytes_of(kept), bytes_of(held)),
        "bpe": (merged(kept), merged(held)),
        "digits": problems.read_digits(digits),
    }
    digest = hashlib.sha256(b"".join(a.tobytes() for pair in arrays.values() for a in pair)).hexdigest()[:12]

    def fill(path: Path) -> None:
        for name, (first, second) in arrays.items():
            np.save(path / f"{name}.train.npy", first, allow_pickle=False)
            np.save(path / f"{name}.dev.npy", second, allow_pickle=False)
        write_json(path / "data.json", {"key": key, "hash": digest})

    write_folder(folder, fill)
    return digest


def _load(folder: Path, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.load(folder / f"{name}.train.npy"), np.load(folder / f"{name}.dev.npy")


@dataclass(frozen=True)
class _Stream:
    tokens: NDArray[np.integer]


def _language_model(folder: Path, data: str, model: nn.Module, context: int, batch: int, seed: int) -> TaskProblem:
    train, dev = (_Stream(a) for a in _load(folder, data))
    stream = Batches(train, None, context, batch, seed)
    held = [torch.from_numpy(a) for a in Batches(dev, None, context, DEV_WINDOWS * 1024 // (8 * context), 0).at(0)]

    def at(step: int) -> tuple[Tensor, Tensor]:
        x, y = stream.at(step)
        return torch.from_numpy(x), torch.from_numpy(y)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    @torch.no_grad()
    def metric() -> float:
        return float(loss(model(held[0]), held[1]))

    return TaskProblem(model, at, model, loss, metric, "softmax")


def _kernel(seed: int, **settings: int) -> KernelLM:
    return KernelLM(Kernel(**settings), seed=seed)  # type: ignore[arg-type]


def char(folder: Path, seed: int) -> TaskProblem:
    model = _kernel(seed, vocab_size=256, width=64, layers=2, heads=2, hidden=176, context=64)
    return _language_model(folder, "char", model, 64, 16, seed)


def bpe(folder: Path, seed: int) -> TaskProblem:
    model = _kernel(seed, vocab_size=VOCAB, width=128, layers=4, heads=4, hidden=344, context=128)
    return _language_model(folder, "bpe", model, 128, 8, seed)


def basin(folder: Path, seed: int) -> TaskProblem:
    model = _kernel(seed, vocab_size=VOCAB, width=64, layers=2, heads=2, hidden=176, context=64)
    problems.factorise(model, coordinates=16, seed=seed)
    return _language_model(folder, "bpe", model, 64, 8, seed)


def digits(folder: Path, seed: int) -> TaskProblem:
    train, dev = (torch.from_numpy(a) for a in _load(folder, "digits"))
    model = problems.autoencoder(train.shape[1], seed)

    def at(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(train), (128,), generator=torch.Generator().manual_seed(1_000_003 * seed + step))
        return train[rows], train[rows]

    def loss(z: Tensor, y: Tensor) -> Tensor:  # nats per image
        return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(y)

    @torch.no_grad()
    def metric() -> float:
        return float(loss(model(dev), dev))

    return TaskProblem(model, at, model, loss, metric, "bernoulli")


def logistic(folder: Path, seed: int) -> TaskProblem:
    x, y, optimum = problems.logistic_data(seed)
    model = nn.Linear(x.shape[1], 2, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)

    def metric() -> float:
        with torch.no_grad():
            return max(float(F.cross_entropy(model(x), y)) - optimum, 1e-16)

    return TaskProblem(model, lambda step: (x, y), model, F.cross_entropy, metric, "softmax")


def rosenbrock(folder: Path, seed: int) -> TaskProblem:
    model = problems.Valley(seed)
    return _least_squares(model, torch.zeros(1), lambda: float(model(torch.zeros(1)).square().sum().detach()))


def poisson(folder: Path, seed: int) -> TaskProblem:
    model = problems.Poisson(seed)
    return _least_squares(model, model.points, model.error)


def _least_squares(model: problems.Valley | problems.Poisson, x: Tensor, metric: Callable[[], float]) -> TaskProblem:
    """f = |r|^2 / 2 of all residuals r = outputs(x)."""
    with torch.no_grad():
        zero = torch.zeros_like(model(x))

    def loss(r: Tensor, y: Tensor) -> Tensor:
        return (r - y).square().sum() / 2

    return TaskProblem(model, lambda step: (x, zero), model, loss, metric, "gaussian", model.jacobian)


_KRON = ("kron_muon", "kron_soap", "kron_kl_shampoo", "kron_soap_muon")
_DIAGONAL = ("qig_diagonal", "diagonal")
_PEERS = ("muon", "pytorch_optimizer_soap")  # on every noisy task; heavyball's steps are too slow for all of them
_HEAVYBALL = ("heavyball_soap", "heavyball_psgd")
_LM, _LM_SPAN = frozenset({"lm"}), (0.5, 128.0)
TASKS = {
    task.name: task
    for task in (
        Task("char", "character GPT, 0.12 M", "nats/byte", char,
             ("adamw", *_DIAGONAL, "simple_fisher", "curvature_scaled", *_KRON, *_PEERS, *_HEAVYBALL, "schedulefree"),
             steps=220, span=_LM_SPAN, step_ms=18, tags=_LM),
        Task("bpe", "BPE GPT, 0.9 M", "nats/token", bpe, ("adamw", "kron_muon", "kron_soap", "kron_soap_muon", *_PEERS),
             steps=90, rungs=(0.25, 0.4, 0.6, 1.0), studies=1, span=_LM_SPAN, step_ms=95, tags=_LM),
        Task("basin", "GPT with a basin block, 0.12 M", "nats/token", basin,
             ("adamw", "qig_diagonal", "hybrid_diagonal", "hybrid_exact", "adaptive", "kron_muon", "kron_soap",
              "kron_soap_muon", *_PEERS),
             steps=200, rungs=(0.3, 0.45, 0.65, 1.0), studies=2, span=_LM_SPAN, step_ms=14),
        Task("digits", "deep autoencoder of digits", "nats/image", digits,
             ("adamw", *_DIAGONAL, *_KRON, *_PEERS, "heavyball_psgd"),
             steps=300, rungs=(0.15, 0.3, 0.45, 0.65, 1.0), span=(0.25, 32.0), step_ms=2.5),
        Task("logistic", "logistic regression, condition 1e6", "nats above the optimum", logistic,
             ("adamw", *_DIAGONAL, "kron_soap", "exact_ng", "curvature_scaled", *_PEERS),
             steps=400, rungs=(0.01, 0.03, 0.1, 0.3, 1.0), span=(0.25, 1024.0), log_metric=True, curvature=1.0,
             step_ms=0.3),
        Task("rosenbrock", "chained Rosenbrock valley", "f", rosenbrock,
             ("adamw", *_DIAGONAL, "exact_ng", "simple_fisher"),
             steps=400, rungs=(0.03, 0.1, 0.3, 1.0), span=(0.25, 1024.0), log_metric=True, curvature=1.0, step_ms=0.3),
        Task("poisson", "Poisson PINN, float64", "relative L2", poisson, ("adamw", "kron_soap", "exact_ng"),
             seconds=25.0, tune=0.24, rungs=(1.0,), span=(0.25, 32.0), log_metric=True, curvature=1.0),
    )
}  # fmt: skip
