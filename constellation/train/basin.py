"""The basin head's objective: which bytes the next window holds, as a point of the simplex of 64 bins.

    p_t    the distribution of the bytes of the tokens t+1 .. t+W over bins of four neighbouring bytes, byte // 4;
           W = 32, fewer where the sequence ends before. Text decides it, no model and no fit
    b_t    softmax(B h_t), the head's: a point of the 63-simplex
    loss   mean over t of KL(p_t || b_t), nats, at least 0; 0 for the head that knows the next window's bytes.
           Windows without a byte, of ends of text alone, are left out; where there is no other, 0

What is reported of held-out text beside the same numbers of the mean basin, which knows no context:

    basin_nats, basin_mean_nats    the loss of b_t, and of the mean p in its place
    basin_accuracy                 how often b_t is nearer (Fisher-Rao) to its own p_t than to that of another window
                                   of the text, equal distances count half; 0.5 for whatever knows no context
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.batches import Batches
from constellation.data.cache import open_cache
from constellation.kernel.model import BASIN_BINS, KernelLM
from constellation.telemetry.training import Training
from constellation.train.objective import Forward

WINDOW = 32  # W, tokens
HELD_OUT = 16  # sequences that the probe reads


def byte_bins(tokenizer: Path) -> Tensor:
    """How many bytes of each bin a token has, (V, 64)."""
    rows = [torch.bincount(torch.tensor(list(b), dtype=torch.int64) // 4, minlength=BASIN_BINS)
            for b in Tokenizer.load(tokenizer).token_bytes]  # fmt: skip
    return torch.stack(rows).float()


def next_basins(targets_BT: Tensor, bins_VS: Tensor) -> tuple[Tensor, Tensor]:
    """p_t (B, T, 64), zeros for a window without a byte, and whether there is one (B, T); `targets` begin at t+1."""
    sums = torch.nn.functional.pad(bins_VS[targets_BT].cumsum(1), (0, 0, 1, 0))
    length = targets_BT.shape[1]
    at = torch.arange(length, device=targets_BT.device)
    counts = sums[:, (at + WINDOW).clamp(max=length)] - sums[:, at]
    total = counts.sum(-1, keepdim=True)
    return counts / total.clamp(min=1), total[..., 0] > 0


def divergence(p_NS: Tensor, log_b_NS: Tensor) -> Tensor:
    """Mean KL(p || b), nats."""
    return (torch.xlogy(p_NS, p_NS) - p_NS * log_b_NS).sum() / max(1, len(p_NS))


@dataclasses.dataclass(frozen=True)
class NextBasin:
    """The term of the objective."""

    bins_VS: Tensor

    def __call__(self, forward: Forward) -> Tensor:
        p_BTS, real_BT = next_basins(forward.targets_BT, self.bins_VS.to(forward.targets_BT.device))
        logits = forward.model.basin_head(forward.hidden_BTD[real_BT]).float()
        return divergence(p_BTS[real_BT], torch.log_softmax(logits, -1))


@dataclasses.dataclass
class BasinProbe:
    """Reads the first `HELD_OUT` windows of the held-out text."""

    bins_VS: Tensor
    dev: Path  # token cache
    context: int
    every: int
    name: str = "basin"
    budget: float | None = None

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass

    @torch.no_grad()
    def measure(self, training: Training) -> dict[str, float]:
        model = training.model
        assert isinstance(model, KernelLM)
        device = model.embedding.weight.device
        batches = Batches(open_cache(self.dev, verify=False), None, self.context, HELD_OUT, seed=0)
        x, y = (torch.from_numpy(a).to(device) for a in batches.at(0))
        p_BTS, real_BT = next_basins(y, self.bins_VS.to(device))
        log_b_NS = torch.log_softmax(model.basin_head(model.hidden(x)[real_BT]).float(), -1)
        return scores(p_BTS[real_BT], log_b_NS)


def scores(p_NS: Tensor, log_b_NS: Tensor) -> dict[str, float]:
    """basin_nats, basin_mean_nats and basin_accuracy of N windows; the other window is half the text away."""
    mean_S, other_NS = p_NS.mean(0), p_NS.roll(len(p_NS) // 2, 0)
    own, theirs = ((log_b_NS / 2).exp() * p.sqrt() for p in (p_NS, other_NS))
    lead_N = own.sum(-1) - theirs.sum(-1)  # of the cosines: the nearer one has the larger
    known = torch.log(mean_S.clamp(min=torch.finfo(torch.float32).tiny))
    return {
        "basin_nats": float(divergence(p_NS, log_b_NS)),
        "basin_mean_nats": float(divergence(p_NS, known)),
        "basin_accuracy": float(((lead_N > 0).float() + (lead_N == 0).float() / 2).mean()),
    }
