"""A sample text of a model in training: what it writes from nothing."""

from __future__ import annotations

from constellation.coordizer.tokenizer import Tokenizer
from constellation.kernel.model import KernelLM
from constellation.train.job import Job


def sample_text(model: KernelLM, job: Job, length: int) -> str | None:
    """Up to `length` bytes sampled from an empty prompt, seeded by the run; None without a tokenizer or at length 0."""
    if not length or job.tokenizer is None:
        return None
    from constellation.decoding.decode import generate
    from constellation.decoding.sample import Sampling

    tokenizer = Tokenizer.load(job.tokenizer)
    room = min(length, model.config.context - 1)
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=job.config.train.seed, max_new_tokens=room)
    tokens = generate(model, [[tokenizer.eos]], [sampling])[0]
    known = [token for token in tokens if token < tokenizer.vocab_size]  # a vocabulary may be larger than its tokens
    return tokenizer.decode(known)[:length].decode("utf-8", "replace")
