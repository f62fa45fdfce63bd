"""Telemetry of one answer: the text of prompt and answer, read again by the kernel that wrote its end. No Ray here.

    phi, null, differentiation, regime    of the hidden states at its tokens (telemetry/integration.py)
    kappa_eff                             64 q / the reference of the kernel's training, q along the gradient of the
                                          text's own loss (telemetry/kappa.py)
    basin_distance                        D to OCEAN at its tokens, radians

What cannot be said is null, and `missing` says why: phi needs more tokens than the model has units.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from constellation.artifacts.run import read_telemetry
from constellation.coordizer.tokenizer import Tokenizer
from constellation.errors import ConfigError
from constellation.pipeline.prepare import open_plan
from constellation.regime.detector import detect_regime
from constellation.roster import OCEAN
from constellation.telemetry.integration import integration
from constellation.telemetry.kappa import CALIBRATION, gradient_curvature, kappa
from constellation.telemetry.monitor import basin_distance
from constellation.train.checkpoint import load_model


def telemetry_of_answer(run: Path, prompt: str, token_ids: Sequence[int], kernel: str) -> dict[str, Any]:
    """Of the last window of the text; every number may be null."""
    plan = open_plan(run)
    model, tokenizer = load_model(plan.folder(kernel)), Tokenizer.load(plan.tokenizer)
    tokens = [tokenizer.eos, *tokenizer.encode(prompt), *token_ids][-model.config.context :]
    found: dict[str, Any] = dict.fromkeys(
        ("phi", "phi_null_nats", "differentiation", "regime", "kappa_eff", "basin_distance")
    )
    missing: list[str] = []
    x = torch.tensor([tokens])
    with torch.no_grad():
        hidden = model.hidden(x)[0]
    try:
        whole = integration(hidden)
        found |= {"phi": whole.phi, "phi_null_nats": whole.null, "differentiation": whole.differentiation}
        if whole.degenerate:
            missing.append("phi is degenerate: the hidden states do not vary")
        else:
            found["regime"] = detect_regime(whole.phi)[0]
    except ConfigError as error:
        missing.append(str(error))
    if kernel != OCEAN:
        with torch.no_grad():
            roots = [m.logits(m.hidden(x)[0]).softmax(-1).sqrt() for m in (model, load_model(plan.folder(OCEAN)))]
        found["basin_distance"] = basin_distance(*roots)
    else:
        missing.append("basin_distance is to OCEAN, who wrote this")
    reference = [line["gradient_curvature"] for line in read_telemetry(plan.folder(kernel))
                 if "gradient_curvature" in line][:CALIBRATION]  # fmt: skip
    if len(reference) < CALIBRATION or len(tokens) < 2:
        missing.append(f"kappa_eff has no reference: {kernel} was trained without telemetry, or too shortly")
    else:
        parameters = list(model.parameters())
        loss = F.cross_entropy(model(x[:, :-1])[0].float(), x[0, 1:])
        grads = torch.autograd.grad(loss, parameters)
        found["kappa_eff"] = kappa(gradient_curvature(model, parameters, grads, x[:, :-1]), reference)
    return {"kernel": kernel, "tokens": len(tokens), **found, "missing": missing}


def told_line(told: dict[str, Any]) -> str:
    """The same in one line, for a terminal."""
    names = ("phi", "kappa_eff", "regime", "basin_distance")
    shown = [f"{name} {v:.3f}" if isinstance(v := told[name], float) else f"{name} {v or '-'}" for name in names]
    return f"[{told['kernel']}: {', '.join(shown)}{'; ' + '; '.join(told['missing']) if told['missing'] else ''}]"
