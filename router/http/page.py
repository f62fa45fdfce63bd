"""The page at `/`: a prompt, the answer in the colours of the kernels that wrote it, its place among E8's roots.

The files lie in page_files/ as they are served. One is made here, page/map.json: the 240 roots seen along the Coxeter
plane, in which E8 shows its thirtyfold symmetry (Coxeter 1973, section 12.6): eight rings of 30 points.

    C = product of the eight simple reflections      order 30, one plane in which it turns by 2 pi / 30
    P (2, 8)                                         orthonormal basis of that plane
    root r -> P r;   text -> sqrt(2) P R u           u on S^7 (fisher_rao.py), R the rotation of centres to their roots

A root has norm sqrt(2), so a text exactly in the direction of a root lies on it; R is the Procrustes rotation by which
`e8.match_roots` gave the addresses, found again from charts and roots. A plane shows two of eight dimensions: what is
near is near in it, what is near in it need not be near. Every image of P under the Weyl group shows the same picture
with the roots in other places; the one taken keeps the simple roots, where the roles live, apart.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation.geometry import e8
from constellation.roster import OCEAN
from router.decide.fisher_rao import CHART, FisherRaoRouter
from router.decide.policy import Policy

# Nothing from elsewhere, nothing inline, in nobody's frame: text of a model cannot become anything but text.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_TURNED = (180, 25, 92)  # roots in whose mirrors the picture is turned: no two simple roots nearer than 0.47
_DIGITS = 5


@dataclass(frozen=True)
class File:
    """What is answered to a GET, with `HEADERS`."""

    body: bytes
    media_type: str


def files(policy: Policy | None, modes: Sequence[str]) -> dict[str, File]:
    """Path -> file, all that the page needs besides the API; `modes`: what a request may ask for, the default first."""
    found = {}
    for entry in sorted(resources.files("router.http").joinpath("page_files").iterdir(), key=lambda entry: entry.name):
        name, kind = entry.name, _KINDS.get(entry.name.rpartition(".")[2])
        if kind:
            found["/" if name == "index.html" else f"/page/{name}"] = File(entry.read_bytes(), f"{kind}; charset=utf-8")
    data = json.dumps(e8_map(policy, modes), separators=(",", ":"), allow_nan=False)
    return {**found, "/page/map.json": File(data.encode(), "application/json")}


def e8_map(policy: Policy | None, modes: Sequence[str]) -> dict[str, Any]:
    """What the page draws: roots and edges, kernels with their places, and the matrix that places a text.

    `roots` [x, y] in the order of `e8.roots()`; `edges` i, j, i, j, ... of roots at 60 degrees; `kernels` name, root
    (index, or null without an address) and centre [x, y]; a text's place is view @ u, u = z[:8] * scale, normalised.
    """
    plane = coxeter_plane()
    edges = [(i, j) for i, row in enumerate(e8.neighbours().tolist()) for j in row if i < j]
    drawn = {
        "modes": list(modes),
        "generalist": OCEAN,
        "kernels": [{"name": name, "root": None, "centre": None} for name in (policy.names if policy else ())],
        "roots": _plain(e8.roots() @ plane.T),
        "edges": [i for edge in edges for i in edge],
        "view": None,
        "scale": None,
    }
    if isinstance(policy, FisherRaoRouter):
        spread = policy.spread[:CHART]
        view = placing(policy)
        root = np.argmax(policy.roots @ e8.roots().T, axis=1).tolist()
        centre = _plain(policy.charts @ view.T)
        drawn["kernels"] = [{"name": name, "root": root[k], "centre": centre[k]} for k, name in enumerate(policy.names)]
        drawn["view"] = _plain(view)
        drawn["scale"] = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0).tolist()
    return drawn


@functools.cache
def coxeter_plane() -> NDArray[np.float64]:
    """P, (2, 8), orthonormal; simple root 1 is on the y axis before the mirrors. The roots lie in 8 rings of 30."""
    simple = e8.simple_roots()
    values, vectors = np.linalg.eig(np.linalg.multi_dot([_mirror(root) for root in simple]))
    turning = vectors[:, np.argmin(np.abs(values - np.exp(2j * np.pi / 30)))]
    turning = turning * 1j * np.exp(-1j * np.angle(simple[0] @ turning))  # an eigenvector is known up to a phase
    plane = np.sqrt(2) * np.stack([turning.real, turning.imag])
    return np.linalg.multi_dot([plane, *(_mirror(e8.roots()[i]) for i in reversed(_TURNED))])


def placing(router: FisherRaoRouter) -> NDArray[np.float64]:
    """sqrt(2) P R, (2, 8): takes u to the map. R maximises sum_k <R c_k, r_k> over orthogonal matrices."""
    left, _, right = np.linalg.svd(router.roots.T @ router.charts)
    return np.sqrt(2) * coxeter_plane() @ left @ right


def _mirror(root: NDArray[np.float64]) -> NDArray[np.float64]:
    """The reflection that turns `root` round, (8, 8)."""
    return np.eye(CHART) - np.outer(root, root)


def _plain(table: NDArray[np.float64]) -> list[list[float]]:
    return [[round(x, _DIGITS) + 0.0 for x in row] for row in table.tolist()]
