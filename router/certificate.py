"""A route that can be checked: who decided what on which evidence, to be replayed by whoever has the router.

    msgpack, then base64url: [schema, router hash, mode, K kernels, looks, z, posterior]
    looks       [bytes seen, code, new trigram counts (rice.py), kernel in force] for each look, -1 for OCEAN
    z           float32 basin coordinates at the last look
    posterior   float32 over the kernels at the last look

`replay` adds the counts up, asks the router of that hash and compares. The sums are exact (route.py), so
decisions must agree and z and posterior to a float's last digits. A certificate holds counts, not the text; it
is evidence about the router, not a signature: whoever can fit a router can issue certificates of it.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from constellation.errors import ArtifactError
from router import rice
from router.counts import SPAN
from router.policy import ABSTAINED, Choice, decide, kernel_name
from router.route import Router
from router.stream import Stream
from router.view import View

SCHEMA = 1
DIGITS = 1e-5  # how far z and posterior may be from the replay: other machines round otherwise


@dataclass
class Ledger:
    """Collects what a certificate says, look by look."""

    router: Router
    mode: str
    looks: list[list[Any]] = field(default_factory=list)
    _counts: NDArray[np.int64] | None = None
    _choice: Choice | None = None

    def add(self, view: View) -> None:
        """The look that `view` has just taken."""
        assert isinstance(view.stream, Stream) and view.choice is not None
        counts = view.stream.counts
        new = counts if self._counts is None else counts - self._counts
        self.looks.append([view.stream.bytes_seen, *rice.pack(new), view.current])
        self._counts, self._choice = counts.copy(), view.choice

    def certificate(self) -> str:
        assert self._choice is not None
        z, posterior = (x.astype("<f4").tobytes() for x in (self._choice.z, self._choice.posterior))
        head = [SCHEMA, self.router.hash, self.mode, len(self.router.names)]
        return base64.urlsafe_b64encode(msgpack.packb([*head, self.looks, z, posterior])).decode()


@dataclass(frozen=True)
class Replay:
    """A certificate that holds."""

    router_hash: str
    mode: str
    at_bytes: tuple[int, ...]
    kernels: tuple[str, ...]  # in force from those bytes on

    def __str__(self) -> str:
        return f"{len(self.at_bytes)} looks, {self.at_bytes[-1]} bytes: {' -> '.join(self.kernels)}"


def replay(certificate: str, router: Router) -> Replay:
    """What `certificate` says, computed anew; ArtifactError, with the first difference, if it does not hold."""
    router_hash, mode, kernels, looks, z, posterior = _open(certificate)
    if router_hash != router.hash:
        raise ArtifactError(
            f"certificate: of the router {router_hash[:12]}, this one is {router.hash[:12]}; another run's"
        )
    if kernels != len(router.names) or not looks:
        raise ArtifactError(
            f"certificate: {kernels} kernels and {len(looks)} looks, the router has {len(router.names)}"
        )
    counts, seen, current = np.zeros(router.config.bins, np.int64), 0, ABSTAINED
    for at, code, data, kernel in looks:
        new = max(0, at - SPAN + 1) - max(0, seen - SPAN + 1)
        if at < seen or (at == seen and seen):
            raise ArtifactError(f"certificate: a look at byte {at} after one at byte {seen}")
        try:
            counts += rice.unpack(code, data, new, router.config.bins)
        except ValueError as error:
            raise ArtifactError(f"certificate: the counts at byte {at} are not those of its bytes: {error}") from None
        seen = at
        stream = Stream.resumed(router, counts, bytes(min(SPAN - 1, at)))
        current = int(decide(stream.trajectory(), router.config.hysteresis, current)[0])
        if kernel != current:
            said, found = (name_of(router, k) for k in (kernel, current))
            raise ArtifactError(f"certificate: it says {said} at byte {at}, its counts say {found}")
    choice = stream.choice()
    for name, claimed, computed in (("z", z, choice.z), ("posterior", posterior, choice.posterior)):
        if claimed.shape != computed.shape or not np.abs(claimed - computed).max(initial=0) <= DIGITS:
            raise ArtifactError(f"certificate: its {name} at byte {seen} is not what its counts give")
    return Replay(
        router_hash, mode, tuple(look[0] for look in looks), tuple(name_of(router, look[3]) for look in looks)
    )


def name_of(router: Router, kernel: int) -> str:
    return kernel_name(router.names, kernel) if ABSTAINED <= kernel < len(router.names) else f"kernel {kernel}"


def _open(certificate: str) -> tuple[Any, ...]:
    """The parts after the schema, of the types that `Ledger` writes; ArtifactError otherwise."""
    try:
        parts = msgpack.unpackb(base64.b64decode(certificate.encode(), altchars=b"-_", validate=True))
        schema, router_hash, mode, kernels, looks, z, posterior = parts
        whole = [schema, kernels, *(x for at, code, _, kernel in looks for x in (at, code, kernel))]
        if any(type(x) is not int for x in whole) or any(type(data) is not bytes for _, _, data, _ in looks):
            raise ValueError("not as this project writes it")
        if type(router_hash) is not str or type(mode) is not str:
            raise ValueError("not as this project writes it")
        z, posterior = (np.frombuffer(x, "<f4") for x in (z, posterior))
    except (ValueError, TypeError, binascii.Error, msgpack.UnpackException) as error:
        raise ArtifactError(f"certificate: none of this project ({type(error).__name__}: {error})") from None
    if schema != SCHEMA:
        raise ArtifactError(f"certificate: schema {schema}, this version reads {SCHEMA}")
    return router_hash, mode, kernels, looks, z, posterior
