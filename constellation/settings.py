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
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from constellation.errors import ConfigError

R = TypeVar("R")

Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Part = Annotated[float, Meta(ge=0, le=1)]

_WORDS = {"true": True, "1": True, "false": False, "0": False}
_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


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
    kind: Any  # without Annotated and None: int, float, bool, str, Literal[...], or something larger
    default: Any
    meaning: str
    above: float | None  # bounds; None: unbounded
    least: float | None
    below: float | None
    most: float | None

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal; of other kinds none."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def wanted(self) -> str:
        """What a value must be, in words: "a whole number from 0 to 64"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        low = f"above {self.above:g}" if self.above is not None else ""
        high = f"below {self.below:g}" if self.below is not None else ""
        if self.least is not None and self.most is not None:
            bounds = f"from {_number(self.least)} to {_number(self.most)}"
        else:
            low = low or (f"of at least {_number(self.least)}" if self.least is not None else "")
            high = high or (f"at most {_number(self.most)}" if self.most is not None else "")
            bounds = " and ".join(filter(None, (low, high)))
        return f"{_KINDS.get(self.kind, 'of another form')} {bounds}".strip()

    def parse(self, value: Any) -> Any:
        """`value`, or what its text says, as the field's type; what is neither stays for `check` to refuse."""
        try:
            if self.kind is bool:
                return _WORDS.get(str(value).lower(), value)
            if isinstance(value, bool):
                return value
            if self.kind is float:
                return float(value)
            if self.kind is int:
                return _whole(value)
        except (ValueError, TypeError, OverflowError):
            pass
        return value

    def admits(self, value: Any, finite: bool = True) -> bool:
        """Whether the field may have `value`."""
        if isinstance(value, (int, float)) and not isinstance(value, bool) and self.kind is float:
            if not -math.inf < value < math.inf and (finite or math.isnan(value)):
                return False
            value = float(value)
        try:
            converted = msgspec.convert(value, self.hint)
        except msgspec.ValidationError:
            return False
        most = self.most if self.kind is int and value is not None else None  # beyond msgspec's 63 bits
        return bool(converted == value) and (most is None or value <= most)  # a list would become a tuple

    def check(self, value: Any, place: str = "", finite: bool = True) -> None:
        """ConfigError unless the field may have `value`; `place` stands before its name."""
        if value is self.default or self.admits(value, finite):
            return
        shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
        such = f", such as {self.default}" if self.kind in (int, float, bool) and self.default is not None else ""
        raise ConfigError(f"{place}{self.name}={shown}: must be {self.wanted}{such} ({self.meaning})")


@functools.cache
def settings_of(record: Any) -> Mapping[str, Setting]:
    """The fields of a record that are settings, by name: all but those that hold records."""
    hints = typing.get_type_hints(record, include_extras=True)
    found = {}
    for field in dataclasses.fields(record):
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if not dataclasses.is_dataclass(default):
            found[field.name] = _setting(field.name, hints[field.name], default)
    return types.MappingProxyType(found)


def leaves(record: Any, place: str = "") -> Iterator[tuple[str, Setting, Any]]:
    """(dotted name, setting, value) of a record and of the records it holds, in reading order."""
    settings = settings_of(type(record))  # type: ignore[arg-type]
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name in settings:
            yield place + field.name, settings[field.name], value
        else:
            yield from leaves(value, f"{place}{field.name}.")


def check(record: Any, place: str = "", finite: bool = True) -> None:
    """ConfigError, one line with name, value, range and meaning, unless every setting may have its value.

    Without `finite` a number may be infinite.
    """
    for name, setting, value in leaves(record, place):
        setting.check(value, name.removesuffix(setting.name), finite)


def merged(record: R, changes: Mapping[str, Any]) -> R:
    """`record` with the fields in `changes`, parsed; a mapping changes the record of its name. Names are known."""
    settings = settings_of(type(record))  # type: ignore[arg-type]
    return dataclasses.replace(record, **{  # type: ignore[type-var]
        name: settings[name].parse(value) if name in settings else merged(getattr(record, name), value)
        for name, value in changes.items()
    })  # fmt: skip


def _setting(name: str, hint: Any, default: Any) -> Setting:
    kind, metas = hint, list[Meta]()
    while True:
        if typing.get_origin(kind) is Annotated:
            metas, kind = [*kind.__metadata__, *metas], kind.__origin__
        elif isinstance(kind, types.UnionType) and types.NoneType in kind.__args__ and len(kind.__args__) == 2:
            kind = next(k for k in kind.__args__ if k is not types.NoneType)
        else:
            break

    def said(what: str) -> Any:
        values = [getattr(meta, what) for meta in metas] + [(meta.extra or {}).get(what) for meta in metas]
        return next((value for value in reversed(values) if value is not None), None)

    return Setting(name, hint, kind, default, said("description") or "", said("gt"), said("ge"), said("lt"), said("le"))


def _whole(value: Any) -> int:
    """A whole number, also as 5e6 or 5_000_000."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if value != int(value):
        raise ValueError
    return int(value)


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
