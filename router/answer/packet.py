"""The hand-off packet: all of a request that has to move when another kernel, or another process, goes on.

    msgpack [schema, checksum, tokens, bias, scores, body]     checksum = blake2b-128 of all but itself
    tokens   the window, what the last turn added and a little more, as turn.py keeps them, little-endian uint32; many
             more than a context only while a penalty counts what was generated
    bias     the request's logit_bias: little-endian (uint32 token, float64 nats)
    scores   log-probabilities of the last turn's tokens, if asked for: uint8 n, then for each token float32 its own
             and n times (uint32 token, float32); bytes b"" when there are none
    body     msgpack map of everything else, at most 4 KB; of the sampling what is not as by default

The router's view of the text (counts, z, posterior) travels along, so that whoever receives the packet
may look on at the text without having it. KV caches do not: the next kernel reads the window anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from constellation.decoding.sample import Sampling, Scored
from constellation.errors import ArtifactError, ConfigError
from router.answer import count_codec
from router.decide.counts import SPAN
from router.decide.fisher_rao import Router
from router.decide.stream import Stream

SCHEMA = 2
BODY_BYTES = 4096
COUNTS_BYTES = 2560  # room of the counts: those of every text up to 32 KB, in 4096 bins
STOP_BYTES = 512  # of stop texts, the longest counted twice as it may be pending: room for up to 100 kernels
_TYPES = {"position": int, "text_bytes": int, "request": str, "kernel": str, "finish": str}  # others are bytes
_BIAS = np.dtype([("token", "<u4"), ("nats", "<f8")])
_ANY_TEXT: Any = {"unicode_errors": "surrogatepass"}  # a prompt from a terminal may hold lone surrogates
_NAMES = ("request", "kernel", "position", "pending", "finish", "text_bytes", "counts", "tail", "z", "posterior")


@dataclasses.dataclass(frozen=True, eq=False)
class Unpacked:
    """Counts that are packed when they travel: a packet that stays in its process goes without."""

    counts_B: NDArray[np.int64]

    def __bytes__(self) -> bytes:
        return pack_counts(self.counts_B)


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
    text_bytes: int = 0  # n, bytes of prompt and answer the router has seen
    counts: bytes | Unpacked = b""  # h of these bytes, Rice-coded (`pack_counts`); empty when they do not fit
    tail: bytes = b""  # last two of these bytes, with which the next trigram begins
    z: bytes = b""  # basin coordinates, float32
    posterior: bytes = b""  # of the kernels, float32
    logprobs: tuple[Scored, ...] | None = None  # of the last turn's tokens, float32; None when not asked for

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 0 or max(self.tokens) > 0xFFFFFFFF:
            raise ConfigError(f"packet {self.request!r}: at least one token of 0..2^32-1 is needed")
        stops = [len(stop.encode("utf-8", "surrogatepass")) for stop in self.sampling.stop]
        if sum(stops) + max(stops, default=0) > STOP_BYTES:  # said before anything is generated, not at a hand-off
            raise ConfigError(
                f"packet {self.request!r}: its {len(stops)} stop texts are too long; {STOP_BYTES} bytes are "
                f"allowed, the longest counted twice, these take {sum(stops) + max(stops)}"
            )
        for name in _NAMES:
            if type(getattr(self, name)) is not _TYPES.get(name, bytes) and type(getattr(self, name)) is not Unpacked:
                raise TypeError(f"{name}={getattr(self, name)!r}")

    @property
    def ended_by_token(self) -> bool:
        """Whether the last token is one of `stop_token_ids` that ended the answer: its text is not the answer's."""
        return self.finish == "stop" and self.tokens[-1] in self.sampling.stop_token_ids

    def stream(self, router: Router) -> Stream:
        """The router's view of the text, ready to read on."""
        packed = bytes(self.counts)
        if not packed and self.text_bytes > len(self.tail):
            raise ConfigError(f"packet {self.request!r} holds no counts of its {self.text_bytes} bytes: read them anew")
        counts = unpack_counts(packed, self.text_bytes, router.config.bins)
        return Stream.resumed(router, counts, self.tail)

    def check(self, kernels: Sequence[str] = ()) -> None:
        """ConfigError unless the body keeps to its bound until the longest answer ends, whichever kernel writes it.

        What grows meanwhile: numbers, the counts of a text that a router sees, and what may be a stop text's beginning.
        """
        longest = max((len(stop.encode("utf-8", "surrogatepass")) for stop in self.sampling.stop), default=1)
        grown = dataclasses.replace(
            self, kernel=max((*kernels, self.kernel), key=lambda name: len(name.encode())), finish="length",
            position=self.sampling.max_new_tokens, text_bytes=0xFFFFFFFF, pending=bytes(longest - 1),
            counts=bytes(1 + COUNTS_BYTES) if self.z else b"", tail=bytes(2),
        )  # fmt: skip
        if (size := len(grown._body())) > BODY_BYTES:
            raise ConfigError(
                f"packet {self.request!r}: it may grow to {size} bytes besides its window, {BODY_BYTES} are allowed: "
                "send fewer stop_token_ids, or shorter or fewer stop texts"
            )

    def _body(self) -> bytes:
        sampling = {name: value for name, value in self.sampling.changed().items() if name != "logit_bias"}
        told = {**{n: getattr(self, n) for n in _NAMES}, "counts": bytes(self.counts), "sampling": sampling}
        body: bytes = msgpack.packb(told, **_ANY_TEXT)
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


def pack_counts(counts_B: NDArray[np.int64]) -> bytes:
    """h in few bytes: the code, then its data (count_codec.py); empty when that may take more than COUNTS_BYTES."""
    if count_codec.bound_bytes(int(counts_B.sum()), len(counts_B)) > COUNTS_BYTES:
        return b""
    code, data = count_codec.pack(counts_B)
    return bytes([code]) + data


def unpack_counts(packed: bytes, text_bytes: int, bins: int) -> NDArray[np.int64]:
    """h of `text_bytes` bytes, (bins,); ArtifactError when `packed` is not that."""
    if not packed:
        return np.zeros(bins, np.int64)
    try:
        return count_codec.unpack(packed[0], packed[1:], max(0, text_bytes - SPAN + 1), bins)
    except ValueError as error:
        raise ArtifactError(f"packet: its counts are not those of {text_bytes} bytes in {bins} bins: {error}") from None


def pack_scores(scores: Sequence[Scored] | None) -> bytes:
    """A byte n, then for each token its log-probability and n (token, log-probability); b"" for None."""
    if scores is None:
        return b""
    top = len(scores[0][1]) if scores else 0
    table = np.zeros(len(scores), _scores(top))
    table["own"] = [own for own, _ in scores]
    table["top"] = [list(pairs) for _, pairs in scores]
    return bytes([top]) + table.tobytes()


def unpack_scores(packed: bytes) -> tuple[Scored, ...] | None:
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
