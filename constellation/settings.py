"""What a setting may be: its type, range and meaning stand beside its field, and everyone who sets it reads them there.

    @dataclass(frozen=True)
    class Data:
        dev_fraction: Annotated[float, Meta(gt=0, le=0.5), says("part of the text held out")] = 0.05

Configuration files and dotted overrides (config.py), the sampler (decoding/sampling.py), HTTP (router/http/requests.py)
and the command line (commands/options.py) hold values against the same `msgspec.Meta`. A number must be finite.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, inspect

from constellation.errors import ConfigError

R = TypeVar("R")

Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Part = Annotated[float, Meta(ge=0, le=1)]

_WORDS = {"true": True, "1": True, "false": False, "0": False}
_KINDS: dict[Any, str] = {
    inspect.IntType: "a whole number", inspect.FloatType: "a finite number", inspect.BoolType: "true or false",
    inspect.StrType: "text",
}  # fmt: skip


def says(meaning: str) -> Meta:
    """The meaning of a field, in one line, with its unit."""
    return Meta(description=meaning)


def unsigned(bits: int) -> Meta:
    """0 .. 2^bits - 1; msgspec itself knows bounds of up to 63 bits."""
    return Meta(ge=0, extra={"le": 2**bits - 1}) if bits > 63 else Meta(ge=0, le=2**bits - 1)


@dataclass(frozen=True)
class Setting:
    """A field of a record as its annotation describes it."""

    name: str
    hint: Any  # the whole annotation
    kind: Any  # what msgspec reads there, without the meaning and None: an IntType, a LiteralType ...
    default: Any
    meaning: str
    high: float | None  # the greatest value, also beyond the 63 bits of msgspec

    @property
    def wanted(self) -> str:
        """What a value must be, in words: "a whole number from 0 to 64"."""
        if isinstance(self.kind, inspect.LiteralType):
            return f"one of {', '.join(map(str, self.kind.values))}"
        kind = _KINDS.get(type(self.kind), "of another form")
        above, low, below = (getattr(self.kind, bound, None) for bound in ("gt", "ge", "lt"))
        if low is not None and self.high is not None:
            return f"{kind} from {low} to {self.high}"
        bounds = {"above": above, "of at least": low, "below": below, "at most": self.high}
        said = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
        return f"{kind} {said}".strip()

    def parse(self, value: Any) -> Any:
        """`value`, or what its text says, as the field's type; what is neither stays for `check` to refuse."""
        try:
            if isinstance(self.kind, inspect.BoolType):
                return _WORDS.get(str(value).lower(), value)
            if isinstance(self.kind, inspect.FloatType) and not isinstance(value, bool):
                return float(value)
            if isinstance(self.kind, inspect.IntType) and isinstance(value, (str, float)):
                return _whole(value)
        except (ValueError, TypeError, OverflowError):
            pass
        return value

    def admits(self, value: Any, finite: bool = True) -> bool:
        """Whether the field may have `value`."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value != value or (finite and abs(value) == math.inf) or (self.high is not None and value > self.high):
                return False
            if isinstance(self.kind, inspect.FloatType):
                value = float(value)  # numpy's is one too
        try:
            return bool(msgspec.convert(value, self.hint) == value)  # a list would become a tuple
        except msgspec.ValidationError:
            return False

    def check(self, value: Any, place: str = "", finite: bool = True) -> None:
        """ConfigError unless the field may have `value`; `place` stands before its name."""
        if value is self.default or self.admits(value, finite):
            return
        shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
        such = f", such as {self.default}" if isinstance(self.default, (int, float)) else ""
        raise ConfigError(f"{place}{self.name}={shown}: must be {self.wanted}{such} ({self.meaning})")


@functools.cache
def settings_of(record: Any) -> Mapping[str, Setting]:
    """The fields of a dataclass that are settings, by name: all but those that hold records."""
    hints = typing.get_type_hints(record, include_extras=True)
    found = {}
    for field in dataclasses.fields(record):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if not dataclasses.is_dataclass(default):
            found[field.name] = _setting(field.name, hints[field.name], default)
    return types.MappingProxyType(found)


def _setting(name: str, hint: Any, default: Any) -> Setting:
    found = inspect.type_info(hint)
    if isinstance(found, inspect.UnionType):
        found = next(one for one in found.types if not isinstance(one, inspect.NoneType))
    if not isinstance(found, inspect.Metadata):
        return Setting(name, hint, found, default, "", getattr(found, "le", None))
    schema, extra = found.extra_json_schema or {}, found.extra or {}
    high = extra.get("le", getattr(found.type, "le", None))
    return Setting(name, hint, found.type, default, schema.get("description", ""), high)


def leaves(record: Any, place: str = "") -> Iterator[tuple[str, Setting, Any]]:
    """(dotted name, setting, value) of a record and of the records it holds, in reading order."""
    settings = settings_of(type(record))  # type: ignore[arg-type]
    for name, value in vars(record).items():
        if name in settings:
            yield place + name, settings[name], value
        else:
            yield from leaves(value, f"{place}{name}.")


def check(record: Any, place: str = "", finite: bool = True) -> None:
    """ConfigError, one line with name, value, range and meaning, unless every setting may have its value.

    Without `finite` a number may be infinite.
    """
    for name, setting, value in leaves(record, place):
        setting.check(value, name.removesuffix(setting.name), finite)


def merged(record: R, changes: Mapping[str, Any]) -> R:
    """`record` with the settings of these dotted names, which it has, parsed and replaced together."""
    settings = settings_of(type(record))  # type: ignore[arg-type]
    new: dict[str, Any] = {}
    inside: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        head, dot, rest = name.partition(".")
        if dot:
            inside.setdefault(head, {})[rest] = value
        else:
            new[name] = settings[name].parse(value)
    new |= {head: merged(getattr(record, head), own) for head, own in inside.items()}
    return dataclasses.replace(record, **new)  # type: ignore[type-var]


def _whole(value: str | float) -> int:
    """A whole number, also as 5e6 or 5_000_000."""
    if isinstance(value, str) and value.replace("_", "").strip().lstrip("+-").isdecimal():
        return int(value)
    number = float(value)
    if number != int(number):
        raise ValueError
    return int(number)
