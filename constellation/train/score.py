"""Causal scoring of documents: nats of every token, from windows that overlap.

A document of n tokens (EOS included) is read as EOS, t_1 .. t_n: every token is a target once. The
first window predicts the first T tokens; each later one moves on by `stride` and predicts its last
`stride` tokens, so that every target sees at least T - stride earlier tokens. Bits per byte is total
bits over total UTF-8 bytes, EOS's bits included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from constellation.data.cache import TokenCache
from constellation.kernel.model import KernelLM


def windows(lengths: np.ndarray, context: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, first target, first scored target) of each window over documents of `lengths` targets."""
    later = np.maximum(0, -(-(lengths - context) // stride))
    count = later + 1
    document = np.repeat(np.arange(len(lengths)), count)
    ordinal = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    first = ordinal * stride
    scored = np.where(ordinal == 0, 0, first + context - stride)
    return document, first, scored


@torch.inference_mode()
def score(
    model: KernelLM,
    cache: TokenCache,
    documents: Sequence[int] | NDArray[np.integer] | None = None,
    *,
    stride: int | None = None,
    batch: int = 32,
    chunk: int = 8192,
    prefix: np.ndarray | None = None,
    precision: str = "fp32",
) -> list[np.ndarray]:
    """Nats of each token of each document: one float32 array per document, EOS last.

    `prefix` gives each document a token that stands first in all its windows (one slot of context).
    """
    config = model.config
    chosen = np.arange(len(cache.offsets) - 1) if documents is None else np.asarray(documents, np.int64)
    starts, ends = cache.offsets[chosen], cache.offsets[chosen + 1]
    lengths = ends - starts
    reach = config.context - (prefix is not None)
    document, first, scored = windows(lengths, reach, stride or max(1, reach // 2))
    out = np.zeros(int(lengths.sum()), np.float32)
    base = np.concatenate([[0], np.cumsum(lengths)])
    device = next(model.parameters()).device
    end = int(cache.tokens[cache.offsets[1] - 1])  # every document's last token
    order = np.argsort(np.minimum(lengths[document] - first, reach), kind="stable")
    for rows in np.split(order, np.arange(batch, len(order), batch)):
        doc, begin = document[rows, None], first[rows, None]
        size = int(np.minimum(lengths[document[rows]] - first[rows], reach).max())
        target = begin + np.arange(size)  # index of the target within its document
        real = (target >= scored[rows, None]) & (target < lengths[doc])
        at = starts[doc] + np.minimum(target, lengths[doc] - 1)
        y = cache.tokens[at].astype(np.int64)
        before = cache.tokens[np.maximum(at - 1, 0)].astype(np.int64)
        x = np.where(target == 0, end, before)
        if prefix is not None:
            x = np.concatenate([prefix[doc].astype(np.int64), x], axis=1)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            hidden = model.hidden(torch.from_numpy(x).to(device))[:, x.shape[1] - size :]
            real_N = torch.from_numpy(np.flatnonzero(real)).to(device)  # others were scored before, or are padding
            nats = _token_nats(model, hidden.flatten(0, 1)[real_N], torch.from_numpy(y[real]).to(device), chunk)
        out[(base[doc] + target)[real]] = nats.cpu().numpy()
    return np.split(out, base[1:-1])


def _token_nats(model: KernelLM, hidden_ND: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
    parts = []
    for hidden, targets in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True):
        logits = model.logits(hidden).float()
        parts.append(logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0])
    return torch.cat(parts)


def document_bits(nats: Sequence[np.ndarray]) -> NDArray[np.float64]:
    """Bits of each document, (D,), from the nats of its tokens."""
    return np.array([float(n.sum(dtype=np.float64)) for n in nats]) / math.log(2)


def bits_per_byte(nats: Sequence[np.ndarray], byte_length: np.ndarray) -> float:
    """Total bits over total bytes."""
    return float(sum(float(n.sum(dtype=np.float64)) for n in nats) / math.log(2) / float(np.sum(byte_length)))


def evaluate(model: KernelLM, dev: TokenCache, max_bytes: int, precision: str) -> float:
    """Bits per byte on the first documents of `dev` that together reach `max_bytes`."""
    count = int(np.searchsorted(np.cumsum(dev.byte_length), max_bytes)) + 1
    documents = np.arange(min(count, len(dev.byte_length)))
    nats = score(model, dev, documents, stride=model.config.context, precision=precision)
    return bits_per_byte(nats, dev.byte_length[documents])
