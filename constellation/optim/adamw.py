"""torch's own AdamW, the control of the comparisons."""

from __future__ import annotations

import torch

from constellation.optim.kinds import decayed
from constellation.optim.registry import AdamWSettings


def build(settings: AdamWSettings, model: torch.nn.Module) -> torch.optim.AdamW:
    """momentum and fisher_decay are its betas; its eps is `damping`, at least 1e-8."""
    s = settings
    groups, betas = decayed(model, s.weight_decay), (s.momentum, s.fisher_decay)
    return torch.optim.AdamW(groups, lr=s.lr, betas=betas, eps=max(s.damping, 1e-8), fused=True)
