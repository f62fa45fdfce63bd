"""A route that can be checked: who decided what on which evidence, to be replayed by whoever has the router.

    msgpack, then base64url: [schema, router hash, mode, K kernels, looks, z, posterior, top_k, text, tokens]
    looks       [bytes seen, code, new trigram counts (count_codec.py), kernel in force] for each look, -1 for OCEAN
    z           float32 basin coordinates at the last look
    posterior   float32 over the kernels at the last look
    top_k       kernels that answer together, in the modes that mix
    text        blake2b-128 of the answer's text in UTF-8
    tokens      blake2b-128 of its token ids, little-endian uint32

`replay` adds the counts up, asks the router of that hash and compares. The sums are exact (fisher_rao.py), so decisions
must agree and z and posterior to a float's last digits. `verify.py` holds an answer against it: its bytes must have
these counts, its kernels be those decided, its text and tokens have these digests. Schema 1 ends with the posterior.

A certificate reveals its text. Trigram counts of 64 bytes at a time leave few texts to choose from: one of 64 bytes was
rebuilt in four seconds. Show it to whoever may read prompt and answer, to nobody else.
It is evidence about the router, not a signature: whoever can fit a router can issue certificates of it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from constellation.errors import ArtifactError
from router.answer import count_codec
from router.answer.view import View
from router.decide.counts import SPAN
from router.decide.fisher_rao import FisherRaoRouter
from router.decide.mixture import Weights, judged, weights
from router.decide.modes import MIXED, PHI
from router.decide.policy import ABSTAINED, RouteChoice, decide, kernel_name
from router.decide.stream import RouterStream

SCHEMA = 2
DIGITS = 1e-5  # how far z and posterior may be from the replay: other machines round otherwise


@dataclass
class CertificateWriter:
    """Collects what a certificate says, look by look."""

    router: FisherRaoRouter
    mode: str
    top_k: int = 1
    looks: list[list[Any]] = field(default_factory=list)
    _counts: NDArray[np.int64] | None = None
    _choice: RouteChoice | None = None

    def add(self, view: View) -> None:
        """The look that `view` has just taken."""
        assert isinstance(view.stream, RouterStream) and view.choice is not None
        counts = view.stream.counts
        new = counts if self._counts is None else counts - self._counts
        self.looks.append([view.stream.bytes_seen, *count_codec.pack(new), view.current])
        self._counts, self._choice = counts.copy(), view.choice

    def certificate(self, text: str = "", token_ids: Sequence[int] = ()) -> str:
        """Of the looks so far, bound to the answer of that text and those tokens."""
        assert self._choice is not None
        z, posterior = (x.astype("<f4").tobytes() for x in (self._choice.z, self._choice.posterior))
        head = [SCHEMA, self.router.hash, self.mode, len(self.router.names)]
        tail = [self.looks, z, posterior, self.top_k, digest_of(text), digest_of(token_ids)]
        return base64.urlsafe_b64encode(msgpack.packb([*head, *tail])).decode()


def digest_of(what: str | Sequence[int]) -> bytes:
    """blake2b-128 of a text, or of token ids."""
    data = what.encode("utf-8", "surrogatepass") if isinstance(what, str) else np.array(what, "<u4").tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class Decided:
    """A look, replayed."""

    at_bytes: int
    kernel: str  # in force from here on
    choice: RouteChoice
    new: NDArray[np.int64]  # trigrams since the look before, (B,)
    panel: Weights | None  # who writes from here on; None when the certificate does not say how many do


@dataclass(frozen=True, eq=False)
class Replay:
    """A certificate that holds."""

    router_hash: str
    mode: str
    looks: tuple[Decided, ...]
    text: bytes | None  # digests of the answer; None in schema 1
    tokens: bytes | None

    @property
    def at_bytes(self) -> tuple[int, ...]:
        return tuple(look.at_bytes for look in self.looks)

    @property
    def kernels(self) -> tuple[str, ...]:
        """In force from those bytes on."""
        return tuple(look.kernel for look in self.looks)

    def __str__(self) -> str:
        return f"{len(self.looks)} looks, {self.at_bytes[-1]} bytes: {' -> '.join(self.kernels)}"

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("router_hash", "mode", "at_bytes", "kernels")}


def replay(certificate: str, router: FisherRaoRouter) -> Replay:
    """What `certificate` says, computed anew; ArtifactError, with the first difference, if it does not hold."""
    router_hash, mode, kernels, looks, z, posterior, top_k, text, tokens = _open(certificate)
    if router_hash != router.hash:
        raise ArtifactError(
            f"certificate: of the router {router_hash[:12]}, this one is {router.hash[:12]}; another run's"
        )
    if kernels != len(router.names) or not looks:
        raise ArtifactError(
            f"certificate: {kernels} kernels and {len(looks)} looks, the router has {len(router.names)}"
        )
    counts, seen, current, decided = np.zeros(router.config.bins, np.int64), 0, ABSTAINED, []
    for at, code, data, kernel in looks:
        if at < seen or (at == seen and seen):
            raise ArtifactError(f"certificate: a look at byte {at} after one at byte {seen}")
        try:
            new = count_codec.unpack(code, data, max(0, at - SPAN + 1) - max(0, seen - SPAN + 1), router.config.bins)
        except ValueError as error:
            raise ArtifactError(f"certificate: the counts at byte {at} are not those of its bytes: {error}") from None
        counts, seen = counts + new, at
        stream = RouterStream.resumed(router, counts, bytes(min(SPAN - 1, at)))
        current = int(decide(stream.trajectory(), router.config.hysteresis, current)[0])
        if kernel != current:
            said, found = (name_of(router, k) for k in (kernel, current))
            raise ArtifactError(f"certificate: it says {said} at byte {at}, its counts say {found}")
        choice, name = stream.choice(), name_of(router, current)
        panel: Weights | None = ((name, 1.0),)
        if mode in MIXED and not choice.abstained:
            if top_k is not None and mode == PHI and router.integration is None:
                raise ArtifactError("certificate: of mode phi, and this run has no router/integration.json any more")
            own = judged(mode, choice.posterior, router.integration) if top_k is not None else choice.posterior
            panel = weights(router.names, own, top_k) if top_k is not None else None
        decided.append(Decided(at, name, choice, new, panel))
    for which, claimed, computed in (("z", z, choice.z), ("posterior", posterior, choice.posterior)):
        if claimed.shape != computed.shape or not np.abs(claimed - computed).max(initial=0) <= DIGITS:
            raise ArtifactError(f"certificate: its {which} at byte {seen} is not what its counts give")
    return Replay(router_hash, mode, tuple(decided), text, tokens)


def name_of(router: FisherRaoRouter, kernel: int) -> str:
    return kernel_name(router.names, kernel) if ABSTAINED <= kernel < len(router.names) else f"kernel {kernel}"


def _open(certificate: str) -> tuple[Any, ...]:
    """The parts after the schema, of the types that are written, None for what schema 1 has not; ArtifactError."""
    foreign = ValueError("not as this project writes it")
    try:
        schema, *parts = msgpack.unpackb(base64.b64decode(certificate.encode(), altchars=b"-_", validate=True))
        if type(schema) is not int:
            raise foreign
        if schema not in (1, SCHEMA):
            raise ArtifactError(f"certificate: schema {schema}, this version reads {SCHEMA}")
        router_hash, mode, kernels, looks, z, posterior, top_k, text, tokens = (
            parts if schema == SCHEMA else [*parts, None, None, None]
        )
        whole = [kernels, *(x for at, code, _, kernel in looks for x in (at, code, kernel))]
        data = [data for _, _, data, _ in looks]
        if schema == SCHEMA:
            whole, data = [*whole, top_k], [*data, text, tokens]
        if any(type(x) is not int for x in whole) or any(type(x) is not bytes for x in data):
            raise foreign
        if type(router_hash) is not str or type(mode) is not str or (schema == SCHEMA and top_k < 1):
            raise foreign
        z, posterior = (np.frombuffer(x, "<f4") for x in (z, posterior))
    except (ValueError, TypeError, binascii.Error, msgpack.UnpackException) as error:
        raise ArtifactError(f"certificate: none of this project ({type(error).__name__}: {error})") from None
    return router_hash, mode, kernels, looks, z, posterior, top_k, text, tokens
