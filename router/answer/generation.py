"""GenerationTelemetry: what can be said of an answer from its tokens, for those who ask.

    distinct_1, distinct_2   different tokens, pairs of tokens, of all              [0, 1]
    repetition               4-grams that stood in prompt's end or answer before    [0, 1]
    flow                     mean affinity of a token to the basin of the text before it, cos(d_FR / 2)    [0, 1]
    stride_rad               mean d_FR between a token and the one before it        [0, pi]
    basins                   different basins that the answer's tokens lie in
    nats_per_token           mean -log-probability, where log-probabilities were asked for

The last four are None where there is nothing to compute them from: a run without coordinates, an answer of no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from constellation.decoding.basins import Basins
from constellation.geometry import simplex
from constellation.train.coherence import GRAM, distinct


@dataclass(frozen=True)
class GenerationTelemetry:
    """Of one answer."""

    distinct_1: float
    distinct_2: float
    repetition: float
    flow: float | None
    stride_rad: float | None
    basins: int | None
    nats_per_token: float | None


def generation_telemetry(
    opening: Sequence[int], ids: Sequence[int], basins: Basins | None, log_probs: Sequence[float] = ()
) -> GenerationTelemetry:
    """Of the answer `ids` to what ends with `opening`; `log_probs` of its tokens, where there are some."""
    text = [*opening, *ids]
    grams = list(zip(*(text[i:] for i in range(GRAM)), strict=False))
    first = {gram: at for at, gram in reversed(list(enumerate(grams)))}
    new = list(enumerate(grams))[max(0, len(opening) - GRAM + 1) :]
    again = sum(first[gram] < at for at, gram in new) / len(new) if new else 0.0
    flow = stride = found = None
    places = [at for at in range(max(1, len(opening)), len(text)) if basins and 0 < text[at] < len(basins.p_VN)]
    if basins and places:
        p_VN, affinities, strides = basins.p_VN, [], []
        for at in places:
            before = [t for t in text[max(0, at - basins.recent) : at] if 0 < t < len(p_VN)]
            if before:
                affinities.append((p_VN[before].mean(0).sqrt() * p_VN[text[at]].sqrt()).sum().clamp(max=1))
                strides.append(simplex.distance(p_VN[text[at]], p_VN[before[-1]]))
        if affinities:
            flow, stride = float(torch.stack(affinities).mean()), float(torch.stack(strides).mean())
        found = len(set(basins.basin_V[[text[at] for at in places]].tolist()))
    nats = -sum(log_probs) / len(log_probs) if log_probs else None
    return GenerationTelemetry(distinct(ids, 1), distinct(ids, 2), again, flow, stride, found, nats)
