"""The table of many runs: a row a run, from its summary.json alone.

A row has `run`, the folder below the one that was asked for, what the summary says, and each setting that differs from
the defaults under its dotted name. A summary that cannot be read is a row of status "damaged", with the reason in
`failure`.
"""

from __future__ import annotations

import csv
import io
import json
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from constellation.artifacts import schema
from constellation.errors import ArtifactError, ConfigError
from constellation.storage.atomic import write_bytes

SUMMARY = "summary.json"
_LEAF = {"checkpoints", "data", "router", "trackers"}  # folders of a run that hold no run
_LEFT_OUT = ("schema", "changes", "optimizer")
_COMPARE = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "=": operator.eq, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
Row = dict[str, Any]


def rows_of(folder: Path) -> list[Row]:
    """The rows of every run in `folder`, itself included, by name; ConfigError when it is no folder."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; name one that holds runs")
    return [_row(Path(file), folder) for file in find(str(folder), SUMMARY)]


def select(rows: Sequence[Row], conditions: Sequence[str]) -> list[Row]:
    """The rows that meet all of `conditions`: NAME=VALUE, != < <= > >=, or NAME~PART of its text.

    A row that has no such name meets none but !=. ConfigError for a condition that is none, or a name that no row has.
    """
    tests = [_condition(words, rows) for words in conditions]
    return [row for row in rows if all(test(row) for test in tests)]


def ordered(rows: Sequence[Row], name: str, reverse: bool = False) -> list[Row]:
    """By `name`, numbers before text, rows without it last."""
    _known(name, rows)
    there = [row for row in rows if row.get(name) is not None]
    there.sort(key=lambda row: _key(row[name]), reverse=reverse)
    return there + [row for row in rows if row.get(name) is None]


def columns(rows: Sequence[Row]) -> list[str]:
    """Every name that a row has, in the order in which they are met."""
    return list(dict.fromkeys(name for row in rows for name in row))


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """table.csv and table.parquet in `folder`; ConfigError without pyarrow, once the first is written."""
    names = columns(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    write_bytes(folder / "table.csv", text.getvalue().encode())
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(
            f"table.csv is written to {folder}; table.parquet needs pyarrow: pip install pyarrow"
        ) from None
    held = io.BytesIO()
    parquet.write_table(pa.table({name: _column([row.get(name) for row in rows]) for name in names}), held)
    write_bytes(folder / "table.parquet", held.getvalue())
    return [folder / "table.csv", folder / "table.parquet"]


def find(folder: str, name: str) -> Iterator[str]:
    """Paths of every file of this name in the folders of runs, in order; links to folders are not followed."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    if any(entry.name == name for entry in entries):
        yield os.path.join(folder, name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and entry.name not in _LEAF and not entry.name.startswith("."):
            yield from find(entry.path, name)


def _row(file: Path, root: Path) -> Row:
    name = file.parent.relative_to(root).as_posix()
    try:
        page = schema.read(file, "summary")
    except ArtifactError as error:
        return {"run": name, "status": "damaged", "failure": str(error)}
    changes = page["changes"] if isinstance(page["changes"], dict) else {}
    return {"run": name, **{k: v for k, v in page.items() if k not in _LEFT_OUT}, **changes}


def _condition(words: str, rows: Sequence[Row]) -> Any:
    sign = next((s for s in ("!=", "<=", ">=", "~", "=", "<", ">") if s in words), None)
    name, _, wanted = (part.strip() for part in words.partition(sign or "="))
    if sign is None or not name:
        raise ConfigError(f"--filter {words!r}: NAME=VALUE is wanted, or != < <= > >= ~, such as status=done")
    _known(name, rows)

    def meets(row: Row) -> bool:
        value = row.get(name)
        if sign == "~":
            return wanted in str(_cell(value))
        if value is None:
            return (sign == "!=") == (wanted != "")
        a, b = _key(value), _key(_parsed(wanted))
        if a[0] != b[0]:  # a number and a text are never equal, and have no order
            return sign == "!="
        return bool(_COMPARE[sign](a, b))

    return meets


def _known(name: str, rows: Sequence[Row]) -> None:
    if rows and not any(name in row for row in rows):
        raise ConfigError(f"no run has {name!r}; there is {', '.join(columns(rows))}")


def _parsed(text: str) -> Any:
    words = {"true": True, "false": False}
    try:
        return words[text.lower()] if text.lower() in words else float(text)
    except ValueError:
        return text


def _key(value: Any) -> tuple[int, Any]:
    return (0, float(value)) if isinstance(value, (bool, int, float)) else (1, str(_cell(value)))


def _cell(value: Any) -> Any:
    """What a CSV holds of it: numbers and text as they are, the rest as JSON; nothing for None."""
    if value is None:
        return ""
    return value if isinstance(value, (str, int, float)) and not isinstance(value, bool) else json.dumps(value)


def _column(found: Sequence[Any]) -> Any:
    """Numbers, truth values or text as Parquet has them; of a column that mixes them the text."""
    import pyarrow as pa

    kinds = {type(value) for value in found if value is not None}
    if kinds <= {int, float} and kinds:
        return pa.array(found, pa.int64() if kinds == {int} else pa.float64())
    if kinds == {bool}:
        return pa.array(found, pa.bool_())
    return pa.array([None if v is None else str(_cell(v)) for v in found], pa.string())


def compared(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Of the names in which `rows` differ, what each row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = {name: [row.get(name) for row in rows] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}
