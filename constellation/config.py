"""A run as frozen data on one page: no torch, no ray, nothing happens here.

Every field says meaning, unit and range (settings.py), and a Config that exists is valid. A preset (presets.py)
is a function that returns one; the one way to change it is dotted names, `override(config, {"optim.lr": "1e-3"})`,
the same dictionary for the command line, a sweep's search space and the diff in summary.json. Names under `optim.`
are those of the optimizer that `optim.name` chooses (optim/registry.py); a name that begins with a role
(`heart.optim.lr=1e-3`) changes that role alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from msgspec import Meta

from constellation import roster
from constellation.errors import ConfigError
from constellation.optim import registry
from constellation.roster import OCEAN
from constellation.settings import Count, NotNegative, Part, Positive, Whole, check, leaves, merged, says
from constellation.topo.settings import Topo


@dataclass(frozen=True)
class Roster:
    """Which kernels there are (constellation/roster.py)."""

    kernels: Annotated[int, Meta(ge=roster.FEWEST, le=roster.MOST), says("how many; their names and roots follow")] = 8


MIN_LOOPS = 3  # of a recursive kernel
PHI = "phi is measured, never optimised: a number that is trained for measures nothing any more; read it from a probe"


@dataclass(frozen=True)
class Kernel:
    """The language model of one kernel (kernel/model.py).

    With loops = R > 1 it is recursive: `prelude` blocks, the tied group of all others R times, `coda` blocks.
    """

    vocab_size: Annotated[int, Meta(ge=272), says("tokens: 256 bytes, 16 special ones and merges")] = 1024
    width: Annotated[Count, says("D, residual stream")] = 128
    layers: Annotated[Count, says("blocks")] = 3
    heads: Annotated[Count, says("H; width / heads must be even (rotary pairs)")] = 4
    kv_heads: Annotated[Whole, says("G, heads of keys and values, each shared by heads / G queries; 0: as heads")] = 0
    hidden: Annotated[Count, says("inner width of SwiGLU")] = 344
    context: Annotated[Count, says("T, tokens a position can see, itself included")] = 256
    metric: Annotated[
        Literal["fidelity", "geodesic", "dot"],
        says("logit: c cos(theta), -c theta^2 / 2 with theta = arccos|cos|, or q.k / sqrt(d)"),
    ] = "fidelity"
    coupling: Annotated[
        Literal["fixed", "off", "learned", "scalable"],
        says("inverse temperature c0 (1 + beta ln(L / L_ref)), beta fixed, 0 or learned; scalable: s ln L, s learned"),
    ] = "fixed"
    coupling_beta: Annotated[float, says("beta when fixed, and where learning starts")] = 0.44
    coupling_ref: Annotated[Count, says("L_ref, visible keys")] = 32
    look_back: Annotated[int, Meta(ge=0, le=1), says("1: the embedding of the token before is mixed in; 0: not")] = 1
    rope_base: Annotated[Positive, says("longest rotary wavelength / 2 pi, positions")] = 10_000.0
    rope_scaling: Annotated[
        Literal["none", "linear", "llama3"], says("how pretrained rotary frequencies were slowed (kernel/rotary.py)")
    ] = "none"
    rope_factor: Annotated[Positive, says("by how much, with a rope_scaling")] = 1.0
    rope_low: Annotated[Positive, says("llama3: fewer turns than this in rope_original are slowed whole")] = 1.0
    rope_high: Annotated[Positive, says("llama3: more turns than this are left as they are")] = 4.0
    rope_original: Annotated[Count, says("llama3: positions before the scaling")] = 8192
    norm_eps: Annotated[Positive, says("added to the mean square in RMSNorm")] = 1e-6
    tied: Annotated[bool, says("the head is the embedding; false: a matrix of its own")] = True
    basin_head: Annotated[bool, says("a second head that predicts the next window's bytes; train.lambda_basin")] = False
    prelude: Annotated[Whole, says("blocks before the loop")] = 0
    loops: Annotated[Count, says("R, times that the blocks between prelude and coda are applied; 1, or at least 3")] = 1
    coda: Annotated[Whole, says("blocks after the loop")] = 0

    @property
    def size(self) -> int:
        """K, channels of a head."""
        return self.width // self.heads

    @property
    def groups(self) -> int:
        """G, heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def order(self) -> tuple[int, ...]:
        """Numbers of the blocks as a token passes them."""
        first, last = self.prelude, self.layers - self.coda
        return (*range(first), *(tuple(range(first, last)) * self.loops), *range(last, self.layers))

    def check(self) -> None:
        """ConfigError, one line that names the setting, unless such a kernel can be built."""
        if self.width % self.heads or self.size % 2:
            raise ConfigError(f"kernel.width={self.width} / kernel.heads={self.heads}: must be an even whole number")
        if self.heads % self.groups:
            raise ConfigError(f"kernel.kv_heads={self.kv_heads}: must divide kernel.heads={self.heads}")
        if 1 < self.loops < MIN_LOOPS:
            raise ConfigError(
                f"kernel.loops={self.loops}: must be at least {MIN_LOOPS} (min_loops), or 1 for no recursion"
            )
        if self.prelude + self.coda >= self.layers:
            raise ConfigError(
                f"kernel.prelude={self.prelude} and kernel.coda={self.coda} leave none of kernel.layers={self.layers} "
                "to the loop; choose more layers"
            )
        if self.rope_scaling == "llama3" and self.rope_low >= self.rope_high:
            raise ConfigError(f"kernel.rope_low={self.rope_low}: must be below kernel.rope_high={self.rope_high}")
        if self.coupling == "scalable" and self.coupling_ref < 2:
            raise ConfigError(
                f"kernel.coupling_ref={self.coupling_ref}: scalable starts at s = c / ln L_ref; at least 2"
            )


@dataclass(frozen=True)
class Train:
    """How one model, or the whole constellation, is trained (constellation/train)."""

    tokens: Annotated[Count, says("training tokens of the WHOLE constellation, OCEAN's share included")] = 3_000_000
    ocean_share: Annotated[
        float,
        Meta(ge=0, lt=1),
        says("part of them that trains OCEAN, 0 for a pretrained one as it is; kernels: the rest"),
    ] = 0.5
    batch: Annotated[Count, says("sequences in a step of OCEAN")] = 8
    kernel_batch: Annotated[Count, says("sequences in a step of a kernel")] = 4
    accumulation: Annotated[Count, says("micro-batches a step is cut into")] = 1
    warmup: Annotated[Part, says("part of OCEAN's run in which lr rises")] = 0.05
    kernel_warmup: Annotated[Part, says("part of a kernel's run in which lr rises")] = 0.0
    ocean_decay: Annotated[Part, says("last part of OCEAN's run, in which lr falls to zero, linearly")] = 0.0
    decay: Annotated[Part, says("last part of a kernel's run, in which lr falls to zero, linearly")] = 0.6
    kernel_lr_scale: Annotated[Positive, says("kernels' peak lr / OCEAN's")] = 1.0
    inherit_optimizer: Annotated[int, Meta(ge=0, le=1), says("1: kernels start with OCEAN's state, 0: with none")] = 1
    clip: Annotated[Positive, says("largest gradient norm")] = 1.0
    clip_kind: Annotated[
        Literal["norm", "adagc", "zclip"], says("by train.clip alone, or by what norms were before too (clipping.py)")
    ] = "norm"
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], says("auto: asked of the processor, then written into the run")
    ] = "auto"
    threads: Annotated[Count, says("CPU threads of one kernel")] = 1
    ocean_threads: Annotated[Count, says("CPU threads of OCEAN, which trains alone; more pay only on idle cores")] = 1
    lambda_lm: Annotated[NotNegative, says("weight of the cross-entropy in the loss")] = 1.0
    lambda_basin: Annotated[NotNegative, says("of the basin head's divergence from the next window's bytes")] = 0.0
    lambda_beta: Annotated[NotNegative, says("of (beta - 0.44)^2, where kernel.coupling=learned")] = 0.0
    loss_chunk: Annotated[Count, says("rows of logits that exist at once")] = 2048
    eval_every: Annotated[Whole, says("steps between evaluations on dev text; 0: at the end only")] = 0
    eval_bytes: Annotated[Count, says("dev text scored by an evaluation")] = 65_536
    checkpoint_every: Annotated[Count, says("steps between checkpoints")] = 50
    keep_last: Annotated[Count, says("newest checkpoints kept")] = 2
    keep_best: Annotated[Whole, says("checkpoints with the lowest dev bits per byte kept")] = 1
    sample_bytes: Annotated[Whole, says("length of the sample text written at each evaluation; 0: none")] = 160
    seed: Annotated[Whole, says("initialisation, data order, clustering")] = 0
    budget_usd: Annotated[NotNegative, says("at which the run stops, to be resumed; 0: none")] = 0.0


@dataclass(frozen=True)
class Pretrained:
    """What OCEAN begins with, "": with nothing (pipeline/beginning.py)."""

    folder: Annotated[str, says("a Hugging Face folder of Llama architecture: its weights and its tokenizer")] = ""
    embeddings: Annotated[str, says("such a folder, or a safetensors file in it: its embeddings alone, frozen")] = ""

    @property
    def given(self) -> str:
        return self.folder or self.embeddings


@dataclass(frozen=True)
class Recording:
    """What a run leaves beside its trace, 0: nothing (train/recording.py)."""

    signals: Annotated[int, Meta(ge=0, le=1), says("1: signals.npz is written with every checkpoint")] = 0
    grads_every: Annotated[Whole, says("steps between gradients in grads.npz; rewritten with every checkpoint")] = 0
    curvature_every: Annotated[Whole, says("steps between diagonals in curvature.npz")] = 0
    curvature_kind: Annotated[
        Literal["gauss_newton", "empirical_fisher"], says("which diagonal (optim/curvature.py)")
    ] = "gauss_newton"
    curvature_probes: Annotated[int, Meta(ge=2), says("random signs, or rows, of one diagonal")] = 4
    precond_every: Annotated[Whole, says("steps between the rates that precond.npz holds, the newest alone")] = 0


@dataclass(frozen=True)
class Measuring:
    """What is measured of a run while it learns (telemetry/, train/measuring.py)."""

    enabled: Annotated[bool, says("phi, kappa, curiosity and the rest are measured on held-out text")] = False
    every: Annotated[Count, says("steps between two measurements")] = 50
    windows: Annotated[Count, says("held-out windows of a measurement, kernel.context tokens each")] = 8
    budget: Annotated[Part, says("share of the training time that measuring may take; 0: no limit, no clock")] = 0.0
    emotions: Annotated[bool, says("the emotion monitor is among what is measured")] = True


@dataclass(frozen=True)
class Regimes:
    """How a run is judged, and repaired (regime/, train/repair.py)."""

    enabled: Annotated[bool, says("a run is judged after every step, and acted on")] = False
    linear_below: Annotated[Part, says("phi below which it is linear")] = 0.30
    breakdown_from: Annotated[Part, says("phi from which it is in breakdown; between them it is geometric")] = 0.80
    hysteresis: Annotated[Part, says("by which phi must pass a bound to leave a regime")] = 0.02
    linear_compute: Annotated[float, Meta(gt=0, le=1), says("share of a batch that is trained on while linear")] = 0.30
    pause_steps: Annotated[Whole, says("steps without training after phi was seen in breakdown")] = 20
    spike_sigma: Annotated[Positive, says("deviations of ln loss or ln gradient norm that make a spike")] = 5.0
    debounce: Annotated[Count, says("spikes in a row that make a fault")] = 3
    collapse_repeat: Annotated[Part, says("repeat rate beyond the text's that is a collapse")] = 0.9
    recovery: Annotated[
        Literal[
            "off", "rollback", "cooldown", "light_sleep", "deep_sleep", "dream", "mushroom", "shrink_perturb", "ladder"
        ],
        says("what acts on a fault or breakdown; ladder: the protocols by severity"),
    ] = "ladder"
    tolerance: Annotated[NotNegative, says("bits per byte that an action may cost on held-out text and be kept")] = 0.02
    actions: Annotated[Whole, says("most actions of a run")] = 8
    recovery_steps: Annotated[Count, says("training steps of an action, and of a cooldown")] = 8


@dataclass(frozen=True)
class Data:
    """Reading a corpus (constellation/data)."""

    dev_fraction: Annotated[float, Meta(gt=0, le=0.5), says("part of each domain held out, by document")] = 0.05
    max_document_bytes: Annotated[Count, says("a longer document is cut into parts")] = 1_048_576
    max_line_bytes: Annotated[Count, says("a longer jsonl line is counted as broken")] = 67_108_864
    tokenizer_bytes: Annotated[Count, says("text the tokenizer is trained on")] = 16_777_216


@dataclass(frozen=True)
class Coordizer:
    """The run's tokenizer: one from a folder, or one that is learnt from its text (constellation/coordizer)."""

    score: Annotated[
        Literal["frequency", "pmi", "unigram_gain", "parity", "superword", "basin", "attention", "kernel"],
        says("what the next merge is chosen by"),
    ] = "frequency"
    min_count: Annotated[int, Meta(ge=2), says("times a pair must stand in the corpus to be merged")] = 2
    words: Annotated[Part, says("superword: part of the merges that is learnt inside words")] = 0.8
    folder: Annotated[str, says("of `coordizer train`, whose tokenizer is taken as it is; empty: one is learnt")] = ""


@dataclass(frozen=True)
class Router:
    """Fit and decisions of the router (router/)."""

    bins: Annotated[Count, says("hashed byte trigrams")] = 4096
    smoothing: Annotated[Positive, says("mu, pseudo-counts of the corpus mean")] = 100.0
    dims: Annotated[Count, says("n, basin coordinates")] = 64
    min_prefix: Annotated[Count, says("bytes, shortest prefix used in the fit")] = 16
    max_prefix: Annotated[Count, says("bytes, longest")] = 2048
    every: Annotated[Count, says("W, bytes between decisions")] = 64
    hysteresis: Annotated[NotNegative, says("nats the new best must lead by before a hand-off")] = 0.1
    abstain_below: Annotated[Part, says("tau, least posterior of an answer; 0: only the distance abstains")] = 0.0
    abstain_quantile: Annotated[float, Meta(gt=0, le=1), says("distances beyond this training quantile abstain")] = (
        0.999
    )
    top_k: Annotated[Count, says("kernels that answer together")] = 1


@dataclass(frozen=True)
class Decode:
    """How a kernel writes (decoding/engine.py)."""

    precision: Annotated[
        Literal["fp32", "int8"], says("of the products; int8: CPUs alone, faster, not the same text")
    ] = "fp32"
    slots: Annotated[Count, says("requests of one kernel under way at once; others wait")] = 32


@dataclass(frozen=True)
class Cluster:
    """What Ray is asked for (actors/)."""

    cpus_per_kernel: Annotated[NotNegative, says("logical CPUs of one kernel actor")] = 0.25
    gpus_per_kernel: Annotated[NotNegative, says("GPUs of one kernel actor, fractions allowed")] = 0.0
    placement_timeout_s: Annotated[Positive, says("how long to wait for a cluster that could fit but is busy")] = 60.0
    max_restarts: Annotated[Count, says("of one kernel actor before the run fails")] = 20
    storage_timeout_s: Annotated[Positive, says("how long a store at a URL may stay away before the run ends")] = 600.0
    usd_per_hour: Annotated[NotNegative, says("price of all machines of the run together; 0: not told")] = 0.0
    resident: Annotated[Whole, says("kernels that train at once; 0: one a core here, all on a cluster")] = 0


@dataclass(frozen=True)
class Control:
    """The governor of kernels' learning rate (control/governor.py); off by default: it has not won yet."""

    rate: Annotated[
        Literal["schedule", "governor"], says("learning rate: the schedule, or cut and recovered by the loss")
    ] = "schedule"
    growth: Annotated[float, Meta(ge=1), says("governor: growth of the rate in a calm step")] = 1.02
    shrink: Annotated[float, Meta(gt=0, lt=1), says("governor: what a spike leaves of the rate")] = 0.5
    spike: Annotated[Positive, says("governor: standard deviations of the loss that are a spike")] = 4.0
    patience: Annotated[Whole, says("governor: steps of rest after a cut")] = 20
    plateau: Annotated[Whole, says("governor: steps without progress that cut the rate; 0: none do")] = 0


@dataclass(frozen=True)
class Config:
    """A whole run."""

    preset: Annotated[str, says("the preset it began as")] = "small"
    constellation: Roster = field(default_factory=Roster)
    kernel: Kernel = field(default_factory=Kernel)
    optim: registry.Settings = field(default_factory=registry.KroneckerSettings)
    train: Train = field(default_factory=Train)
    pretrained: Pretrained = field(default_factory=Pretrained)
    record: Recording = field(default_factory=Recording)
    telemetry: Measuring = field(default_factory=Measuring)
    regime: Regimes = field(default_factory=Regimes)
    data: Data = field(default_factory=Data)
    coordizer: Coordizer = field(default_factory=Coordizer)
    router: Router = field(default_factory=Router)
    decode: Decode = field(default_factory=Decode)
    cluster: Cluster = field(default_factory=Cluster)
    control: Control = field(default_factory=Control)
    topo: Topo = field(default_factory=Topo)
    roles: Annotated[dict[str, dict[str, Any]], says("role -> dotted overrides of it alone")] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        """ConfigError, one line that names the setting, unless every value is in its range and they go together."""
        check(self)
        self.kernel.check()
        self.topo.check()
        t = self.train
        for name, size in (("batch", t.batch), ("kernel_batch", t.kernel_batch)):
            if size % t.accumulation:
                raise ConfigError(f"train.{name}={size}: must be a multiple of train.accumulation={t.accumulation}")
        if self.record.precond_every and self.optim.name != "curvature_sgd":
            raise ConfigError(
                f"record.precond_every={self.record.precond_every}: {self.optim.name} keeps no rates of its own;"
                " set optim.name=curvature_sgd too, or leave it out"
            )
        if self.regime.linear_below >= self.regime.breakdown_from:
            raise ConfigError(
                f"regime.linear_below={self.regime.linear_below}: must be below regime.breakdown_from="
                f"{self.regime.breakdown_from}"
            )
        if self.kernel.basin_head != (t.lambda_basin > 0):
            raise ConfigError(
                f"kernel.basin_head={self.kernel.basin_head} and train.lambda_basin={t.lambda_basin}: a basin head is "
                "trained by its term alone, and the term needs the head; set both or none"
            )
        if self.pretrained.folder and self.pretrained.embeddings:
            raise ConfigError("pretrained.folder and pretrained.embeddings exclude each other: give one of them")
        if t.budget_usd and not self.cluster.usd_per_hour:
            raise ConfigError(f"train.budget_usd={t.budget_usd}: say what an hour costs, cluster.usd_per_hour")
        if not t.ocean_share and not self.pretrained.folder:
            raise ConfigError("train.ocean_share=0: OCEAN has to be trained; only one taken by --from may go without")
        if self.router.min_prefix > self.router.max_prefix:
            raise ConfigError("router.min_prefix: must not exceed router.max_prefix")

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
        return _changed(self, self.roles.get(role, {}), role)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def from_json(data: Mapping[str, Any]) -> Config:
    """A Config from `to_json()`; unknown fields are named, missing ones take their default.

    Files of the first release hold the settings of all optimizers: those of others than its own are left out.
    """
    flat = dict(_flat(data))
    roles = flat.pop("roles", {})
    config = _with_optimizer(Config(), flat)
    config = merged(config, _own(flat, config))
    return replace(config, roles={role: _own(own, config) for role, own in roles.items()})


def names() -> list[str]:
    """All dotted names of the default configuration, in reading order."""
    return [name for name, _ in _leaves(Config())]


def values(config: Config) -> dict[str, Any]:
    """Every setting of `config` by its dotted name, a role's own behind the role's: `heart.optim.lr`."""
    own = {f"{role}.{name}": value for role, changes in config.roles.items() for name, value in changes.items()}
    return {**dict(_leaves(config)), **own}


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with dotted names replaced, all together, validated once.

    Values may be strings (parsed by the field's type) or of the field's type. A new `optim.name` keeps the values of
    what both optimizers have.
    """
    plain: dict[str, Any] = {}
    roles = {role: dict(own) for role, own in config.roles.items()}
    for name, value in _spread_phases(changes).items():
        head, _, rest = name.partition(".")
        if roster.is_kernel(head):
            roles.setdefault(head, {})[rest] = value
        else:
            plain[name] = value
    changed = _changed(config, plain)
    for role, own in roles.items():
        if role not in changed.kernels:
            kernels = changed.constellation.kernels
            raise ConfigError(f"{role}.{next(iter(own))}: a constellation of {kernels} kernels has none called {role}")
        seen = dict(_leaves(_changed(changed, own, role)))  # a role's changes must be valid together with the rest
        roles[role] = {name: seen[name] for name in own}
    return replace(changed, roles=roles)


def difference(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old value, new value) of every setting that differs; None where there is no such setting."""
    a, b = ({**dict(_leaves(config)), "roles": config.roles} for config in (old, new))
    return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def parse_assignments(words: Iterable[str]) -> dict[str, str]:
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


def _changed(config: Config, changes: Mapping[str, Any], role: str = "") -> Config:
    """`config` with its dotted names replaced; for a `role`, which may change how it is trained alone."""
    config = _with_optimizer(config, changes)
    known = [name for name, _ in _leaves(config)]
    for name in changes:
        if name not in known:
            raise _unknown(name, known, f"{role}." if role else "", config.optim.name)
        if role and not name.startswith(("optim.", "train.")):
            raise ConfigError(f"{role}.{name}: a role may change optim.* and train.* only; kernels share the rest")
    return merged(config, changes)


def _unknown(name: str, known: list[str], prefix: str, optimizer: str) -> ConfigError:
    """Why there is no such setting, and what to write."""
    if "phi" in name.rpartition(".")[2].split("_"):
        return ConfigError(f"{prefix}{name}: {PHI}")
    if having := _of_another(name):
        *some, last = having
        have = f"{', '.join(some)} and {last} have" if some else f"{last} has"
        return ConfigError(f"{prefix}{name}: {optimizer} has no such setting; {have}: set {prefix}optim.name too")
    everywhere = dict.fromkeys([*known, *(f"optim.{own}" for row in registry.OPTIMIZERS.values() for own in row.names)])
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, everywhere, n=3, cutoff=0.5)
    near += [n for n in everywhere if n.rpartition(".")[2] == last and n not in near]
    hint = f"near it: {', '.join(prefix + n for n in near[:3])}" if near else f"known: {', '.join(known)}"
    return ConfigError(f"unknown setting {prefix + name!r}; {hint}")


def _of_another(name: str) -> list[str]:
    """The optimizers that have the setting `name`, such as optim.momentum."""
    return registry.owners(name.removeprefix("optim.")) if name.startswith("optim.") else []


def _spread_phases(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` with each phase followed by its row of the gate; what is named beside a phase wins."""
    spread: dict[str, Any] = {}
    for name, value in changes.items():
        spread[name] = value
        if name == "optim.phase" or name.endswith(".optim.phase"):
            row = registry.phase_settings(value)
            spread |= {f"{name.removesuffix('phase')}gate.{key}": own for key, own in row.items()}
    return spread | dict(changes)


def _own(flat: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What a file says of `config` under dotted names, without the settings of other optimizers than its own."""
    config = _with_optimizer(config, flat)
    known = {name for name, _ in _leaves(config)}
    if unknown := [name for name in flat if name not in known and not _of_another(name)]:
        raise ConfigError(f"config: unknown field {unknown[0]!r}; this file was written by another version")
    return {name: value for name, value in flat.items() if name in known}


def _with_optimizer(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with the settings of the optimizer that `changes` may name."""
    name = changes.get("optim.name", config.optim.name)
    return replace(config, optim=registry.switched(config.optim, name))


def _leaves(config: Config) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting that an override may name."""
    return ((name, value) for name, _, value in leaves(config) if name != "roles")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and key != "roles":
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
