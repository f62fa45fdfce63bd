"""From an answer's bytes to text that may be shown: nothing shown is ever taken back.

Held back are a tail that may be the beginning of a stop text and bytes that may be the beginning of a
character. A byte that belongs to no character becomes U+FFFD as soon as that is certain, as in
`bytes.decode("utf-8", "replace")`. Law: what was shown, in whatever pieces the bytes came, is that
decoding of all bytes before the first stop text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class ShownText:
    """A text that is being shown while it is written; `stop` texts end it."""

    def __init__(self, stop: Sequence[str] = ()):
        self._stops = [s.encode("utf-8", "surrogatepass") for s in stop]
        self._held = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, new: bytes, last: bool) -> str:
        """What may be shown after `new`; with `last` all the rest, up to a stop text."""
        held = self._held + new
        if last:
            end = min((at for at in map(held.find, self._stops) if at >= 0), default=len(held))
        else:
            end = len(held) - max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[end:]
        return self._decoder.decode(held[:end], final=last)


def _overlap(text: bytes, stop: bytes) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
