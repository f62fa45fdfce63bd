"""HybridGeometricOptimizer: a natural gradient on the basin block, something cheaper on the rest, as ONE optimizer.

    method  step of the group's parameters
    exact   basin.py: (F + damping) x = g, F multiplied with through step(logits=...)
    diag    diagonal.py: g / (F_i^power + damping)
    kron    kronecker.py, matrices
    adamw   torch's AdamW, fused where it can be

`param_groups` carry `method` and the options of that method alone; every parameter is in exactly one group, so
schedulers, scalers and checkpoints see one ordinary optimizer. Groups made from a model: the basin block, at lr_ng,
then the rest at lr_rest, its matrices with weight decay and its vectors without. At rest_optimizer="kron" weights of
linear layers go by Kronecker factors and what is left, embeddings and vectors, by the diagonal.

The basin block of the original design are the embedding coordinates and the map from them to the model: parameters
whose name contains "basin" or "embed" (a constellation kernel: the embedding, which is its output head too).
"""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.optim.basin import BASIN_SETTINGS, BasinOutcome, basin_step, check_basin
from constellation.optim.diagonal import DiagonalNG
from constellation.optim.elementwise import adamw_step, diagonal_step
from constellation.optim.kronecker import KRON, LARGEST_NORM, KroneckerNG, kronecker_step, settled
from constellation.optim.natural import Evidence, NaturalOptimizer, check_range
from constellation.optim.registry import MixedSettings
from constellation.optim.whiten import WHITENED

BASIN = ("*basin*", "*embed*")
REST = {"adamw": "adamw", "diagonal_ng": "diag", "kron": "kron"}  # rest_optimizer -> method
OPTIONS: dict[str, dict[str, Any]] = {  # method -> what its groups may say, with defaults
    "exact": {name: value for name, value in BASIN_SETTINGS.items() if name not in ("lr", "weight_decay")},
    "diag": {
        **{n: inspect.signature(DiagonalNG).parameters[n].default for n in (
            "fisher_decay", "momentum", "bias_correction", "batch_size", "foreach", "maximize",
        )},
        "power": 0.5,  # the original design's diagonal; 1.0 divides by F itself
        "damping": 1e-8,
    },
    "kron": {name: value for name, value in KRON.items() if name != "weight_decay"},
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "maximize": False},
}  # fmt: skip
Basin = str | Sequence[str] | Callable[[str, Tensor], bool]


class HybridGeometricOptimizer(NaturalOptimizer):
    """`params` is a model, its named parameters, or param groups that say their `method` themselves.

    basin           patterns of names (*, ?), or a predicate of (name, parameter)
    basin_options   options of the natural step on the basin block, such as {"power": 1.0} of diag
    rest_options    the same of the rest, such as {"betas": (0.9, 0.95)} of adamw
    """

    wants: ClassVar[tuple[str, ...]] = ("logits", "targets")
    state_kind = ("method", "variant")

    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        lr_ng: float = 1e-2,
        lr_rest: float = 1e-3,
        cg_iters: int = 8,
        use_exact_ng: bool = False,
        rest_optimizer: str = "adamw",
        weight_decay: float = 0.01,  # decoupled, matrices of the rest
        *,
        cg_damping: float = 1e-3,  # lambda of the exact block
        basin: Basin = BASIN,
        basin_options: Mapping[str, Any] | None = None,
        rest_options: Mapping[str, Any] | None = None,
        check_finite: bool = True,
    ):
        who = type(self).__name__
        if rest_optimizer not in REST:
            raise ConfigError(f"{who}: rest_optimizer={rest_optimizer!r}; choose one of {', '.join(REST)}")
        check_range(who, lr_ng=(lr_ng, math.inf), lr_rest=(lr_rest, math.inf), weight_decay=(weight_decay, math.inf))
        model = params if isinstance(params, torch.nn.Module) else None
        given: list[Any] = list(params.named_parameters()) if isinstance(params, torch.nn.Module) else list(params)
        if not given or not isinstance(given[0], dict):
            natural = {"cg_iters": cg_iters, "damping": cg_damping} if use_exact_ng else {}
            method, rest = "exact" if use_exact_ng else "diag", REST[rest_optimizer]
            given = _groups(
                who, given, model, basin,
                {"method": method, "lr": lr_ng, **_known(who, method, {**natural, **(basin_options or {})})},
                {"method": rest, "lr": lr_rest, **_known(who, rest, rest_options or {})},
                weight_decay,
            )  # fmt: skip
        self._block = BasinOutcome("none")
        defaults = {"lr": lr_rest, "weight_decay": 0.0, "method": REST[rest_optimizer], "check_finite": check_finite}
        super().__init__(given, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        who, method = type(self).__name__, param_group.get("method", self.defaults["method"])
        if method not in OPTIONS:
            raise ConfigError(f"{who}: method={method!r}; choose one of {', '.join(OPTIONS)}")
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        mine = [p[1] if isinstance(p, tuple) else p for p in params]
        held = [id(p) for group in self.param_groups for p in group["params"]] + [id(p) for p in mine]
        if len(set(held)) < len(held):
            raise ConfigError(f"{who}: a parameter is in two groups, or twice in one; every parameter has one method")
        group = {**self.defaults, **OPTIONS[method], **param_group, "params": params}
        _check(who, group, mine)
        if method == "exact" and any(g["method"] == "exact" for g in self.param_groups):
            raise ConfigError(f"{who}: two exact groups; put the parameters into one block, or use BasinNaturalGrad")
        if method == "kron":
            group["ns_precision"] = settled(group["ns_precision"], mine)
        super().add_param_group(group)

    def _advance(self, seen: Evidence) -> None:
        for group in self._exact_first():
            self._follow(group, group["params"], self.state, seen)

    def _exact_first(self) -> list[dict[str, Any]]:
        """Fisher products come before anything that the logits were made with has moved."""
        return sorted(self.param_groups, key=lambda group: group["method"] != "exact")

    def _follow(self, group: dict[str, Any], params: Sequence[Tensor], state: Any, seen: Evidence) -> None:
        """One step of the group's method on `params`."""
        if group["method"] == "exact":
            self._block = basin_step(params, state, group, seen.logits, seen.targets, jacobian=seen.jacobian)
        elif group["method"] == "kron":
            kronecker_step(params, state, group)
        elif group["method"] == "diag":
            diagonal_step(params, state, group)
        else:
            adamw_step(params, state, group)

    def _largest_norm(self) -> float:
        whitened = any(g["method"] == "kron" and g["variant"] in WHITENED for g in self.param_groups)
        return LARGEST_NORM if whitened else math.inf

    def _basin(self) -> list[dict[str, Any]]:
        """The groups of the basin block: as made from a model, or those that say exact or, without one, diag."""
        for is_basin in (lambda g: "home" in g, lambda g: g["method"] == "exact", lambda g: g["method"] == "diag"):
            if found := [group for group in self.param_groups if is_basin(group)]:
                return found
        return []

    def _fishers(self) -> list[Tensor]:
        held = [self.state.get(p, {}) for group in self._basin() if group["method"] == "diag" for p in group["params"]]
        return [s["fisher"] for s in held if "fisher" in s]

    @property
    def outcome(self) -> str:
        """Of the last step: none, skipped, stepped, or what the exact block's solve came to (basin.py)."""
        return self._block.outcome if self._outcome == "stepped" and self._block.outcome != "none" else self._outcome

    def get_stats(self) -> dict[str, float]:
        """Of the basin block's curvature and last step; parameters per part."""
        count = [sum(p.numel() for p in group["params"]) for group in self.param_groups]
        basin = sum(n for n, group in zip(count, self.param_groups, strict=True) if group in self._basin())
        return {
            **super().get_stats(), **self._block.stats,
            "num_basin_params": float(basin), "num_rest_params": float(sum(count) - basin),
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_block", BasinOutcome("none"))
        for group in self.param_groups:
            if group["method"] == "kron":
                group.setdefault("ns_precision", "bf16")  # of states older than the option
            for name, value in OPTIONS[group["method"]].items():  # options younger than the state
                group.setdefault(name, value)


def build(settings: MixedSettings, model: torch.nn.Module) -> HybridGeometricOptimizer:
    return HybridGeometricOptimizer(model, **arguments(settings))


def arguments(settings: MixedSettings) -> dict[str, Any]:
    """What the settings say to the optimizers of this kind."""
    s = settings
    diagonal = {"fisher_decay": s.fisher_decay, "damping": s.damping, "momentum": s.momentum, "power": s.power}
    rest = {
        "adamw": {"betas": (s.momentum, s.fisher_decay), "eps": max(s.damping, 1e-8)},
        "diagonal_ng": diagonal,
        "kron": {
            "variant": s.variant, "momentum": s.kronecker_momentum, "fisher_decay": s.fisher_decay,
            "damping": s.damping, "ns_precision": s.ns_precision,
        },
    }  # fmt: skip
    return {
        "lr_ng": s.lr_ng, "lr_rest": s.lr, "cg_iters": s.cg_iters, "cg_damping": s.cg_damping,
        "use_exact_ng": s.use_exact_ng, "rest_optimizer": s.rest_optimizer, "weight_decay": s.weight_decay,
        "basin": s.basin.split(","), "basin_options": {} if s.use_exact_ng else diagonal,
        "rest_options": rest[s.rest_optimizer],
    }  # fmt: skip


def _groups(
    who: str,
    given: list[Any],
    model: torch.nn.Module | None,
    basin: Basin,
    natural: dict[str, Any],
    cheap: dict[str, Any],
    weight_decay: float,
) -> list[dict[str, Any]]:
    """The basin block, the rest's matrices, the rest's others. `home`: the group each of the block would be in else."""
    if given and not isinstance(given[0], tuple):
        raise ConfigError(f"{who}: names tell the basin block; pass a model, named_parameters() or groups with method")
    named = [(name, p) for name, p in given if p.requires_grad]
    inside = basin if callable(basin) else _matches([basin] if isinstance(basin, str) else list(basin))
    block = {id(p) for name, p in named if inside(name, p)}
    if not block:
        some = ", ".join(name for name, _ in named[:4])
        raise ConfigError(f"{who}: the basin group is empty: {basin!r} names none of {some}, ...")
    if cheap["method"] == "kron":
        matrices = _linear(named, model)
        others = {
            "method": "diag",
            "lr": cheap["lr"],
            "fisher_decay": cheap["fisher_decay"],
            "damping": cheap["damping"],
        }
    else:
        matrices, others = {id(p) for _, p in named if p.dim() >= 2}, cheap
    params = [p for _, p in named]
    return [
        {
            "params": [p for p in params if id(p) in block],
            "home": [1 if id(p) in matrices else 2 for p in params if id(p) in block],
            **natural,
        },
        {
            "params": [p for p in params if id(p) in matrices - block],
            **cheap, "weight_decay": weight_decay,
        },
        {"params": [p for p in params if id(p) not in matrices | block], **others},
    ]  # fmt: skip


def _linear(named: list[tuple[str, Tensor]], model: torch.nn.Module | None) -> set[int]:
    """Weights of linear layers that are no embedding; without a model, matrices that are not named like one."""
    if model is None:
        embedding = _matches(["*embed*"])
        return {id(p) for name, p in named if p.dim() == 2 and not embedding(name, p)}
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    linear, embedded = ({id(m.weight) for m in model.modules() if isinstance(m, kind)} for kind in kinds)
    return linear - embedded


def _matches(patterns: list[str]) -> Callable[[str, Tensor], bool]:
    return lambda name, p: any(fnmatch.fnmatch(name, pattern.strip()) for pattern in patterns)


def _known(who: str, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with the method's defaults; ConfigError where the method has no such option."""
    for name in options:
        if name not in OPTIONS[method]:
            raise ConfigError(f"{who}: {method} has no option {name!r}; it knows {', '.join(OPTIONS[method])}")
    return {**OPTIONS[method], **options}


def _check(who: str, group: dict[str, Any], params: list[Tensor]) -> None:
    """What the sibling of the group's method would say to its options."""
    check_range(who, lr=(group["lr"], math.inf), weight_decay=(group["weight_decay"], math.inf))
    options = {name: group[name] for name in OPTIONS[group["method"]]}
    if group["method"] == "exact":
        check_basin(who, {**group, "params": params})
    elif group["method"] == "diag":
        DiagonalNG([torch.zeros(1, requires_grad=True)], **options)
    elif group["method"] == "kron":
        odd = next((p for p in params if p.dim() < 2), None)
        if odd is not None:
            raise ConfigError(f"{who}: shape {tuple(odd.shape)} is no matrix; give it method=diag or adamw")
        KroneckerNG([{"params": [torch.zeros(1, 1, requires_grad=True)], **options}])
    else:
        b1, b2 = options["betas"]
        check_range(who, beta1=(b1, 1), beta2=(b2, 1), eps=(options["eps"], math.inf))
