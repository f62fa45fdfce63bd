"""Versions of a run's JSON files: what each version changed, and how an older file is read as the newest.

meta      2   every block of the layout has its unit, place in theta and hash; the layout a hash
summary   2   run_id and changes, the settings that differ from the defaults
manifest  1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from constellation.artifacts.layout import layout_hash, layout_of
from constellation.errors import ArtifactError
from constellation.storage.atomic import read_object

NEWEST = {"meta": 2, "summary": 2, "manifest": 1}


def read(file: Path, kind: str) -> dict[str, Any]:
    """The page in `file` as the newest version has it; ArtifactError when it is damaged or newer than this program."""
    return upgraded(read_object(file), kind, str(file))


def upgraded(page: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """`page` as the newest version has it."""
    found = dict(page)
    version = found.get("schema")
    if not isinstance(version, int) or not 1 <= version <= NEWEST[kind]:
        raise ArtifactError(f"{where}: schema {version!r} of a {kind}, this version reads 1 to {NEWEST[kind]}; update")
    try:
        for older in range(version, NEWEST[kind]):
            found = {**_UP[kind, older](found), "schema": older + 1}
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{where} is damaged ({type(error).__name__}: {error})") from None
    return found


def _meta_1(page: dict[str, Any]) -> dict[str, Any]:
    blocks = layout_of(page["layout"])
    return {**page, "layout": blocks, "layout_hash": layout_hash(blocks)}


def _summary_1(page: dict[str, Any]) -> dict[str, Any]:
    return {"run_id": None, "changes": {}, **page}


_UP: dict[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]] = {
    ("meta", 1): _meta_1,
    ("summary", 1): _summary_1,
}
