"""What training costs, before it is done. Neither torch nor Ray here."""

from __future__ import annotations

from constellation.config import Config, Kernel


def flops_per_token(kernel: Kernel) -> float:
    """Floating-point operations of a forward and backward pass, per token; the optimizer's own are not counted.

    6 (L (2 (1 + g) D^2 + 3 D H) + D V) for the products with weights, 6 L D T for attention, in which a position sees
    T / 2 others on average (Kaplan et al. 2020, with causal attention counted once). L counts every pass through a
    layer, so a loop costs what it computes; g is the share of heads that have keys and values of their own.
    """
    k, passes = kernel, len(kernel.order)
    projections = 2 * k.width**2 + 2 * k.width**2 * k.groups // k.heads
    weights = passes * (projections + 3 * k.width * k.hidden) + k.width * k.vocab_size
    return 6.0 * weights + 6.0 * passes * k.width * k.context


def steps_of(config: Config, tokens: float) -> int:
    """Steps of OCEAN that read `tokens` tokens, at least 1."""
    return max(1, round(tokens / tokens_per_step(config)))


def tokens_per_step(config: Config) -> int:
    """Tokens in a step of OCEAN."""
    return config.train.batch * config.kernel.context
