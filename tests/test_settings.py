"""A setting's range stands beside its field: whoever sets it, by whatever way, hears the same yes or no."""

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import click
import pytest
from click.testing import CliRunner
from msgspec import Meta

from constellation.commands import options
from constellation.decoding.sampling import Sampling
from constellation.errors import ConfigError
from constellation.settings import Count, Part, check, leaves, merged, says, settings_of, unsigned
from router.http.requests import CompletionRequest, Refusal, read

EDGES = {
    "temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "top_k": (0, 2**31),
}  # fmt: skip
ON_THE_COMMAND_LINE = ("temperature", "top_p", "min_p", "repetition_penalty", "top_k")
ONE_MORE = {"top_k": 1}  # over HTTP -1 is vLLM's word for all


def by_the_sampler(name: str, value: float) -> bool:
    try:
        Sampling(**{name: value})  # type: ignore[arg-type]
    except ConfigError:
        return False
    return True


def over_http(name: str, value: float) -> bool:
    try:
        read(json.dumps({"prompt": "x", name: value}).encode(), CompletionRequest)
    except Refusal:
        return False
    return True


def on_the_command_line(name: str, value: float) -> bool:
    @click.command()
    @options.sampling
    def command(**settings: Any) -> None:
        pass

    return CliRunner().invoke(command, [f"--{name.replace('_', '-')}={value}"]).exit_code == 0


@pytest.mark.parametrize("name", EDGES)
def test_the_sampler_http_and_the_command_line_allow_the_same(name: str) -> None:
    low, high = EDGES[name]
    step = 1 if name == "top_k" else 1e-3
    allowed = [by_the_sampler(name, value) for value in (low - step, low, high, high + step)]
    assert allowed == [False, name != "top_p", True, False]
    for value, wanted in zip((low - step - ONE_MORE.get(name, 0), low, high, high + step), allowed, strict=True):
        assert over_http(name, value) == wanted, value
        if name in ON_THE_COMMAND_LINE:
            assert on_the_command_line(name, value) == wanted, value


@dataclass(frozen=True)
class Inner:
    part: Annotated[Part, says("of a whole")] = 0.5


@dataclass(frozen=True)
class Record:
    count: Annotated[Count, says("things")] = 3
    kind: Annotated[Literal["b", "a"], says("of thing")] = "a"
    loud: Annotated[bool, says("whether it is heard")] = False
    wide: Annotated[int, unsigned(64), says("of 64 bits")] = 0
    between: Annotated[float, Meta(gt=0, lt=1), says("neither end")] = 0.5
    most: Annotated[Count, says("of them; nothing: no limit")] | None = None
    name: Annotated[str, says("in words")] = "x"
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("count", 0, "count=0: must be a whole number of at least 1, such as 3 (things)"),
        ("count", 1.0, "count=1.0: must be a whole number of at least 1, such as 3 (things)"),
        ("kind", "c", "kind='c': must be one of a, b (of thing)"),
        ("loud", 1, "loud=1: must be true or false, such as False (whether it is heard)"),
        ("wide", 2**64, f"wide={2**64}: must be a whole number from 0 to {2**64 - 1}, such as 0 (of 64 bits)"),
        ("between", 1.0, "between=1.0: must be a finite number above 0 and below 1, such as 0.5 (neither end)"),
        ("between", math.nan, "between=nan: must be a finite number above 0 and below 1, such as 0.5 (neither end)"),
        ("most", 0, "most=0: must be a whole number of at least 1 (of them; nothing: no limit)"),
        ("name", 3, "name=3: must be text (in words)"),
    ],
)
def test_a_refusal_is_one_line_with_name_value_range_and_meaning(name: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(Record(**{name: value}), "a.")  # type: ignore[arg-type]
    assert str(error.value) == f"a.{words}"


def test_a_record_inside_a_record_has_dotted_names() -> None:
    assert [name for name, _, _ in leaves(Record())][-2:] == ["name", "inner.part"]
    with pytest.raises(ConfigError, match=r"^inner\.part=2: must be a finite number from 0 to 1"):
        check(Record(inner=Inner(2)))


@pytest.mark.parametrize("number", ["5000000", "5_000_000", "5e6", 5_000_000, 5e6])
def test_a_whole_number_may_be_written_in_any_way(number: object) -> None:
    assert merged(Record(), {"count": number}) == Record(count=5_000_000)


def test_a_whole_number_of_many_digits_keeps_them() -> None:
    assert merged(Record(), {"wide": str(2**64 - 1)}).wide == 2**64 - 1


def test_names_are_replaced_together() -> None:
    changed = merged(Record(), {"inner.part": "0.25", "loud": "TRUE", "between": "1e-1", "kind": "b"})
    assert changed == Record(kind="b", loud=True, between=0.1, inner=Inner(0.25))


def test_what_cannot_be_read_stays_as_it_was_for_the_check() -> None:
    assert merged(Record(), {"count": "many", "loud": "perhaps", "between": True, "wide": "1.5"}) == Record(
        count="many", loud="perhaps", between=True, wide="1.5"  # type: ignore[arg-type]
    )  # fmt: skip


def test_fields_that_hold_records_are_no_settings() -> None:
    assert "inner" not in settings_of(Record)
