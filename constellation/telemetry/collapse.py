"""Detectors of collapse: what a model looks like when it says the same whatever it reads.

    unigram_kl      KL(u || mean p), nats: of the text's own token frequencies u from the model's mean prediction. Near
                    0 for a model that is right on average, also for one that knows frequencies alone; large when it
                    has given up on tokens that occur
    repeat_rate     share of 4-grams in the model's most likely tokens that stood there before in the same sequence,
                    beside `text_repeat_rate`, the same of the text itself
    participation   participation ratio of the hidden states (integration.py, differentiation)

Uniform prediction: unigram_kl = ln V - H(u). One-hot, constant: repeat_rate (n - 4) / (n - 3) of n tokens, unigram_kl
at its bound. Every detector is a number; what counts as collapse is the regime's to say (regime/detector.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

NGRAM = 4
FLOOR = 1e-6  # least probability of a token that occurs


def unigram_kl(targets_N: Tensor, mean_V: Tensor) -> float:
    """KL of the tokens' frequencies from the mean prediction, [0, ln 1e6], nats."""
    u_V = torch.bincount(targets_N.flatten(), minlength=len(mean_V)).float()
    u_V = u_V / u_V.sum()
    return float((torch.xlogy(u_V, u_V) - u_V * mean_V.clamp(min=FLOOR).log()).sum().clamp(min=0))


def repeat_rate(tokens_BT: Tensor) -> float:
    """Share of 4-grams that stood earlier in their sequence, [0, 1); 0 for sequences shorter than 5.

    >>> repeat_rate(torch.arange(64).reshape(1, 64)), round(repeat_rate(torch.zeros(1, 64, dtype=torch.int64)), 3)
    (0.0, 0.984)
    """
    if tokens_BT.shape[1] <= NGRAM:
        return 0.0
    gram_BN = torch.unique(tokens_BT, return_inverse=True)[1].reshape(tokens_BT.shape)
    last_BN = gram_BN
    for _ in range(NGRAM - 1):  # a gram and the token after it: the next longer gram, numbered anew
        last_BN = last_BN[:, 1:]
        pair_BN = gram_BN[:, :-1] * (tokens_BT.numel() + 1) + last_BN
        gram_BN = torch.unique(pair_BN, return_inverse=True)[1].reshape(pair_BN.shape)
    sorted_BN = gram_BN.sort(dim=1).values
    return float((sorted_BN[:, 1:] == sorted_BN[:, :-1]).sum() / gram_BN.numel())
