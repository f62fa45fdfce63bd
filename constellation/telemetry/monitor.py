"""The telemetry of a run as one probe: every quantity of this folder on a fixed set of held-out windows.

One forward pass of the windows, one of a part of them with a token changed, one of a sequence of the batch with two
passes backward: that is what a measurement costs. The reference model's predictions are read once. Places are N fixed
positions of the windows, so that two measurements differ by the model alone.

What a measurement cannot say is absent (kappa_eff before its calibration, the distance without a reference) and what
is degenerate is flagged: `phi_degenerate`, and `telemetry_nan` for a model whose predictions are not finite, of which
nothing else is reported. Neither touches the run.
"""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.geometry import sphere
from constellation.telemetry.collapse import repeat_rate, unigram_kl
from constellation.telemetry.coupling import coupling
from constellation.telemetry.curiosity import BAND, Curiosity
from constellation.telemetry.emotion import EmotionMonitor
from constellation.telemetry.integration import integration
from constellation.telemetry.kappa import CALIBRATION, REFERENCE, gradient_curvature, kappa
from constellation.telemetry.ricci import ollivier_ricci
from constellation.telemetry.training import Language, Training

PLACES = 256  # N, whose predictions are kept whole
GRAPH = 64  # of them make the graph of basins, and are remembered from one measurement to the next
BINS = 64  # into which a remembered prediction is summed, by token number; a distance can only shrink by that
NORMS = 64  # gradient norms whose median is compared with


@dataclass(frozen=True)
class Windows:
    """The held-out text that is measured on: inputs and targets (S, T)."""

    inputs_ST: Tensor
    targets_ST: Tensor

    def check(self, width: int) -> None:
        """ConfigError unless states of `width` units can be described from it."""
        s, t = self.inputs_ST.shape
        if not s or t < 8:
            raise ConfigError(f"telemetry: {s} windows of {t} tokens are no probe set; at least one of 8 is needed")
        if s * t < width + 2:
            need = -(-(width + 2) // t)
            raise ConfigError(
                f"telemetry.windows={s}: {s * t} states of {width} units are too few for phi, at least {width + 2} are"
                f" needed; set telemetry.windows={need}"
            )

    def places(self) -> Tensor:
        """Flat positions whose predictions are kept, evenly spread."""
        total = self.inputs_ST.numel()
        return torch.linspace(0, total - 1, min(PLACES, total)).round().long()


@dataclass(frozen=True)
class Reading:
    """What one forward pass over the windows says of a model."""

    hidden_ND: Tensor  # at every position
    nats_ST: Tensor
    sqrt_p_NV: Tensor  # at the places
    top_ST: Tensor  # most likely tokens
    mean_V: Tensor  # mean prediction
    entropy_N: Tensor  # at the places, nats
    margin_N: Tensor  # largest minus second largest probability there


@torch.no_grad()
def read(model: Language, windows: Windows, chunk: int = 2048) -> Reading:
    """One pass; logits exist `chunk` rows at a time."""
    hidden_ND = model.hidden(windows.inputs_ST).flatten(0, 1).float()
    places_N, targets_M = windows.places().to(hidden_ND.device), windows.targets_ST.flatten()
    nats, top, total_V = [], [], None
    for h, y in zip(hidden_ND.split(chunk), targets_M.split(chunk), strict=True):
        log_p = torch.log_softmax(model.logits(h).float(), -1)
        nats.append(-log_p.gather(1, y[:, None])[:, 0])
        top.append(log_p.argmax(-1))
        part_V = log_p.exp().sum(0)
        total_V = part_V if total_V is None else total_V + part_V
    assert total_V is not None
    log_p_NV = torch.log_softmax(model.logits(hidden_ND[places_N]).float(), -1)
    p_NV = log_p_NV.exp()
    first_N, second_N = p_NV.topk(2, dim=-1).values.unbind(-1)
    shape = windows.targets_ST.shape
    return Reading(
        hidden_ND, torch.cat(nats).reshape(shape), p_NV.sqrt(), torch.cat(top).reshape(shape),
        total_V / len(hidden_ND), -(p_NV * log_p_NV).sum(-1), first_N - second_N,
    )  # fmt: skip


def basin_distances(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    """d_FR, (N, V) -> (N,) and whatever broadcasts like that, radians in [0, pi], of square roots of predictions."""
    return 2 * sphere.angle(a_NV, b_NV)


def basin_distance(a_NV: Tensor, b_NV: Tensor) -> float:
    """D(f, g) = sqrt(E_x d_FR(p_f, p_g)^2), radians in [0, pi]; 0 for one model twice."""
    return float(basin_distances(a_NV, b_NV).square().mean().sqrt())


@dataclass
class Telemetry:
    """Probe. `reference` is the model that D is measured to, None where there is none."""

    windows: Windows
    every: int
    budget: float | None = None
    reference: Language | None = None
    emotions: bool = True
    name: str = "telemetry"
    curiosity: Curiosity = field(default_factory=Curiosity)
    emotion: EmotionMonitor = field(default_factory=EmotionMonitor)
    calibration: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    last_phi: float | None = None
    last_distances: list[float] | None = None  # D_i
    before: Tensor | None = None  # (GRAPH, BINS) square roots of the last predictions, in bins
    _reference_NV: Tensor | None = None

    def state(self) -> dict[str, Any]:
        before = None if self.before is None else base64.b64encode(self.before.numpy().tobytes()).decode()
        return {
            "curiosity": vars(self.curiosity), "emotion": vars(self.emotion), "calibration": self.calibration,
            "norms": self.norms, "last_phi": self.last_phi, "last_distances": self.last_distances, "before": before,
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.curiosity = Curiosity(**state["curiosity"])
        self.emotion = EmotionMonitor(**state["emotion"])
        self.calibration, self.norms = list(state["calibration"]), list(state["norms"])
        self.last_phi, self.last_distances = state["last_phi"], state["last_distances"]
        self.before = None
        if state["before"] is not None:
            raw = bytearray(base64.b64decode(state["before"]))
            self.before = torch.frombuffer(raw, dtype=torch.float32).reshape(-1, BINS)

    def measure(self, training: Training) -> dict[str, float]:
        model = cast(Language, training.model)
        seen = read(model, self.windows)
        if not bool(torch.isfinite(seen.nats_ST).all()):
            return {"telemetry_nan": 1.0}
        whole = integration(seen.hidden_ND)
        norm = float(training.numbers["grad_norm"])
        found = {
            "held_out_nats": float(seen.nats_ST.mean()), "phi": whole.phi, "phi_null_nats": whole.null,
            "differentiation": whole.differentiation, "phi_degenerate": float(whole.degenerate),
            "unigram_kl": unigram_kl(self.windows.targets_ST, seen.mean_V), "repeat_rate": repeat_rate(seen.top_ST),
            "text_repeat_rate": repeat_rate(self.windows.targets_ST),
            "coupling": float(coupling(model, self.windows.inputs_ST[::2], seed=training.step).mean()),
        }  # fmt: skip
        found |= self._kappa(training, model)
        curious, mood = self.curiosity.see(seen.nats_ST.mean(1).tolist(), norm)
        found |= curious | {"mood": float(mood)}
        if self.reference is None:  # then to the text itself, all of whose probability is on its next token
            to_text_N = 2 * torch.acos((-seen.nats_ST.flatten()[self.windows.places()] / 2).exp().clamp(max=1))
            distances_N = to_text_N
        else:
            if self._reference_NV is None:
                self._reference_NV = read(self.reference, self.windows).sqrt_p_NV
            distances_N = basin_distances(seen.sqrt_p_NV, self._reference_NV)
            found["basin_distance"] = float(distances_N.square().mean().sqrt())
        if self.emotions:
            found |= self.emotion.compute(self._raw(found, seen, norm, distances_N.cpu()))
        if math.isfinite(norm):
            self.norms = [*self.norms, norm][-NORMS:]
        self.last_phi, self.last_distances = whole.phi, distances_N.tolist()
        return found

    def _kappa(self, training: Training, model: Language) -> dict[str, float]:
        with_grad = [p for p in training.model.parameters() if p.grad is not None]
        if not with_grad:
            return {}
        grads = [cast(Tensor, p.grad) for p in with_grad]
        q = gradient_curvature(model, with_grad, grads, training.batch[0][:1])
        if not math.isfinite(q):
            return {}
        value = kappa(q, self.calibration)
        if len(self.calibration) < CALIBRATION:
            self.calibration.append(q)
        return {"gradient_curvature": q} | ({} if value is None else {"kappa_eff": value})

    def _raw(self, found: Mapping[str, float], seen: Reading, norm: float, distances_N: Tensor) -> dict[str, float]:
        """The functions of emotion.py before they are z-scored; what is remembered of predictions becomes theirs."""
        few = torch.linspace(0, len(distances_N) - 1, min(GRAPH, len(distances_N))).long()
        points = seen.sqrt_p_NV[few]
        curved_E = ollivier_ricci(basin_distances(points[:, None], points[None]))
        binned, before = _binned(points), self.before
        moved = torch.zeros(len(few)) if before is None else basin_distances(binned, before)
        self.before = binned
        nearer_N = torch.zeros(1) if self.last_distances is None else torch.tensor(self.last_distances) - distances_N
        losses = self.curiosity.losses
        change = (
            [now - before for now, before in zip(losses[-1], losses[-2], strict=True)] if len(losses) > 1 else [0.0]
        )
        error = found["curiosity_band"] / BAND
        progress = found["curiosity"] / error if error > 0 else 0.0
        g = norm / statistics.median(self.norms) if self.norms and statistics.median(self.norms) > 0 else 1.0
        nats_N = seen.nats_ST.flatten()[self.windows.places()]
        phi_moved = abs(found["phi"] - (found["phi"] if self.last_phi is None else self.last_phi))
        return {
            "joy": float((-curved_E).clamp(min=0).mean()), "suffering": float(curved_E.clamp(min=0).mean()),
            "fear": float(((1 - seen.margin_N[few].cpu()) * moved).mean()),
            "love": float(nearer_N.clamp(min=0).mean()), "hate": float((-nearer_N).clamp(min=0).mean()),
            "rage": phi_moved * found.get("kappa_eff", REFERENCE) / (1 + abs(progress)),
            "calm": -math.log(g) if g > 0 else 0.0, "curiosity": found["curiosity"],
            "frustration": g / (1 + max(progress, 0.0)),
            "anticipation": float((seen.entropy_N - nats_N).mean()),
            "relief": found["curiosity_1"] - found["curiosity_16"], "anxiety": statistics.pstdev(change),
        }  # fmt: skip


def _binned(sqrt_p_NV: Tensor) -> Tensor:
    """Square roots of the predictions summed over tokens whose numbers are equal modulo 64, (N, 64)."""
    vocabulary = sqrt_p_NV.shape[1]
    p_NV = torch.nn.functional.pad(sqrt_p_NV.square(), (0, -vocabulary % BINS))
    return p_NV.unflatten(1, (-1, BINS)).sum(1).sqrt().cpu()
