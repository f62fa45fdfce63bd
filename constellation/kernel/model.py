"""The kernel: a causal language model with QFI-metric attention.

Pre-norm decoder: tokens -> embedding + s * embedding of the token before ->
[RMSNorm -> attention, RMSNorm -> SwiGLU] x layers -> RMSNorm -> tied head.
Shapes: B batch, T position, D width, H heads, K head size, V vocabulary.

The look-back s (D,) is learned per channel from 0. With it the first layer sees pairs of tokens, so that
copying from context (induction, which needs the token before in the key) is learned in fewer steps.
`look_back = 0` leaves it out.

Attention reads q and k of a head as unit amplitude vectors, that is pure states; the Fubini-Study
angle between them is theta = arccos <q, k>.

    metric = "fidelity":  logit_ij = c_h(i) cos theta_ij     a von Mises-Fisher kernel in that angle
    metric = "dot":       logit_ij = s(i) <q_i, k_j> / sqrt(K)   the ordinary control

Either way the factor of row i is put into q_i, so that a plain q.k attention serves both (attention.py).
c_h > 0 is learned per head; the factor of a row with L = i + 1 visible keys is the running coupling

    c_h(L) = c_h max(1 + beta ln(L / L_ref), 0.05)                (`inverse_temperature`)

beta fixed, 0 or learned (Chiang & Cholak 2022; Nakanishi 2025). Causality is a law: a change of
token t+1 leaves the logits at <= t bit-identical.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constellation.config import Kernel as KernelConfig
from constellation.kernel.attention import EPS, EXPLICIT_UP_TO, attention, causal_mask, states
from constellation.kernel.norm import rms_norm

COUPLING_FLOOR = 0.05
INITIAL_CONCENTRATION = 8.0  # c at the start; cos of two random vectors in R^32 has deviation 0.18
_EPS = EPS


def inverse_temperature(visible: Tensor, beta: Tensor | float, ref: int) -> Tensor:
    """max(1 + beta ln(L / L_ref), 0.05) for L visible keys; 1 at L = L_ref, 1 everywhere when beta = 0."""
    return torch.clamp(1 + beta * torch.log(visible / ref), min=COUPLING_FLOOR)


def rotary_table(context: int, size: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each (context, size / 2)."""
    frequency = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(context, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


@dataclasses.dataclass(frozen=True)
class Rows:
    """What attention needs to know of the rows start..stop-1: rotary tables, coupling, and the mask or None."""

    cos_TK: Tensor
    sin_TK: Tensor
    coupling_T1: Tensor
    mask_TT: Tensor | None = None


class Linear(nn.Linear):
    """Its weights get their values from `KernelLM`, or from a checkpoint."""

    def reset_parameters(self) -> None:
        pass


class Attention(nn.Module):
    def __init__(self, config: KernelConfig):
        super().__init__()
        self.heads, self.metric = config.heads, config.metric
        self.size = config.width // config.heads
        self.qkv = Linear(config.width, 3 * config.width, bias=False)
        self.out = Linear(config.width, config.width, bias=False)
        if config.metric == "fidelity":
            self.log_c = nn.Parameter(torch.full((config.heads,), math.log(INITIAL_CONCENTRATION)))

    def factor(self, rows: Rows) -> Tensor:
        """What multiplies the logits of a row: (H, T), or (1, T) where all heads have the same."""
        if self.metric == "fidelity":
            return self.log_c.exp()[:, None] * rows.coupling_T1.mT
        return rows.coupling_T1.mT / math.sqrt(self.size)

    def project(self, x_BTD: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """q (with the row's factor in it), k, v: each (B, H, T, K); logits are then plainly q.k."""
        qkv_BT3HK = self.qkv(x_BTD).unflatten(-1, (3, self.heads, self.size))
        return states(qkv_BT3HK, self.factor(rows), rows.cos_TK, rows.sin_TK, self.metric == "fidelity")

    def forward(self, x_BTD: Tensor, rows: Rows) -> Tensor:
        qkv_BT3HK = self.qkv(x_BTD).unflatten(-1, (3, self.heads, self.size))
        unit = self.metric == "fidelity"
        return self.out(attention(qkv_BT3HK, self.factor(rows), rows.cos_TK, rows.sin_TK, rows.mask_TT, unit))


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps or 0.0)


class SwiGLU(nn.Module):
    """out(silu(gate) * up) (Shazeer 2020), gate and up in one product."""

    def __init__(self, config: KernelConfig):
        super().__init__()
        self.gate_up = Linear(config.width, 2 * config.hidden, bias=False)
        self.out = Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: KernelConfig):
        super().__init__()
        self.norm_attention = RMSNorm(config.width, eps=_EPS)
        self.attention = Attention(config)
        self.norm_mlp = RMSNorm(config.width, eps=_EPS)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        x = x + self.attention(self.norm_attention(x), rows)
        return x + self.mlp(self.norm_mlp(x))


class KernelLM(nn.Module):
    """tokens (B, T) int64, T <= context -> hidden states (B, T, D) or logits (B, T, V)."""

    beta: Tensor  # parameter when learned, else a table like the next ones
    cos: Tensor
    sin: Tensor
    visible: Tensor  # 1, 2, ..., context

    def __init__(self, config: KernelConfig, seed: int | None = 0):
        """`seed=None` leaves the weights as they are, for a model that is loaded next."""
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.width)
        self.embedding: nn.Embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, eps=_EPS)
        if config.look_back:
            self.look_back = nn.Parameter(torch.zeros(config.width))
        if config.coupling == "learned":
            self.beta = nn.Parameter(torch.tensor(config.coupling_beta))
        self._tables()
        if seed is not None:
            self._initialise(torch.Generator().manual_seed(seed))

    def _tables(self) -> None:
        """The constant tables, which checkpoints do not hold."""
        config = self.config
        cos, sin = rotary_table(config.context, config.width // config.heads, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("visible", torch.arange(1, config.context + 1).float(), persistent=False)
        if config.coupling != "learned":
            beta = torch.tensor(0.0 if config.coupling == "off" else config.coupling_beta)
            self.register_buffer("beta", beta, persistent=False)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """N(0, 1/fan_in); the two products that write to the residual stream start smaller by sqrt(2 layers)."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                scale = self.config.width**-0.5 if name.startswith("embedding") else weight.shape[1] ** -0.5
                weight.normal_(0, scale, generator=generator)
                if name.endswith("out.weight"):
                    weight.mul_((2 * self.config.layers) ** -0.5)

    def rows(self, length: int) -> Rows:
        """The rows 0..length-1 of a whole sequence."""
        coupling = inverse_temperature(self.visible[:length], self.beta, self.config.coupling_ref)[:, None]
        mask = None
        if self.visible.device.type == "cpu" and length <= EXPLICIT_UP_TO:
            mask = causal_mask(length)
        return Rows(self.cos[:length], self.sin[:length], coupling, mask)

    def embed(self, tokens_BT: Tensor, before_B1: Tensor | None = None) -> Tensor:
        """What the first block reads; `before_B1` are the tokens before the first ones, None at a beginning."""
        x = self.embedding(tokens_BT)
        if not self.config.look_back:
            return x
        first = x.new_zeros(len(x), 1, x.shape[2]) if before_B1 is None else self.embedding(before_B1)
        return x + self.look_back * torch.cat((first, x[:, :-1]), dim=1)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        rows = self.rows(tokens_BT.shape[1])
        x = self.embed(tokens_BT)
        for block in self.blocks:
            x = block(x, rows)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.logits(self.hidden(tokens_BT))

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def parameter_count(config: KernelConfig) -> int:
    """Parameters by formula: V D + layers (4 D^2 + 3 D hidden + 2 D [+ H]) + D [+ D look-back] [+ 1 beta]."""
    d = config.width
    per_block = 4 * d * d + 3 * d * config.hidden + 2 * d + (config.heads if config.metric == "fidelity" else 0)
    ends = config.vocab_size * d + d * (1 + config.look_back) + (config.coupling == "learned")
    return ends + config.layers * per_block
