"""What a small kernel that was trained on the tokens so far says of pairs.

Every round trains anew, from the same seed, so that the answer is a function of the tokens alone. The kernel has two
blocks of width 64, sees 64 tokens and takes STEPS steps of AdamW on 16 rows each.

    attention   mean over heads, blocks and places of how much b attends to the a right before it; 0 where none stands
    gain        of joining a and b: nats that the kernel of today's tokens needs for both on held-out text, less those
                that a kernel needs for the joined token, trained as long on the tokens with the candidates joined.
                Means over held-out places, with SHRINK places of gain 0 added. Candidates are the most frequent pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from constellation.config import Kernel
from constellation.coordizer.merging import Merger, Pairs
from constellation.coordizer.sample import Sample, tokenised
from constellation.kernel.loss import linear_cross_entropy
from constellation.kernel.model import KernelLM

STEPS, BATCH, CONTEXT, RATE = 120, 16, 64, 4e-3
SHRINK = 8.0


def attention_weights(merger: Merger, pairs: Pairs, sample: Sample) -> NDArray[np.float64]:
    """Mean attention of the second token of each pair to the first, (P,), in [0, 1]."""
    model = trained(tokenised(sample.train, merger), merger.num_tokens)
    rows = _rows(tokenised(sample.held, merger))
    looks = _attention_to_previous(model, rows)
    keys = rows[:, :-1].astype(np.uint64) << np.uint64(32) | rows[:, 1:].astype(np.uint64)
    place = np.searchsorted(pairs.keys_P, keys).clip(max=len(pairs.count_P) - 1)
    known = pairs.keys_P[place] == keys
    size = len(pairs.count_P)
    sums = np.bincount(place[known], looks[known], minlength=size)
    return sums / np.maximum(np.bincount(place[known], minlength=size), 1)


def gain_weights(merger: Merger, pairs: Pairs, sample: Sample, most: int) -> NDArray[np.float64]:
    """ln(1 + e^gain) of the `most` most frequent pairs, 0 of all others, (P,)."""
    chosen = np.lexsort((pairs.keys_P, -pairs.count_P))[:most]
    joined = copy.copy(merger)
    joined.merges, joined.spelling = list(merger.merges), list(merger.spelling)
    for at in chosen.tolist():
        joined.join(int(pairs.left_P[at]), int(pairs.right_P[at]))
    apart, together = (
        _held_nats(trained(tokenised(sample.train, m), m.num_tokens), tokenised(sample.held, m), m.spelling)
        for m in (merger, joined)
    )
    number = {spelling: i for i, spelling in enumerate(joined.spelling)}
    out = np.zeros(len(pairs.count_P))
    new = np.array([
        number[merger.spelling[a] + merger.spelling[b]]
        for a, b in zip(pairs.left_P[chosen].tolist(), pairs.right_P[chosen].tolist())
    ])  # fmt: skip
    gain_N = apart.between(together.start_N, together.end_N) - together.nats_N
    places = np.bincount(together.token_N, minlength=joined.num_tokens)
    mean = np.bincount(together.token_N, gain_N, minlength=joined.num_tokens) / (places + SHRINK)
    out[chosen] = np.logaddexp(0, mean[new])
    return out


def trained(documents: Sequence[NDArray[np.int64]], vocabulary: int) -> KernelLM:
    """The small kernel after its steps on `documents`."""
    config = Kernel(vocab_size=max(272, vocabulary), width=64, layers=2, heads=2, hidden=168, context=CONTEXT)
    model, rows = KernelLM(config, seed=0), _rows(documents)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    generator = np.random.default_rng(0)
    with torch.enable_grad():
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 10, (STEPS - step) / (STEPS / 2))
            x = torch.from_numpy(rows[generator.integers(len(rows), size=BATCH)])
            loss = linear_cross_entropy(model.hidden(x[:, :-1]), model.unembedding, x[:, 1:], 2048)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model


class _Nats:
    """Nats of the tokens of a text, and where their bytes lie in it."""

    def __init__(self, nats_N: NDArray[np.float64], token_N: NDArray[np.int64], size_N: NDArray[np.int64]):
        self.nats_N, self.token_N, self.end_N = nats_N, token_N, np.cumsum(size_N)
        self.start_N = self.end_N - size_N
        self._at = np.append(0, self.end_N)
        self._sum = np.append(0.0, np.cumsum(nats_N))

    def between(self, start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.float64]:
        """Nats of the bytes start .. end; those of a token that lies across an edge by the part of it inside."""
        found: NDArray[np.float64] = np.interp(end, self._at, self._sum) - np.interp(start, self._at, self._sum)
        return found


@torch.inference_mode()
def _held_nats(model: KernelLM, documents: Sequence[NDArray[np.int64]], spelling: Sequence[bytes]) -> _Nats:
    rows = torch.from_numpy(_rows(documents))
    parts = []
    for x in rows.split(64):
        logits = model(x[:, :-1]).float()
        parts.append(F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none").view(len(x), -1))
    stream = np.concatenate(documents)
    nats = torch.cat(parts).double().numpy()
    nats = np.concatenate([nats[:, :1], nats], axis=1).ravel()[: len(stream)]  # a row's first token has no other's nats
    size_V = np.array([len(text) for text in spelling], np.int64)
    return _Nats(nats, stream, size_V[stream])


@torch.inference_mode()
def _attention_to_previous(model: KernelLM, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean over blocks and heads of row t's weight on t - 1, (R, T - 1)."""
    found = []
    for part in torch.from_numpy(rows).split(64):
        x, own = model.embed(part), model.rows(part.shape[1])
        total = torch.zeros(len(part), part.shape[1] - 1)
        for at in model.config.order:
            block = model.blocks[at]
            q, k, _ = block.attention.project(block.norm_attention(x), own)  # type: ignore[operator,union-attr]
            logits = q @ k.mT
            weights = torch.softmax(logits + _causal(logits.shape[-1]), -1)
            total += weights.diagonal(-1, -2, -1).mean(1)
            x = block(x, own)
        found.append(total / len(model.config.order))
    return torch.cat(found).double().numpy()


def _causal(length: int) -> torch.Tensor:
    return torch.full((length, length), float("-inf")).triu(1)


def _rows(documents: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """All tokens in rows of CONTEXT, the last one filled up with the text's beginning."""
    stream = np.concatenate(documents) if documents else np.zeros(1, np.int64)
    return np.resize(stream, (-(-len(stream) // CONTEXT), CONTEXT))
