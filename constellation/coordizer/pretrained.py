"""A tokenizer.json of others, read so that a text's tokens, put in a row, are its bytes.

    byte-level BPE (SmolLM, Llama 3, GPT-2)    a token's characters stand for bytes (alphabet.py)
    BPE of SentencePiece (TinyLlama, Llama 2)  "▁" stands for a space, tokens <0x00> .. <0xFF> for bytes

The router counts bytes and a packet is cut at bytes, so what adds to a text is left out: tokens around it (BOS), the
space before its first word. What changes a text is refused by its name: other normalizers, other models. A literal "▁"
goes byte by byte. So ids are those of transformers, without special tokens, but for SentencePiece's first word.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Engine

from constellation.coordizer.alphabet import alphabet
from constellation.errors import ArtifactError, ConfigError

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Parts:
    """What a tokenizer is made of."""

    engine: Engine
    token_bytes: list[bytes]  # b"" for special tokens and unused ids
    specials: dict[int, str]
    byte_ids: list[int | None]  # of each byte
    apart: str  # characters that do not go through BPE


def read(text: str, eos: int) -> Parts:
    """ConfigError for a tokenizer that is lossy, ArtifactError for what is none."""
    try:
        content = json.loads(text)
        kind, vocab = content["model"].get("type"), content["model"]["vocab"]
        added = {int(t["id"]): t for t in content.get("added_tokens") or ()}
        steps = list(_steps(content.get("pre_tokenizer")))
        by_bytes = any(step["type"] == "ByteLevel" for step in steps)
        if kind != "BPE":
            raise ConfigError(f"tokenizer.json: model {kind!r} is none that a run can use: it must be BPE")
        plain = _without_additions(content)
        engine = Engine.from_str(json.dumps(plain))
    except ConfigError:
        raise
    except Exception as error:  # the engine raises bare Exception
        raise ArtifactError(f"tokenizer.json: not a tokenizer: {type(error).__name__}: {error}") from None
    engine.encode_special_tokens = True
    token_bytes = [b""] * (1 + max([*vocab.values(), *added]))
    for name, at in vocab.items():
        token_bytes[at] = _of_alphabet(name) if by_bytes else _of_sentencepiece(name)
    specials = {at: str(t["content"]) for at, t in added.items() if t.get("special")}
    for at, token in added.items():
        token_bytes[at] = b"" if at in specials else str(token["content"]).encode()
    if not 0 <= eos < len(token_bytes):
        raise ConfigError(f"tokenizer.json: the end of a text, id {eos}, is none of its {len(token_bytes)} tokens")
    if eos not in added and token_bytes[eos]:
        raise ConfigError(f"tokenizer.json: the token {token_bytes[eos]!r}, id {eos}, ends a text and stands in texts")
    specials.setdefault(eos, next((name for name, at in vocab.items() if at == eos), f"<{eos}>"))
    token_bytes[eos] = b""
    own = {data: at for at, data in enumerate(token_bytes) if len(data) == 1}
    if not by_bytes:  # the token <0x41> is a byte, the token A a character: both are read as it
        own |= {bytes([int(m[1], 16)]): at for name, at in vocab.items() if (m := _BYTE.fullmatch(name))}
    if (missing := [b for b in range(128) if bytes([b]) not in own]) and not by_bytes:
        raise ConfigError(f"tokenizer.json: byte 0x{missing[0]:02x} has no token, so texts with it would be lost")
    return Parts(engine, token_bytes, specials, [own.get(bytes([b])) for b in range(256)], "" if by_bytes else SPACE)


def end_of_text(folder: Path) -> int:
    """The id that a model of transformers ends a text with: of several the first."""
    for name in ("config.json", "generation_config.json"):
        said = _object(folder / name).get("eos_token_id")
        if isinstance(said, list) and said:
            said = said[0]
        if isinstance(said, int):
            return said
    token = _object(folder / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    for row in _object(folder / "tokenizer.json").get("added_tokens") or ():
        if row.get("content") == token:
            return int(row["id"])
    raise ConfigError(f"{folder}: neither config.json nor tokenizer_config.json says which token ends a text")


def _without_additions(content: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer without what it adds around a text; ConfigError for what changes the text itself."""
    plain: dict[str, Any] = {**content, "post_processor": None, "truncation": None, "padding": None}
    kept = []
    for step in _steps(content.get("normalizer")):
        if step["type"] == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE:
            kept.append(step)
        elif step["type"] != "Prepend":
            raise ConfigError(f"tokenizer.json: its normalizer {step['type']} changes the text, so bytes would be lost")
    plain["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for step in _steps(content.get("pre_tokenizer")):
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        elif step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
    return plain


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one or a sequence."""
    if not part:
        return
    if part["type"] == "Sequence":
        for step in part.get("normalizers") or part.get("pretokenizers") or ():
            yield from _steps(step)
    else:
        yield part


def _of_alphabet(name: str) -> bytes:
    known = _byte_of()
    return bytes(known[c] for c in name) if all(c in known for c in name) else b""


@functools.cache
def _byte_of() -> dict[str, int]:
    return {c: b for b, c in enumerate(alphabet())}


def _of_sentencepiece(name: str) -> bytes:
    found = _BYTE.fullmatch(name)
    return bytes([int(found[1], 16)]) if found else name.replace(SPACE, " ").encode()


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
