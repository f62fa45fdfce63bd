"""Decoding without a service: all requests at once, or one of them the slow and certain way.

`generate` is the continuous batch (batch.py) driven by its caller. `decode_naive`, a whole forward pass for every
token, is its oracle, and with it the oracle of all that decodes here.

Everything is fp32 unless int8 is asked for: a bf16 product is slower than an fp32 one on most CPUs, and kernels that
stand in for one another must agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from constellation.decoding.basins import Basins
from constellation.decoding.batch import Batch, Writing
from constellation.decoding.sample import RowSettings, Sampling, sample
from constellation.kernel.model import KernelLM


def generate(
    model: KernelLM, windows: Sequence[Sequence[int]], samplings: Sequence[Sampling], precision: str = "fp32"
) -> list[list[int]]:
    """`max_new_tokens` tokens after each window, whatever they are: no end of text, no stop."""
    longest = max(s.max_new_tokens for s in samplings)
    room = min(longest, max(1, model.config.context // 2))
    works = [_writing(w, s, room) for w, s in zip(windows, samplings, strict=True)]
    batch = Batch(model, slots=len(works), precision=precision)
    for work in works:
        batch.add(work)
    while not batch.idle:
        batch.step()
    for work in works:
        work.done.result()  # raises what went wrong
    return [work.tokens[len(w) :] for work, w in zip(works, windows, strict=True)]


def _writing(window: Sequence[int], sampling: Sampling, room: int) -> Writing:
    until = len(window) + sampling.max_new_tokens
    work = Writing(tokens=list(window), sampling=sampling, room=room, take=lambda token: len(work.tokens) == until)
    return work


@torch.inference_mode()
def decode_naive(
    model: KernelLM, window: Sequence[int], sampling: Sampling, taken: int = 0, basins: Basins | None = None
) -> list[int]:
    """`max_new_tokens` tokens after `window`, each from a whole forward pass over the last `context`: the oracle.

    The last `taken` tokens of `window` were generated before.
    """
    tokens, settings = list(window), RowSettings([sampling], model.embedding.weight.device)
    for position in range(taken, taken + sampling.max_new_tokens):
        read = tokens[-model.config.context :]
        logits = model(torch.tensor([read], device=model.embedding.weight.device))[:, -1]
        generated = tokens[len(tokens) - position :]
        terms = basins.terms(tokens, sampling, logits.shape[1])[None] if basins else None
        seen, counts = _counts(read, logits) > 0, _counts(generated, logits)
        tokens.append(int(sample(logits, settings, [position], seen, counts, terms)))
    return tokens[len(window) :]


def _counts(tokens: Sequence[int], logits_1V: Tensor) -> Tensor:
    """How often each token is among `tokens`, (1, V)."""
    counts = torch.bincount(torch.tensor(list(tokens), dtype=torch.int64), minlength=logits_1V.shape[1])
    return counts[None].float().to(logits_1V.device)
