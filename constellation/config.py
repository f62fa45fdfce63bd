"""A run as frozen data on one page: no torch, no ray, nothing happens here.

Every field says meaning, unit and range. A preset (presets.py) is a function that returns a
`Config`; the one way to change it is dotted names, `override(config, {"optim.lr": "1e-3"})`, the
same dictionary for the command line, a sweep's search space and the diff in summary.json.
A name that begins with a role (`heart.optim.lr=1e-3`) changes that role alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from constellation import roster
from constellation.errors import ConfigError
from constellation.roster import OCEAN

OPTIMIZERS = (
    "kronecker_ng", "diagonal_ng", "qig_diagonal_ng", "basin_ng", "mixed_qig", "adaptive_mixed_qig", "simple_fisher",
    "curvature_sgd", "adamw",
)  # fmt: skip


@dataclass(frozen=True)
class Constellation:
    """Which kernels there are (constellation/roster.py)."""

    kernels: int = 8  # how many, 2 .. 240; their names and roots follow


@dataclass(frozen=True)
class Kernel:
    """The language model of one kernel (kernel/model.py)."""

    vocab_size: int = 1024  # tokens, the 16 special ones included, >= 272
    width: int = 128  # D, residual stream
    layers: int = 3  # blocks
    heads: int = 4  # H; width / heads must be even (rotary pairs)
    hidden: int = 344  # inner width of SwiGLU
    context: int = 256  # T, tokens a position can see, itself included
    metric: str = "fidelity"  # attention logit: "fidelity" c cos(theta) | "dot" q.k / sqrt(d)
    coupling: str = "fixed"  # inverse temperature c(L) = c0 (1 + beta ln(L/L_ref)): "fixed" | "off" | "learned" beta
    coupling_beta: float = 0.44  # beta when fixed, and where learning starts
    coupling_ref: int = 32  # L_ref, visible keys
    look_back: int = 1  # 1: the embedding of the token before is mixed in, per channel; 0: not
    rope_base: float = 10_000.0  # longest rotary wavelength / 2 pi, positions


@dataclass(frozen=True)
class AdaptiveConfig:
    """When AdaptiveMixedQIG takes a natural step (optim/gate.py): any trigger opens, the budget closes.

    The first eight are the columns of the phase table, the rest what the optimizer measures itself.
    """

    min_kappa_for_ng: float = 40.0  # kappa_eff above it opens; 64: as curved as the run's own reference
    min_basin_distance: float = 0.6  # radians to the reference model; above it opens
    force_ng_every_n_steps: int = 50  # steps; opens at its multiples; 0: never
    exploration_triggers_ng: bool = True  # curiosity regime EXPLORATION opens
    geometric_triggers_ng: bool = True  # regime geometric, phi > 0.7 and kappa > 30 open
    stuck_triggers_ng: bool = True  # curiosity regime STUCK opens
    use_curiosity: bool = True  # curiosity above the next opens where kappa > 25 or the distance > 0.4
    min_curiosity: float = 0.05  # nats of held-out loss per evaluation
    max_overhead: float = 1.3  # seconds of the run over those of cheap steps alone, never exceeded; 0: no budget
    max_staleness: float = 0.0  # radians the mean gradient may turn since the last natural step; 0: not measured
    min_reduction_ratio: float = 0.0  # actual / predicted reduction below it closes, forced steps aside; 0: any
    must_pay: bool = False  # closes, forced steps aside, when a nat costs more natural than cheap seconds
    kappa_every: int = 10  # steps between own measurements of kappa_eff, a product each; 0: from telemetry alone

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ConfigError(f"AdaptiveConfig: {name}={value} must be at least 0")
        if 0 < self.max_overhead < 1:
            raise ConfigError(f"AdaptiveConfig: max_overhead={self.max_overhead} must be above 1, or 0 for no budget")


# optim.phase stands for its row of the first eight fields; late and fine_tune refine, so they ask less often
PHASES: dict[str, tuple[float | bool, ...]] = {
    "early": (30.0, 0.4, 20, True, True, True, True, 0.03),
    "middle": (40.0, 0.6, 50, True, True, True, True, 0.05),
    "late": (50.0, 0.8, 100, True, False, True, True, 0.08),
    "fine_tune": (60.0, 1.0, 200, False, False, True, False, 0.10),
}


def phase_settings(phase: str) -> dict[str, Any]:
    """The row of `phase` as AdaptiveConfig's fields."""
    if phase not in PHASES:
        raise ConfigError(f"optim.phase={phase!r}: choose one of {', '.join(PHASES)}")
    fields = [f.name for f in dataclasses.fields(AdaptiveConfig)]
    return dict(zip(fields, PHASES[phase], strict=False))


@dataclass(frozen=True)
class Optim:
    """The optimizer (constellation/optim)."""

    name: str = "kronecker_ng"  # see OPTIMIZERS
    lr: float = 4e-3  # peak learning rate
    momentum: float = 0.9  # EMA of gradients, diagonal steps
    kronecker_momentum: float = 0.95  # the same of the Kronecker steps
    fisher_decay: float = 0.95  # EMA of the squared gradient, the diagonal Fisher
    power: float = 0.5  # step = m / (F^power + damping); 0.5 seed default, 1.0 natural gradient
    damping: float = 1e-8  # lambda, same unit as F^power
    weight_decay: float = 0.1  # decoupled, matrices only
    variant: str = "muon"  # of kronecker_ng: muon | soap | kl_shampoo | soap_muon
    ns_precision: str = "auto"  # of its Newton-Schulz products: fp32 | bf16 | auto: as train.precision
    basin: str = "*basin*,*embed*"  # parameter names of the basin block, comma-separated patterns; mixed_qig, adaptive
    use_exact_ng: bool = False  # the basin block by exact Fisher products; else by the Fisher diagonal
    lr_ng: float = 1e-2  # peak learning rate of the basin block's natural steps
    rest_optimizer: str = "adamw"  # of all other parameters: adamw | diagonal_ng | kron
    cg_iters: int = 8  # conjugate-gradient steps of an exact natural step
    cg_damping: float = 1e-3  # lambda of the exact block, unit of the Fisher matrix
    curvature: str = "ema_grad2"  # of curvature_sgd: ema_grad2 | hutchinson_hessian | empirical_fisher | gauss_newton
    exponent: float = 0.5  # q: rate of a parameter = clip(lr (c + eps)^-q); 0.5 seed default, 1.0 Newton
    probes: int = 8  # random probes of a curvature diagonal, >= 2
    refresh: int = 20  # steps between curvature diagonals
    phase: str = "middle"  # sets the first eight fields of gate: early | middle | late | fine_tune
    gate: AdaptiveConfig = field(default_factory=AdaptiveConfig)  # of adaptive_mixed_qig


@dataclass(frozen=True)
class Train:
    """How one model, or the whole constellation, is trained (constellation/train)."""

    tokens: int = 3_000_000  # training tokens of the WHOLE constellation, OCEAN's share included
    ocean_share: float = 0.5  # part of them that trains OCEAN, the common branch point, (0, 1)
    batch: int = 8  # sequences in a step of OCEAN
    kernel_batch: int = 4  # sequences in a step of a kernel
    accumulation: int = 1  # micro-batches a step is cut into
    warmup: float = 0.05  # part of OCEAN's run in which lr rises
    kernel_warmup: float = 0.0  # the same for a kernel
    ocean_decay: float = 0.0  # part of OCEAN's run, at its end, in which lr falls to zero (linear); 0: undecayed
    decay: float = 0.6  # the same for a kernel
    kernel_lr_scale: float = 1.0  # kernels' peak lr / OCEAN's
    inherit_optimizer: int = 1  # 1: kernels start with OCEAN's optimizer state, 0: with an empty one
    clip: float = 1.0  # largest gradient norm
    precision: str = "auto"  # fp32 | bf16 | auto: the processor is asked once, then it is written into the run
    threads: int = 1  # CPU threads of one kernel
    ocean_threads: int = 1  # CPU threads of OCEAN, which trains alone; more pay only on idle cores
    loss_chunk: int = 2048  # rows of logits that exist at once
    eval_every: int = 0  # steps between evaluations on dev text; 0: at the end only
    eval_bytes: int = 65_536  # dev text scored by an evaluation
    checkpoint_every: int = 50  # steps
    keep_last: int = 2  # newest checkpoints kept, >= 1
    keep_best: int = 1  # checkpoints with the lowest dev bits per byte kept
    sample_bytes: int = 160  # length of the sample text written at each evaluation; 0: none
    seed: int = 0  # initialisation, data order, clustering


@dataclass(frozen=True)
class Data:
    """Reading a corpus (constellation/data)."""

    dev_fraction: float = 0.05  # part of each domain's bytes held out, by document, (0, 0.5]
    max_document_bytes: int = 1_048_576  # a longer document is cut into parts
    max_line_bytes: int = 67_108_864  # a longer jsonl line is counted as broken
    tokenizer_bytes: int = 16_777_216  # text the tokenizer is trained on


@dataclass(frozen=True)
class Router:
    """Fit and decisions of the router (router/)."""

    bins: int = 4096  # hashed byte trigrams
    smoothing: float = 100.0  # mu, pseudo-counts of the corpus mean
    dims: int = 64  # n, basin coordinates
    min_prefix: int = 16  # bytes, shortest prefix used in the fit
    max_prefix: int = 2048  # bytes, longest
    every: int = 64  # W, bytes between decisions
    hysteresis: float = 0.1  # nats the new best must lead by before a hand-off
    abstain_below: float = 0.0  # tau, least posterior of an answer; 0: only the distance abstains
    abstain_quantile: float = 0.999  # distance to the nearest centre beyond this training quantile abstains
    top_k: int = 1  # kernels that answer together


@dataclass(frozen=True)
class Decode:
    """How a kernel writes (kernel/engine.py)."""

    precision: str = "fp32"  # of the products: fp32 | int8, CPUs alone, faster and not the same text
    slots: int = 32  # requests of one kernel under way at once; others wait


@dataclass(frozen=True)
class Cluster:
    """What Ray is asked for (actors/)."""

    cpus_per_kernel: float = 0.25  # logical CPUs of one kernel actor
    gpus_per_kernel: float = 0.0  # GPUs of one kernel actor, fractions allowed
    placement_timeout_s: float = 60.0  # how long to wait for a cluster that could fit but is busy
    max_restarts: int = 20  # of one kernel actor before the run fails
    resident: int = 0  # kernels that train at once; 0: one a core on a machine of our own, all on a cluster


@dataclass(frozen=True)
class Config:
    preset: str = "small"
    constellation: Constellation = field(default_factory=Constellation)
    kernel: Kernel = field(default_factory=Kernel)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    data: Data = field(default_factory=Data)
    router: Router = field(default_factory=Router)
    decode: Decode = field(default_factory=Decode)
    cluster: Cluster = field(default_factory=Cluster)
    roles: dict[str, dict[str, Any]] = field(default_factory=dict)  # role -> dotted overrides of it alone

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels, in the order of their numbers."""
        return roster.names(self.constellation.kernels)

    @property
    def models(self) -> tuple[str, ...]:
        """OCEAN and the kernels."""
        return (OCEAN, *self.kernels)

    def for_role(self, role: str) -> Config:
        """This configuration as the given role sees it."""
        return override(self, self.roles.get(role, {}))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_CHOICES = {
    "kernel.metric": ("fidelity", "dot"),
    "kernel.coupling": ("fixed", "off", "learned"),
    "decode.precision": ("fp32", "int8"),
    "optim.name": OPTIMIZERS,
    "optim.variant": ("muon", "soap", "kl_shampoo", "soap_muon"),
    "optim.rest_optimizer": ("adamw", "diagonal_ng", "kron"),
    "optim.curvature": ("ema_grad2", "hutchinson_hessian", "empirical_fisher", "gauss_newton"),
    "optim.ns_precision": ("auto", "fp32", "bf16"),
    "optim.phase": tuple(PHASES),
    "train.precision": ("auto", "fp32", "bf16"),
}
_SIGNED = {"kernel.coupling_beta"}  # may be negative
_MAY_BE_ZERO = {
    "kernel.look_back",
    "optim.momentum", "optim.kronecker_momentum", "optim.weight_decay", "optim.damping", "train.warmup",
    "train.kernel_warmup", "train.decay", "train.ocean_decay", "train.inherit_optimizer", "train.eval_every",
    "train.keep_best", "train.sample_bytes", "train.seed", "router.hysteresis", "router.abstain_below",
    "cluster.cpus_per_kernel", "cluster.gpus_per_kernel", "cluster.resident", "optim.exponent", "optim.cg_damping",
    *(f"optim.gate.{f.name}" for f in dataclasses.fields(AdaptiveConfig)),
}  # fmt: skip
_AT_MOST_ONE = {
    "kernel.look_back",
    "optim.momentum", "optim.kronecker_momentum", "optim.fisher_decay", "train.ocean_share", "train.warmup",
    "train.kernel_warmup", "train.decay", "train.ocean_decay", "train.inherit_optimizer", "data.dev_fraction",
    "router.abstain_below", "router.abstain_quantile",
}  # fmt: skip


def from_json(data: Mapping[str, Any]) -> Config:
    """A Config from `to_json()`; unknown and missing fields are named."""
    flat = dict(_flatten(data))
    roles = flat.pop("roles", {})
    unknown = sorted(set(flat) - set(names()))
    if unknown:
        raise ConfigError(f"config: unknown field {unknown[0]!r}; this file was written by another version")
    config = _build(flat)
    return dataclasses.replace(config, roles={r: dict(v) for r, v in roles.items()})


def names() -> list[str]:
    """All dotted names, in reading order."""
    return [name for name, _ in _flatten(Config().to_json()) if name != "roles"]


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with dotted names replaced, all together, validated once.

    Values may be strings (parsed by the field's type) or of the field's type.
    """
    flat = dict(_flatten(config.to_json()))
    roles = {r: dict(v) for r, v in flat.pop("roles").items()}
    for name, value in _spread_phases(changes).items():
        head, _, rest = name.partition(".")
        if roster.is_kernel(head):
            _check_name(rest, prefix=head + ".")
            roles.setdefault(head, {})[rest] = _parse(rest, value)
        else:
            _check_name(name)
            flat[name] = _parse(name, value)
    changed = dataclasses.replace(_build(flat), roles=roles)
    for role, own in roles.items():  # a role's changes must be valid together with the rest
        if role not in changed.kernels:
            kernels = changed.constellation.kernels
            raise ConfigError(f"{role}.{next(iter(own))}: a constellation of {kernels} kernels has none called {role}")
        bad = [
            n
            for n in own
            if n.startswith(("constellation.", "kernel.", "data.", "router.", "decode.", "cluster.", "preset"))
        ]
        if bad:
            raise ConfigError(f"{role}.{bad[0]}: a role may change optim.* and train.* only; kernels share the rest")
        _build({**flat, **own})
    return changed


def _spread_phases(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` with each phase followed by its row of the gate; what is named beside a phase wins."""
    spread: dict[str, Any] = {}
    for name, value in changes.items():
        if name == "optim.phase" or name.endswith(".optim.phase"):
            row = phase_settings(value)
            spread |= {f"{name.removesuffix('phase')}gate.{key}": own for key, own in row.items()}
    return spread | dict(changes)


def difference(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old value, new value) of every setting that differs."""
    a, b = dict(_flatten(old.to_json())), dict(_flatten(new.to_json()))
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


def parse_assignments(words: typing.Iterable[str]) -> dict[str, str]:
    """`["optim.lr=1e-3"]` -> `{"optim.lr": "1e-3"}`."""
    changes: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"{word!r} is not of the form key=value, such as optim.lr=1e-3")
        if name in changes:
            raise ConfigError(f"{name} is given twice")
        changes[name] = value
    return changes


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and key != "roles":
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _types() -> dict[str, type]:
    return {name: type(value) for name, value in _flatten(Config().to_json())}


def _check_name(name: str, prefix: str = "") -> None:
    known = names()
    if name not in known:
        last = name.rpartition(".")[2]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        near += [n for n in known if n.rpartition(".")[2] == last and n not in near]
        hint = f"; near it: {', '.join(prefix + n for n in near[:3])}" if near else f"; known: {', '.join(known)}"
        raise ConfigError(f"unknown setting {prefix + name!r}{hint}")


def _parse(name: str, value: Any) -> Any:
    kind = _types()[name]
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
            raise ValueError
        if kind is int:
            number = float(value) if isinstance(value, str) else value
            if number != int(number):
                raise ValueError
            return int(number)
        return kind(value)
    except (ValueError, TypeError, OverflowError, KeyError):
        wanted = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}[kind.__name__]
        raise ConfigError(f"{name}={value!r}: {wanted} is wanted, such as {name}={_default(name)}") from None


def _default(name: str) -> Any:
    return dict(_flatten(Config().to_json()))[name]


def _construct(kind: type, flat: Mapping[str, Any]) -> Any:
    """The record `kind` from dotted names of its fields and of its records' fields."""
    own: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        head, dot, rest = name.partition(".")
        if dot:
            parts.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    hints = typing.get_type_hints(kind)
    return kind(**own, **{head: _construct(hints[head], values) for head, values in parts.items()})


def _build(flat: Mapping[str, Any]) -> Config:
    for name, value in flat.items():
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ConfigError(f"{name}={value!r}: choose one of {', '.join(_CHOICES[name])}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in _SIGNED:
            low_ok = value >= 0 if name in _MAY_BE_ZERO else value > 0
            if not low_ok or value != value or value == float("inf"):
                bound = "at least 0" if name in _MAY_BE_ZERO else "above 0"
                raise ConfigError(f"{name}={value}: must be finite and {bound}")
            if name in _AT_MOST_ONE and value > 1:
                raise ConfigError(f"{name}={value}: must be at most 1")
    config: Config = _construct(Config, flat)
    roster.names(config.constellation.kernels)
    k, t = config.kernel, config.train
    if k.width % k.heads or (k.width // k.heads) % 2:
        raise ConfigError(f"kernel.width={k.width} / kernel.heads={k.heads}: must be an even whole number")
    if k.vocab_size < 272:
        raise ConfigError(f"kernel.vocab_size={k.vocab_size}: must be at least 272 (256 bytes + 16 special tokens)")
    if t.ocean_share >= 1:
        raise ConfigError(f"train.ocean_share={t.ocean_share}: must be below 1, or no tokens are left for the kernels")
    for name, size in (("batch", t.batch), ("kernel_batch", t.kernel_batch)):
        if size % t.accumulation:
            raise ConfigError(f"train.{name}={size}: must be a multiple of train.accumulation={t.accumulation}")
    if config.optim.probes < 2:
        raise ConfigError(f"optim.probes={config.optim.probes}: must be at least 2, or no standard error exists")
    if config.data.dev_fraction > 0.5:
        raise ConfigError(f"data.dev_fraction={config.data.dev_fraction}: must be at most 0.5")
    if config.router.min_prefix > config.router.max_prefix:
        raise ConfigError("router.min_prefix: must not exceed router.max_prefix")
    return config
