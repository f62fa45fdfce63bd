"""The hand-off packet: all of a request that has to move when another kernel, or another process, goes on.

    msgpack [schema, checksum, tokens, bias, scores, body]     checksum = blake2b-128 of all but itself
    tokens   the window, what the last turn added and a little more, as turn.py keeps them, little-endian uint32; many
             more than a context only while a penalty counts what was generated
    bias     the request's logit_bias: little-endian (uint32 token, float64 nats)
    scores   log-probabilities of the last turn's tokens, if asked for: uint8 n, then for each token float32 its own
             and n times (uint32 token, float32); bytes b"" when there are none
    body     msgpack map of everything else, at most 4 KB; of the sampling what is not as by default

It holds what a kernel needs to go on, and nothing else. The router's view of the text stays with whoever drives the
query (view.py), the counts behind its decisions travel in the certificate (certificate.py), and KV caches stay where
they are: the next kernel reads the window anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from constellation.decoding.sample import Sampling, TokenScore
from constellation.errors import ArtifactError, ConfigError

SCHEMA = 3
BODY_BYTES = 4096
STOP_BYTES = 512  # of stop texts, the longest counted twice as it may be pending: hence every body keeps to its bound
_TYPES = {"request": str, "kernel": str, "position": int, "pending": bytes, "finish": str}
_BIAS = np.dtype([("token", "<u4"), ("nats", "<f8")])
_ANY_TEXT: Any = {"unicode_errors": "surrogatepass"}  # a prompt from a terminal may hold lone surrogates


@dataclasses.dataclass(frozen=True)
class Packet:
    """The state of one request between two turns."""

    request: str  # id
    kernel: str  # who takes the next turn
    tokens: tuple[int, ...]  # the window, whatever the last turn added to it, and a little more (turn.py)
    sampling: Sampling
    position: int = 0  # tokens sampled so far: with sampling.seed the whole state of the sampler
    pending: bytes = b""  # end of the answer's bytes in which a stop text may have begun
    finish: str = ""  # "stop" | "eos" | "length" once the answer is whole
    logprobs: tuple[TokenScore, ...] | None = None  # of the last turn's tokens, float32; None when not asked for

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 0 or max(self.tokens) > 0xFFFFFFFF:
            raise ConfigError(f"packet {self.request!r}: at least one token of 0..2^32-1 is needed")
        stops = [len(stop.encode("utf-8", "surrogatepass")) for stop in self.sampling.stop]
        if sum(stops) + max(stops, default=0) > STOP_BYTES:  # said before anything is generated, not at a hand-off
            raise ConfigError(
                f"packet {self.request!r}: its {len(stops)} stop texts are too long; {STOP_BYTES} bytes are "
                f"allowed, the longest counted twice, these take {sum(stops) + max(stops)}"
            )
        for name, kind in _TYPES.items():
            if type(getattr(self, name)) is not kind:
                raise TypeError(f"{name}={getattr(self, name)!r}")

    @property
    def ended_by_token(self) -> bool:
        """Whether the last token is one of `stop_token_ids` that ended the answer: its text is not the answer's."""
        return self.finish == "stop" and self.tokens[-1] in self.sampling.stop_token_ids

    def _body(self) -> bytes:
        sampling = {name: value for name, value in self.sampling.changed().items() if name != "logit_bias"}
        body: bytes = msgpack.packb({**{n: getattr(self, n) for n in _TYPES}, "sampling": sampling}, **_ANY_TEXT)
        return body

    def encode(self) -> bytes:
        tokens = np.array(self.tokens, "<u4").tobytes()
        bias = np.array(list(self.sampling.logit_bias), _BIAS).tobytes()
        body = self._body()
        if len(body) > BODY_BYTES:
            raise ConfigError(
                f"packet {self.request!r}: {len(body)} bytes besides its window, {BODY_BYTES} are allowed"
            )
        parts = [tokens, bias, pack_scores(self.logprobs), body]
        data: bytes = msgpack.packb([SCHEMA, _checksum(SCHEMA, parts), *parts])
        return data

    @classmethod
    def decode(cls, data: bytes) -> Packet:
        """The packet in `data`; ArtifactError when it is damaged, foreign, of another schema or too large."""
        try:
            schema, checksum, *parts = msgpack.unpackb(data)
            if schema != SCHEMA:
                raise ArtifactError(f"packet: schema {schema!r}, this version reads {SCHEMA}; update the older side")
            tokens, bias, scores, body = parts
            if checksum != _checksum(schema, parts):
                raise ArtifactError("packet: damaged, its checksum differs; send it again")
            if len(body) > BODY_BYTES:
                raise ArtifactError(f"packet: {len(body)} bytes besides its window, {BODY_BYTES} are allowed")
            fields: dict[str, Any] = msgpack.unpackb(body, **_ANY_TEXT)
            fields["tokens"] = tuple(np.frombuffer(tokens, "<u4").tolist())
            fields["sampling"] = Sampling.from_json(
                {**fields["sampling"], "logit_bias": tuple(np.frombuffer(bias, _BIAS).tolist())}
            )
            packet = cls(logprobs=unpack_scores(scores), **fields)
            if packet.encode() != data:  # the sender left something out, or wrote it in a way of its own
                raise ValueError("not as this project writes it")
            return packet
        except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
            raise ArtifactError(f"packet: not one of this project ({type(error).__name__}: {error})") from None


def pack_scores(scores: Sequence[TokenScore] | None) -> bytes:
    """A byte n, then for each token its log-probability and n (token, log-probability); b"" for None."""
    if scores is None:
        return b""
    top = len(scores[0][1]) if scores else 0
    table = np.zeros(len(scores), _scores(top))
    table["own"] = [own for own, _ in scores]
    table["top"] = [list(pairs) for _, pairs in scores]
    return bytes([top]) + table.tobytes()


def unpack_scores(packed: bytes) -> tuple[TokenScore, ...] | None:
    if not packed:
        return None
    table = np.frombuffer(packed[1:], _scores(packed[0]))
    return tuple((own, tuple(pairs)) for own, pairs in zip(table["own"].tolist(), table["top"].tolist(), strict=True))


def _scores(top: int) -> np.dtype[Any]:
    return np.dtype([("own", "<f4"), ("top", [("token", "<u4"), ("log_p", "<f4")], (top,))])


def _checksum(schema: int, parts: Sequence[bytes]) -> bytes:
    digest = hashlib.blake2b(msgpack.packb([schema, *map(len, parts)]), digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()
