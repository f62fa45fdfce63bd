"""The kernels of a run: how many, what they are called, which root of E8 is whose. Nothing else knows a number of them.

Kernel k < 8 is a role and has simple root k + 1 (Bourbaki's numbering): HEART 1 ... INTEGRATION 8. Kernels beyond the
eight have the other roots in order of height, the sum of a root's coefficients over the simple ones: first sums of two
simple roots, sums of three, ..., then the negative ones. They are called by their root: root17 is `e8.roots()[17]`.
So names and roots of a run follow from its number of kernels alone, and a run with more kernels keeps those of one
with fewer. Neither numpy nor torch here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from constellation.errors import ConfigError

ROLES = ("heart", "perception", "memory", "action", "prediction", "ethics", "meta", "integration")
OCEAN = "ocean"
FEWEST, MOST = 2, 240  # kernels of a constellation: a router chooses among two at least, E8 has 240 roots
# Names the original design uses for a role. It calls Chronos "temporal" and gives it no place among the eight;
# INTEGRATION, the binding of what happens into one, is this project's reading.
ALIASES = {"mnemosyne": "memory", "apollo": "prediction", "lightning": "perception", "chronos": "integration"}
ROOTS = 240
_SIMPLE = (238, 0, 2, 30, 54, 74, 90, 102)  # indices of the simple roots in the order of `e8.roots()`
_HALF_SUM = (0, 1, 2, 3, 4, 5, 6, 23)  # rho, half the sum of the positive roots: <root, rho> is the root's height


def names(count: int) -> tuple[str, ...]:
    """What `count` kernels are called, in their order; ConfigError unless 2 <= count <= 240."""
    if not FEWEST <= count <= MOST:
        raise ConfigError(f"constellation.kernels={count}: must lie in {FEWEST}..{MOST}, one root of E8 each")
    return _all_names()[:count]


def is_kernel(name: str) -> bool:
    """Whether some constellation has a kernel of this name."""
    return name in _all_names()


def root_index(name: str) -> int:
    """Index into `e8.roots()` of the root that a kernel of this name has; aliases and upper case are understood."""
    plain = ALIASES.get(name.lower(), name.lower())
    if plain in ROLES:
        return _SIMPLE[ROLES.index(plain)]
    if not is_kernel(plain):
        raise ConfigError(
            f"unknown kernel {name!r}: {', '.join(ROLES)}, then root0 .. root239; aliases {', '.join(ALIASES)}"
        )
    return int(plain.removeprefix("root"))


def root(index: int) -> tuple[float, ...]:
    """Root `index` of E8, eight coordinates, norm^2 2, in the order of `e8.roots()`: there the formula."""
    vector = [0.0] * 8
    if index < 112:
        pair, signs = list(itertools.combinations(range(8), 2))[index // 4], ((1, 1), (1, -1), (-1, 1), (-1, -1))
        for place, sign in zip(pair, signs[index % 4], strict=True):
            vector[place] = float(sign)
        return tuple(vector)
    minus = [index - 112 >> i & 1 for i in range(7)]
    return tuple(0.5 - bit for bit in (*minus, sum(minus) % 2))


def root_name(vector: Sequence[float]) -> str:
    """A root of E8 in the standard basis: "e1 - e3", or its eight signs, "+--+++-+ / 2".

    >>> root_name([1, 0, -1, 0, 0, 0, 0, 0])
    'e1 - e3'
    >>> root_name([0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5, -0.5])
    '+--++++- / 2'
    """
    if all(abs(abs(x) - 0.5) < 1e-6 for x in vector):
        return "".join("+" if x > 0 else "-" for x in vector) + " / 2"
    words = [f"{'+' if x > 0 else '-'} e{i}" for i, x in enumerate(vector, 1) if abs(x) > 0.5]
    return " ".join(words).removeprefix("+ ").replace("- e", "-e", 1 if words[0][0] == "-" else 0)


def height(index: int) -> int:
    """Sum of the coefficients of root `index` over the simple roots, 1 .. 29, negative for a negative root."""
    return round(sum(x * r for x, r in zip(root(index), _HALF_SUM, strict=True)))


@functools.cache
def _all_names() -> tuple[str, ...]:
    rest = sorted(set(range(ROOTS)) - set(_SIMPLE), key=lambda index: (height(index) < 0, abs(height(index)), index))
    return (*ROLES, *(f"root{index}" for index in rest))
