"""Tables: the rows of Parquet and Arrow files, a batch at a time, so that a table may be larger than memory.

A Hugging Face `datasets` folder saved on disk is Arrow files and what describes them (DESCRIBED): pyarrow reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from constellation.errors import ConfigError

BATCH_ROWS = 256  # of a Parquet file; an Arrow file has batches of its own
TEXT, METADATA = "text", "metadata"
DESCRIBED = ("dataset_info.json", "state.json", "dataset_dict.json")
HELD_OUT = ("dev", "validation", "valid", "test")  # names of a held-out split, the first that is there counts


class BadTable(OSError):
    """A file that is no table, or one without a text."""


def rows(stream: BinaryIO, kind: str) -> Iterator[tuple[int, Any, Any]]:
    """(row from 1, text, metadata) of every row: a str, or bytes that are no UTF-8, or None; a dict or None."""
    try:
        import pyarrow as pa
    except ImportError:
        raise ConfigError("Parquet and Arrow files need pyarrow: pip install pyarrow") from None
    number = 0
    try:
        for batch in (_parquet if kind == "parquet" else _arrow)(stream):
            texts = _values(batch.column(TEXT), pa)
            known = METADATA in batch.schema.names and pa.types.is_struct(batch.schema.field(METADATA).type)
            metadata = _values(batch.column(METADATA), pa) if known else [None] * len(texts)
            for text, own in zip(texts, metadata, strict=True):
                number += 1
                yield number, text, own
    except pa.ArrowException as error:
        raise BadTable(str(error).strip().partition("\n")[0]) from None


def splits(root: Path) -> dict[str, str] | None:
    """Of a saved DatasetDict its folders by "train" and "dev"; None where `root` is none, or has not both."""
    page = _json(root / "dataset_dict.json")
    found = page.get("splits")
    names = [n for n in found if isinstance(n, str)] if isinstance(found, list) else []
    held_out = next((name for name in HELD_OUT if name in names), None)
    return {"train": "train", "dev": held_out} if held_out and "train" in names else None


def missing_files(state: Path) -> list[str] | None:
    """The files that the state.json of a saved dataset names and that are not beside it; None where it is no such."""
    found = _json(state).get("_data_files")
    if not isinstance(found, list):
        return None
    names = [str(file.get("filename")) for file in found if isinstance(file, dict)]
    return [name for name in names if not state.with_name(Path(name).name).exists()]


def _parquet(stream: BinaryIO) -> Iterator[Any]:
    from pyarrow import parquet

    file = parquet.ParquetFile(stream)
    yield from file.iter_batches(BATCH_ROWS, columns=_columns(file.schema_arrow), use_threads=False)


def _arrow(stream: BinaryIO) -> Iterator[Any]:
    """Both forms: the stream that `datasets` writes, and the file (Feather 2), which begins with ARROW1."""
    from pyarrow import ipc

    whole = stream.read(6) == b"ARROW1"
    stream.seek(0)
    reader = ipc.open_file(stream) if whole else ipc.open_stream(stream)
    columns = _columns(reader.schema)
    batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if whole else reader
    for batch in batches:
        yield batch.select(columns)


def _columns(schema: Any) -> list[str]:
    import pyarrow as pa

    if TEXT not in schema.names:
        raise BadTable(f"no column {TEXT!r}; it has {', '.join(schema.names) or 'none'}")
    kind = schema.field(TEXT).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise BadTable(f"column {TEXT!r} is of type {kind}; strings are wanted")
    return [name for name in (TEXT, METADATA) if name in schema.names]


def _values(column: Any, pa: Any) -> list[Any]:
    """What the column holds; of a text that is no UTF-8 its bytes."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(one, pa) for one in column]


def _value(scalar: Any, pa: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else None


def _json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; {} where there is none."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
