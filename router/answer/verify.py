"""An answer held against its certificate: its text, its tokens and its kernels must be those that were certified.

Three kinds of evidence, each as far as the answer shows what it needs:
  - the counts of every stretch between two looks are those of the answer's own bytes there;
  - mode, kernels, looks and hand-offs are those that the replayed decisions give;
  - text and tokens have the certificate's digests, and the tokens decode to the text.
Counts hold against whoever changes a text and its digest alike; digests bind what follows the last look, too, and the
order of stretches that have equal counts. A certificate of schema 1 has no digests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from constellation.coordizer.tokenizer import Tokenizer
from constellation.errors import ArtifactError
from router.answer.certificate import DIGITS, Replay, digest_of, replay
from router.decide.counts import SPAN, trigrams
from router.decide.fisher_rao import FisherRaoRouter
from router.decide.modes import MIXED

REPLACED = "\ufffd"  # a byte that belongs to no character, as text shows it


@dataclass(frozen=True)
class ShownAnswer:
    """One answer of a reply in JSON: `story` says who wrote it, and holds the certificate."""

    story: Mapping[str, Any]
    text: str | None = None
    token_ids: list[int] | None = None
    prompt: bytes | None = None  # None when the reply does not show it


def told_in(reply: Mapping[str, Any], tokenizer: Tokenizer) -> list[ShownAnswer]:
    """The answers in `reply`: of `constellation generate --json`, or of the service; ArtifactError without one."""
    if isinstance(reply.get("certificate"), str):
        prompt = reply.get("prompt")
        known = prompt.encode("utf-8", "surrogatepass") if isinstance(prompt, str) else None
        return [ShownAnswer(reply, reply.get("text"), reply.get("token_ids"), known)]
    first, found = reply.get("constellation"), list[ShownAnswer]()
    choices = reply.get("choices") or [{}]  # a decision has none
    for choice in choices if isinstance(choices, list) else []:
        story = choice.get("constellation", first) if isinstance(choice, dict) else None
        if not isinstance(story, dict):
            found = []
            break
        message, ids = choice.get("message"), choice.get("prompt_token_ids")
        text = message.get("content") if isinstance(message, dict) else choice.get("text")
        found.append(ShownAnswer(story, text, choice.get("token_ids"), None if ids is None else _bytes(ids, tokenizer)))
    if not found or not all(isinstance(one.story.get("certificate"), str) for one in found):
        raise ArtifactError('certificate: the answer has no field "certificate", at the top or under "constellation"')
    return found


def verify(told: ShownAnswer, router: FisherRaoRouter, tokenizer: Tokenizer) -> Replay:
    """The replay of its certificate; ArtifactError, with the first difference, unless it is this answer's."""
    if not told.story["certificate"]:
        raise ArtifactError("certificate: empty, for the mode named one kernel: nothing was decided")
    found = replay(told.story["certificate"], router)
    _story(told.story, found)
    text, prompt, ids = told.text, told.prompt, told.token_ids
    if text is not None and type(text) is not str:
        raise ArtifactError("certificate: the answer's text is no text")
    written = None if ids is None else _bytes(ids, tokenizer)
    if text is not None and found.text is not None and digest_of(text) != found.text:
        prompt, text = _echoed(text, prompt, found.at_bytes[0])
        if digest_of(text) != found.text:
            raise ArtifactError("certificate: the answer's text is not the one that was certified")
    if ids is not None and found.tokens is not None and digest_of(ids) != found.tokens:
        raise ArtifactError("certificate: the answer's tokens are not those that were certified")
    if text is not None and written is not None and not written.decode("utf-8", "replace").startswith(text):
        raise ArtifactError("certificate: the answer's tokens do not decode to its text")
    if written is None and text is not None:
        written = text.partition(REPLACED)[0].encode()  # as far as its bytes are known
    _counts(found, prompt, written, ids is not None, router.config.bins)
    return found


def _echoed(text: str, prompt: bytes | None, length: int) -> tuple[bytes, str]:
    """(prompt, answer) of a text that begins with its prompt, of `length` bytes."""
    data = text.encode("utf-8", "surrogatepass")
    shown = (data[:length] if prompt is None else prompt).decode("utf-8", "replace")
    return data[:length] if prompt is None else prompt, text.removeprefix(shown)


def _story(story: Mapping[str, Any], found: Replay) -> None:
    """ArtifactError unless who is said to have answered, and why, is what was decided."""
    panels = [look.panel for look in found.looks]
    wrote = None if None in panels else list(dict.fromkeys(name for panel in panels for name, _ in panel or ()))
    mixed = found.mode in MIXED
    heaviest = [max(panel, key=lambda one: one[1])[0] if panel else None for panel in panels]
    names = heaviest if mixed else list(found.kernels)
    expected: dict[str, Any] = {"mode": found.mode, "kernels": wrote, "kernel": found.looks[-1].choice.kernel}
    for name, value in expected.items():
        if name in story and value is not None and story[name] != value:
            raise ArtifactError(f"certificate: the answer says {name}={story[name]!r}, decided was {value!r}")
    if "looks" in story:
        said = [(look.get("at_bytes"), look.get("kernel")) for look in _rows(story, "looks")]
        decided = [(look.at_bytes, name) for look, name in zip(found.looks, names, strict=True)]
        different = [i for i, (a, b) in enumerate(zip(said, decided)) if a[0] != b[0] or b[1] not in (None, a[1])]
        if len(said) != len(decided) or different:
            raise ArtifactError("certificate: the answer's looks are not those that were decided")
        for row, look in zip(_rows(story, "looks"), found.looks, strict=True):
            posterior = row.get("posterior")
            if isinstance(posterior, float) and abs(posterior - float(look.choice.posterior.max())) > 2 * DIGITS:
                raise ArtifactError(f"certificate: the posterior at byte {look.at_bytes} is not what its counts give")
    if "hand_offs" in story:
        moves = [] if mixed else [(b.at_bytes, a.kernel, b.kernel) for a, b in zip(found.looks, found.looks[1:])]
        moves = [move for move in moves if move[1] != move[2]]
        if [(h.get("at_bytes"), h.get("source"), h.get("target")) for h in _rows(story, "hand_offs")] != moves:
            raise ArtifactError("certificate: the answer's hand-offs are not those that were decided")


def _counts(found: Replay, prompt: bytes | None, written: bytes | None, whole: bool, bins: int) -> None:
    """ArtifactError unless the bytes of prompt and answer, as far as they are known, have the certificate's counts.

    `whole`: `written` is all of the answer. It is known up to a stop text, or a broken character, otherwise.
    """
    start = found.at_bytes[0]
    if prompt is not None and len(prompt) != start:
        raise ArtifactError(f"certificate: the prompt has {len(prompt)} bytes, certified were {start}")
    known = (prompt if prompt is not None else b"") + (written if written is not None else b"")
    offset = 0 if prompt is not None else start  # of the known bytes
    before = 0
    for look in found.looks:
        begin, end = max(0, before - SPAN + 1), look.at_bytes
        before = end
        if end - offset > len(known):
            if whole:
                raise ArtifactError(f"certificate: a look at byte {end}, the answer ends before")
            return
        if end <= offset:
            continue
        counted = np.bincount(trigrams(known[max(0, begin - offset) : end - offset], bins), minlength=bins)
        if (counted > look.new).any() or (begin >= offset and (counted != look.new).any()):
            raise ArtifactError(f"certificate: the bytes before byte {end} are not those that were counted")


def _rows(story: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    rows = story[name]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ArtifactError(f"certificate: the answer's {name} are none of this project")
    return rows


def _bytes(ids: Any, tokenizer: Tokenizer) -> bytes:
    if not isinstance(ids, list) or any(type(t) is not int or not 0 <= t < tokenizer.vocab_size for t in ids):
        raise ArtifactError("certificate: the answer's tokens are not those of this run's tokenizer")
    return tokenizer.decode(ids)
