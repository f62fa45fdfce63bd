"""The optimizers as rows: a name, its own settings, who builds it, and what it is in a line. No torch here.

A new optimizer is its file, with `build(settings, model) -> torch.optim.Optimizer`, and one row of `OPTIMIZERS`.
`optim.name` chooses the row; the other names under `optim.` are the fields of the row's settings and no others.
What a config that names another optimizer shares with the one before keeps its value, the rest is the row's default.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from constellation.errors import ConfigError
from constellation.settings import Count, NotNegative, Part, Positive, Whole, check, leaves, says

Name = Annotated[str, says("the optimizer")]


@dataclass(frozen=True)
class Settings:
    """What every optimizer has."""

    name: Name = ""
    lr: Annotated[Positive, says("peak learning rate")] = 4e-3


@dataclass(frozen=True)
class SimpleSettings(Settings):
    """Of simple_fisher (optim/simple.py)."""

    name: Name = "simple_fisher"
    damping: Annotated[NotNegative, says("lambda, unit of what it is added to: F^power, or the gradient")] = 1e-8
    weight_decay: Annotated[NotNegative, says("decoupled, matrices only")] = 0.1


@dataclass(frozen=True)
class AdamWSettings(SimpleSettings):
    """Of adamw (optim/adamw.py)."""

    name: Name = "adamw"
    momentum: Annotated[Part, says("EMA of gradients, diagonal steps")] = 0.9
    fisher_decay: Annotated[float, Meta(gt=0, le=1), says("EMA of the squared gradient, the diagonal Fisher")] = 0.95


@dataclass(frozen=True)
class QIGDiagonalSettings(AdamWSettings):
    """Of qig_diagonal_ng (optim/diagonal.py)."""

    name: Name = "qig_diagonal_ng"


@dataclass(frozen=True)
class DiagonalSettings(AdamWSettings):
    """Of diagonal_ng (optim/diagonal.py)."""

    name: Name = "diagonal_ng"
    power: Annotated[
        float, Meta(gt=0, le=1), says("step = m / (F^power + damping); 0.5 RMSprop, 1.0 natural gradient")
    ] = 0.5


@dataclass(frozen=True)
class KroneckerSettings(AdamWSettings):
    """Of kronecker_ng (optim/kronecker.py)."""

    name: Name = "kronecker_ng"
    kronecker_momentum: Annotated[Part, says("EMA of gradients, Kronecker steps")] = 0.95
    variant: Annotated[
        Literal["muon", "soap", "kl_shampoo", "soap_muon"], says("how the Kronecker factors are made and used")
    ] = "muon"
    ns_precision: Annotated[
        Literal["auto", "fp32", "bf16"], says("of Newton-Schulz products; auto: as train.precision")
    ] = "auto"


@dataclass(frozen=True)
class BasinSettings(Settings):
    """Of basin_ng (optim/basin.py)."""

    name: Name = "basin_ng"
    cg_iters: Annotated[Count, says("conjugate-gradient steps of an exact natural step")] = 8
    cg_damping: Annotated[NotNegative, says("lambda of the exact block, unit of the Fisher matrix")] = 1e-3


@dataclass(frozen=True)
class MixedSettings(BasinSettings, DiagonalSettings, KroneckerSettings):
    """Of mixed_qig (optim/mixed.py): the natural step's, and those of whatever steps on the rest."""

    name: Name = "mixed_qig"
    basin: Annotated[str, says("parameter names of the basin block, comma-separated patterns")] = "*basin*,*embed*"
    use_exact_ng: Annotated[bool, says("the basin block by exact Fisher products; else by the Fisher diagonal")] = False
    lr_ng: Annotated[Positive, says("peak learning rate of the basin block's natural steps")] = 1e-2
    rest_optimizer: Annotated[Literal["adamw", "diagonal_ng", "kron"], says("of all other parameters")] = "adamw"


Phase = Literal["early", "middle", "late", "fine_tune", "never", "always"]


@dataclass(frozen=True)
class AdaptiveConfig:
    """When AdaptiveMixedQIG takes a natural step (optim/gate.py): any trigger opens, the budget closes.

    The first eight are the columns of the phase table, the rest what the optimizer measures itself.
    """

    min_kappa_for_ng: Annotated[
        NotNegative, says("kappa_eff above it opens; 64: as curved as the run's own reference")
    ] = 40.0
    min_basin_distance: Annotated[NotNegative, says("radians to the reference model; above it opens")] = 0.6
    force_ng_every_n_steps: Annotated[Whole, says("steps; opens at its multiples; 0: never")] = 50
    exploration_triggers_ng: Annotated[bool, says("curiosity regime EXPLORATION opens")] = True
    geometric_triggers_ng: Annotated[bool, says("regime geometric, phi > 0.7 and kappa > 30 open")] = True
    stuck_triggers_ng: Annotated[bool, says("curiosity regime STUCK opens")] = True
    use_curiosity: Annotated[bool, says("curiosity above the next opens where kappa > 25 or the distance > 0.4")] = True
    min_curiosity: Annotated[NotNegative, says("nats of held-out loss per evaluation")] = 0.05
    max_overhead: Annotated[
        NotNegative, says("seconds of the run over those of cheap steps alone, never exceeded; 0: no budget")
    ] = 1.3
    max_staleness: Annotated[
        NotNegative, says("radians the mean gradient may turn since the last natural step; 0: not measured")
    ] = 0.0
    min_reduction_ratio: Annotated[
        NotNegative, says("actual / predicted reduction below it closes, forced steps aside; 0: any")
    ] = 0.0
    must_pay: Annotated[bool, says("closes, forced steps aside, when a nat costs more natural than cheap seconds")] = (
        False
    )
    kappa_every: Annotated[
        Whole, says("steps between own measurements of kappa_eff, a product each; 0: from telemetry alone")
    ] = 10

    def __post_init__(self) -> None:
        check(self, "optim.gate.", finite=False)
        if 0 < self.max_overhead < 1:
            raise ConfigError(f"optim.gate.max_overhead={self.max_overhead} must be above 1, or 0 for no budget")


UNREACHED = 1e300

# a phase stands for its row of the first eight fields; late and fine_tune refine, so they ask less often; never and
# always are the controls (a budget closes over always, too)
PHASES: dict[str, tuple[float | bool, ...]] = {
    "early": (30.0, 0.4, 20, True, True, True, True, 0.03),
    "middle": (40.0, 0.6, 50, True, True, True, True, 0.05),
    "late": (50.0, 0.8, 100, True, False, True, True, 0.08),
    "fine_tune": (60.0, 1.0, 200, False, False, True, False, 0.10),
    "never": (UNREACHED, UNREACHED, 0, False, False, False, False, UNREACHED),
    "always": (40.0, 0.6, 1, True, True, True, True, 0.05),
}
SCHEDULED = "scheduled"  # the phase that PhaseSchedule says


def phase_settings(phase: str) -> dict[str, Any]:
    """The row of `phase` as AdaptiveConfig's fields; none for "scheduled", which changes them on the way."""
    if phase == SCHEDULED:
        return {}
    if phase not in PHASES:
        raise ConfigError(f"optim.phase={phase!r}: choose one of {', '.join((*PHASES, SCHEDULED))}")
    fields = [f.name for f in dataclasses.fields(AdaptiveConfig)]
    return dict(zip(fields, PHASES[phase], strict=False))


@dataclass(frozen=True)
class PhaseSchedule:
    """Where in a run each phase begins, as a share of its steps, and by which row of the phase table it is gated.

    `early` is from the start. Of the phases that have begun the last in this order is in force, so one that begins
    after a later one is left out, and 1 means never.
    """

    middle: Annotated[float, Meta(ge=0, le=1), says("share of the run at which the phase middle begins")] = 0.2
    late: Annotated[float, Meta(ge=0, le=1), says("at which late begins")] = 0.6
    fine_tune: Annotated[float, Meta(ge=0, le=1), says("at which fine_tune begins")] = 0.9
    early_gate: Annotated[Phase, says("the row that gates the phase early")] = "early"
    middle_gate: Annotated[Phase, says("the row that gates middle")] = "middle"
    late_gate: Annotated[Phase, says("the row that gates late")] = "late"
    fine_tune_gate: Annotated[Phase, says("the row that gates fine_tune")] = "fine_tune"

    def __post_init__(self) -> None:
        check(self, "optim.schedule.")

    def at(self, progress: float) -> str:
        """The row in force when the share `progress` of the steps is done, [0, 1]."""
        begins = (self.fine_tune, self.fine_tune_gate), (self.late, self.late_gate), (self.middle, self.middle_gate)
        return next((row for begin, row in begins if begin <= progress), self.early_gate)


@dataclass(frozen=True)
class AdaptiveSettings(MixedSettings):
    """Of adaptive_mixed_qig (optim/adaptive.py)."""

    name: Name = "adaptive_mixed_qig"
    phase: Annotated[
        Phase | Literal["scheduled"], says("sets the first eight fields of the gate; scheduled: as `schedule` says")
    ] = "middle"
    gate: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    schedule: PhaseSchedule = field(default_factory=PhaseSchedule)


@dataclass(frozen=True)
class ScaledSettings(SimpleSettings):
    """Of curvature_sgd (optim/scaled.py)."""

    name: Name = "curvature_sgd"
    momentum: Annotated[Part, says("EMA of gradients")] = 0.9
    curvature: Annotated[
        Literal["ema_grad2", "hutchinson_hessian", "empirical_fisher", "gauss_newton"],
        says("the diagonal that gives every parameter its rate"),
    ] = "ema_grad2"
    exponent: Annotated[Part, says("q: rate of a parameter = clip(lr (c + damping)^-q); 1.0 Newton")] = 0.5
    probes: Annotated[
        int, Meta(ge=2), says("random probes of a curvature diagonal; of fewer there is no standard error")
    ] = 8
    refresh: Annotated[Count, says("steps between curvature diagonals")] = 20


@dataclass(frozen=True)
class Row:
    """An optimizer: its settings with their defaults, "module:function" that builds it, and a line about it."""

    settings: Settings
    builder: str
    words: str

    @property
    def names(self) -> set[str]:
        """The names of its settings, those of records in it dotted."""
        return {name for name, _, _ in leaves(self.settings)}


OPTIMIZERS = {row.settings.name: row for row in (
    Row(KroneckerSettings(), "constellation.optim.kronecker:build",
        "Kronecker factors on linear layers, the diagonal elsewhere"),
    Row(DiagonalSettings(), "constellation.optim.diagonal:build", "the Fisher diagonal"),
    Row(QIGDiagonalSettings(), "constellation.optim.diagonal:build_qig", "RMSprop, as in the original design"),
    Row(BasinSettings(), "constellation.optim.basin:build", "the exact Fisher matrix of the whole model as one block"),
    Row(MixedSettings(), "constellation.optim.mixed:build",
        "a natural step where `basin` says, `rest_optimizer` elsewhere"),
    Row(AdaptiveSettings(), "constellation.optim.adaptive:build", "mixed_qig behind a `gate`"),
    Row(SimpleSettings(), "constellation.optim.simple:build", "a soft sign of the gradient, a baseline"),
    Row(ScaledSettings(), "constellation.optim.scaled:build", "a rate for every parameter from a curvature diagonal"),
    Row(AdamWSettings(), "constellation.optim.adamw:build", "torch's own, the control"),
)}  # fmt: skip


def row(name: Any) -> Row:
    """The row of an optimizer; ConfigError lists the names there are."""
    if name not in OPTIMIZERS:
        raise ConfigError(f"optim.name={name!r}: choose one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def switched(settings: Settings, name: Any) -> Settings:
    """The settings of the optimizer `name`, with the values of `settings` where both have a field."""
    new = row(name).settings
    if settings.name == name:
        return settings
    shared = {f.name for f in dataclasses.fields(new)} & {f.name for f in dataclasses.fields(settings)} - {"name"}
    return dataclasses.replace(new, **{name: getattr(settings, name) for name in shared})


def owners(name: str) -> list[str]:
    """The optimizers that have a setting of this name, such as "gate.must_pay"."""
    return [optimizer for optimizer, row in OPTIMIZERS.items() if name in row.names]
