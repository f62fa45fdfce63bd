"""A search space: dotted names of the configuration, each with a prior. No Ray here.

A space is a file, TOML or YAML; the ready ones lie in tune/spaces/.

    about = "what it asks"
    evaluates = "model"                     # model: OCEAN alone; constellation: OCEAN, router and kernels;
                                            # router: fitted anew over the kernels of one shared constellation
    metric = "dev_bits_per_byte"

    [fixed]                                 # what all trials have, whatever the preset says
    "optim.name" = "adamw"

    [settings."optim.lr"]
    prior = "log"                           # uniform, log: low, high;  int: low, high;  choice: values
    low = 1e-3
    high = 1e-2
    reason = "why it is looked at, and why there"

    [proportional."kernel.hidden"]          # follows another setting: times x, rounded to a multiple of 8
    of = "kernel.width"
    times = 2.6875

The default of a setting is the preset's value, and trial 0 is the preset itself.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from msgspec import inspect

from constellation.config import Config, override
from constellation.errors import ConfigError
from constellation.settings import Setting, leaves

EVALUATES = ("model", "router", "constellation")
PRIORS = ("uniform", "log", "int", "choice")
GRID_POINTS = 3  # of a range, in a grid
MULTIPLE = 8  # what a proportional setting is rounded to


@dataclass(frozen=True)
class Dimension:
    """One setting of a space: values in [low, high] by a prior, or one of `values`."""

    name: str
    prior: str
    default: Any
    low: float = 0.0
    high: float = 0.0
    values: tuple[Any, ...] = ()
    reason: str = ""

    def at(self, u: float) -> Any:
        """The value at the quantile u in [0, 1) of the prior."""
        if self.prior == "choice":
            return self.values[int(u * len(self.values))]
        if self.prior == "int":
            return int(self.low) + int(u * (self.high - self.low + 1))
        if self.prior == "log":
            inside = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
            return min(self.high, max(self.low, inside))
        return self.low + u * (self.high - self.low)

    def grid(self) -> list[Any]:
        """All choices, or GRID_POINTS of the range at equal distances under the prior, both ends among them."""
        if self.prior == "choice":
            return list(self.values)
        if self.prior == "int" and self.high - self.low < GRID_POINTS:
            return list(range(int(self.low), int(self.high) + 1))
        if self.prior == "int":
            step = (self.high - self.low) / (GRID_POINTS - 1)
            return [round(self.low + i * step) for i in range(GRID_POINTS)]
        return [self.at(i / (GRID_POINTS - 1)) for i in range(GRID_POINTS)]

    def admits(self, value: Any) -> bool:
        if self.prior == "choice":
            return value in self.values
        return isinstance(value, (int, float)) and self.low <= value <= self.high


@dataclass(frozen=True)
class Space:
    """A space that was read and found sound for a configuration."""

    name: str
    about: str
    evaluates: str
    metric: str
    fixed: dict[str, Any]
    dimensions: tuple[Dimension, ...]
    proportional: dict[str, dict[str, Any]]

    @property
    def default(self) -> dict[str, Any]:
        """The settings of the preset."""
        return {dimension.name: dimension.default for dimension in self.dimensions}

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination, the last dimension fastest."""
        names = [dimension.name for dimension in self.dimensions]
        for values in itertools.product(*(dimension.grid() for dimension in self.dimensions)):
            yield dict(zip(names, values, strict=True))

    def configure(self, base: Config, settings: Mapping[str, Any]) -> Config:
        """`base` as a trial with `settings` has it; ConfigError when they do not go together."""
        changes = {**self.fixed, **settings}
        for name, rule in self.proportional.items():
            if rule["of"] in settings:
                size = float(settings[rule["of"]]) * rule["times"]
                changes[name] = max(MULTIPLE, round(size / MULTIPLE) * MULTIPLE)
        return override(base, changes)


def ready() -> list[str]:
    """Names of the ready spaces."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def read_space(name: str, base: Config) -> Space:
    """The ready space called `name`, or the one in the file of that name, checked against `base`.

    ConfigError names file, line and way out.
    """
    path = Path(name)
    if name in ready():
        file, text = f"{name}.toml", (_folder() / f"{name}.toml").read_text()
    elif path.is_file():
        file, text = name, path.read_text()
    else:
        raise ConfigError(f"--space {name}: neither a file nor a ready space ({', '.join(ready())})")
    return _Reader(file, text).space(base)


def _folder() -> Any:
    return resources.files("tune") / "spaces"


class _Reader:
    """Reads one file; every complaint names its line."""

    def __init__(self, file: str, text: str):
        self.file, self.lines = file, text.splitlines()
        self.table = self._parse(text)

    def space(self, base: Config) -> Space:
        known = {"about", "evaluates", "metric", "fixed", "settings", "proportional"}
        for key in self.table:
            if key not in known:
                raise self._bad(key, f"unknown key {key!r}; there are {', '.join(sorted(known))}")
        kind = self.table.get("evaluates", "model")
        if kind not in EVALUATES:
            raise self._bad("evaluates", f"evaluates = {kind!r}: choose one of {', '.join(EVALUATES)}")
        fixed, settings = self._section("fixed"), self._section("settings")
        if not settings:
            raise self._bad("settings", 'nothing to search: add a table such as [settings."optim.lr"]')
        if both := [name for name in settings if name in fixed]:
            raise self._bad(both[0], f"{both[0]} stands under fixed and under settings; keep one")
        if kind == "router" and (other := [name for name in settings if not name.startswith("router.")]):
            raise self._bad(
                other[0], f'{other[0]}: evaluates = "router" searches router.* alone; choose "constellation"'
            )
        base = self._overridden(base, fixed)
        having = {name: (setting, value) for name, setting, value in leaves(base)}
        dimensions = tuple(self._dimension(name, entry, base, having) for name, entry in settings.items())
        proportional = self._section("proportional")
        for name, rule in proportional.items():
            if name not in having or not isinstance(rule, dict) or set(rule) != {"of", "times"}:
                raise self._bad(name, f'{name}: a setting, with of = "another setting" and times = a number')
            if rule["of"] not in settings or not isinstance(rule["times"], (int, float)):
                raise self._bad(name, f"{name}: of={rule['of']!r} is not among the settings of this space")
        space = Space(
            Path(self.file).stem, str(self.table.get("about", "")), kind,
            str(self.table.get("metric", "dev_bits_per_byte")), fixed, dimensions, proportional,
        )  # fmt: skip
        return space

    def _dimension(self, name: str, entry: Any, base: Config, having: Mapping[str, tuple[Setting, Any]]) -> Dimension:
        if not isinstance(entry, dict):
            raise self._bad(name, f'{name}: a table is wanted, such as prior = "log", low = 1e-3, high = 1e-2')
        if name not in having:
            self._overridden(base, {name: None})  # says what is near it
        setting, default = having[name]
        prior = entry.get("prior")
        if prior not in PRIORS:
            raise self._bad(name, f"{name}: prior = {prior!r}; choose one of {', '.join(PRIORS)}")
        allowed = {"prior", "reason", *(("values",) if prior == "choice" else ("low", "high"))}
        if unknown := set(entry) - allowed:
            raise self._bad(name, f"{name}: {min(unknown)!r} does not belong to prior {prior!r}; {sorted(allowed)} do")
        reason = str(entry.get("reason", ""))
        if prior == "choice":
            return self._choice(name, entry, base, setting, default, reason)
        numeric = inspect.IntType if prior == "int" else inspect.FloatType
        if not isinstance(setting.kind, numeric):
            fit = "int or choice" if isinstance(setting.kind, inspect.IntType) else "choice"
            fit = "uniform, log or choice" if isinstance(setting.kind, inspect.FloatType) else fit
            raise self._bad(name, f"{name} must be {setting.wanted}; prior {prior!r} does not fit: use {fit}")
        low, high = (self._number(name, end, entry, setting) for end in ("low", "high"))
        if not low < high:
            raise self._bad(name, f"{name}: low={low:g} must be below high={high:g}")
        if prior == "log" and low <= 0:
            raise self._bad(name, f"{name}: low={low:g} must be above 0 under prior log")
        for end in (low, high):
            self._overridden(base, {name: end}, name)
        return Dimension(name, prior, default, low, high, (), reason)

    def _choice(
        self, name: str, entry: dict[str, Any], base: Config, setting: Setting, default: Any, reason: str
    ) -> Dimension:
        values = entry.get("values")
        if not isinstance(values, list) or not values:
            raise self._bad(name, f"{name}: values = [...] is wanted, at least one")
        parsed = [setting.parse(value) for value in values]
        for at, value in enumerate(parsed):
            if value in parsed[:at]:
                raise self._bad(name, f"{name}: {value!r} stands twice among its values")
            if not setting.admits(value):
                raise self._bad(name, f"{name}={value!r}: must be {setting.wanted} ({setting.meaning})")
        return Dimension(name, "choice", default, 0.0, 0.0, tuple(parsed), reason)

    def _number(self, name: str, end: str, entry: dict[str, Any], setting: Setting) -> Any:
        if end not in entry:
            raise self._bad(name, f"{name}: {end} is missing")
        value = setting.parse(entry[end])
        if isinstance(value, (bool, str)) or not setting.admits(value):
            raise self._bad(name, f"{name}: {end}={entry[end]!r} must be {setting.wanted} ({setting.meaning})")
        return value

    def _overridden(self, base: Config, changes: Mapping[str, Any], name: str | None = None) -> Config:
        try:
            return override(base, changes)
        except ConfigError as error:
            at = name or next((key for key in changes if key in str(error)), next(iter(changes), ""))
            raise self._bad(at, str(error)) from None

    def _section(self, key: str) -> dict[str, Any]:
        found = self.table.get(key) or {}
        if not isinstance(found, dict):
            raise self._bad(key, f"{key}: a table of dotted names is wanted")
        if key == "fixed":
            return found
        return dict(_dotted(found))

    def _parse(self, text: str) -> dict[str, Any]:
        try:
            found = _yaml(text) if self.file.endswith((".yaml", ".yml")) else tomllib.loads(text)
        except ValueError as error:
            raise ConfigError(f"{self.file}: {' '.join(str(error).split())}; see the form in tune/space.py") from None
        if not isinstance(found, dict) or not found:
            raise ConfigError(f'{self.file}: empty; a space needs a table such as [settings."optim.lr"]')
        return found

    def _bad(self, word: str, told: str) -> ConfigError:
        quoted = (f'"{word}"', f"'{word}'", word)
        hit = (n for form in quoted for n, line in enumerate(self.lines, 1) if form in line.partition("#")[0])
        return ConfigError(f"{self.file}:{next(hit, 1)}: {told}")


def _dotted(table: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Entries by dotted name, whether the names were quoted (one key) or not (tables in tables)."""
    for key, value in table.items():
        leaf = not isinstance(value, dict) or {"prior", "low", "high", "values", "of", "times"} & set(value)
        if leaf or not value or not all(isinstance(inner, dict) for inner in value.values()):
            yield place + key, value
        else:
            yield from _dotted(value, f"{place}{key}.")


def _yaml(text: str) -> Any:
    """YAML, where a key that stands twice is an error too."""
    import yaml

    class Once(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise ValueError(f"{key.value} stands twice (at line {key.start_mark.line + 1})")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Once)
    except yaml.YAMLError as error:
        raise ValueError(error) from None
