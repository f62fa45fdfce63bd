"""The kernel: a causal language model with QFI-metric attention.

Pre-norm decoder: tokens -> embedding + s * embedding of the token before ->
[RMSNorm -> attention, RMSNorm -> SwiGLU] x blocks -> RMSNorm -> head, tied to the embedding or its own.
Shapes: B batch, T position, D width, H heads, G heads of keys and values, K head size, V vocabulary.

A token passes the blocks in the order `prelude`, then R = `loops` times the tied group between, then `coda`
(Dehghani et al. 2019; Geiping et al. 2025). R = 1 is the plain decoder. Nothing but attention crosses positions, so a
recursive kernel is as causal as a plain one and has keys and values of every loop.

The look-back s (D,) is learned per channel from 0. With it the first layer sees pairs of tokens, so that
copying from context (induction, which needs the token before in the key) is learned in fewer steps.
`look_back = 0` leaves it out.

Attention reads q and k of a head as unit amplitude vectors, that is pure states; the Fubini-Study
angle between them is theta = arccos <q, k>.

    metric = "fidelity":  logit_ij = c_h(i) cos theta_ij     a von Mises-Fisher kernel in that angle
    metric = "geodesic":  logit_ij = -c_h(i) theta_ij^2 / 2,  theta_ij = arccos |<q_i, k_j>|   (geodesic.py)
    metric = "dot":       logit_ij = s(i) <q_i, k_j> / sqrt(K)   the ordinary control

For fidelity and dot the factor of row i is put into q_i, so that a plain q.k attention serves both (attention.py).
c_h > 0 is learned per head; the factor of a row with L = i + 1 visible keys is the running coupling

    c_h(L) = c_h max(1 + beta ln(L / L_ref), 0.05)                (`inverse_temperature`)
    c_h(L) = c_h ln L / ln L_ref = s_h ln L                       "scalable": also "dot" has a c_h then, 1 at the start

beta fixed, 0 or learned (Chiang & Cholak 2022), s_h learned (Nakanishi 2025). Causality is a law: a change of
token t+1 leaves the logits at <= t bit-identical.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constellation.config import Kernel as KernelConfig
from constellation.kernel.attention import EXPLICIT_UP_TO, attention, causal_mask, states
from constellation.kernel.geodesic import geodesic_attention
from constellation.kernel.norm import rms_norm
from constellation.kernel.rotary import rotary_table

BASIN_BINS = 64  # of the basin head (train/basin.py)
COUPLING_FLOOR = 0.05
INITIAL_CONCENTRATION = 8.0  # c at the start; cos of two random vectors in R^32 has deviation 0.18


def inverse_temperature(visible: Tensor, beta: Tensor | float, ref: int) -> Tensor:
    """max(1 + beta ln(L / L_ref), 0.05) for L visible keys; 1 at L = L_ref, 1 everywhere when beta = 0."""
    return torch.clamp(1 + beta * torch.log(visible / ref), min=COUPLING_FLOOR)


def has_concentration(config: KernelConfig) -> bool:
    """Whether every head has a c_h of its own."""
    return config.metric != "dot" or config.coupling == "scalable"


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
        self.heads, self.groups, self.size, self.metric = config.heads, config.groups, config.size, config.metric
        self.qkv = Linear(config.width, (self.heads + 2 * self.groups) * self.size, bias=False)
        self.out = Linear(config.width, config.width, bias=False)
        if has_concentration(config):
            initial = 1.0 if config.metric == "dot" else INITIAL_CONCENTRATION
            self.log_c = nn.Parameter(torch.full((config.heads,), math.log(initial)))

    def factor(self, rows: Rows) -> Tensor:
        """What multiplies the logits of a row: (H, T), or (1, T) where all heads have the same."""
        coupling_1T = rows.coupling_T1.mT
        if self.metric == "dot":
            coupling_1T = coupling_1T / math.sqrt(self.size)
        return self.log_c.exp()[:, None] * coupling_1T if hasattr(self, "log_c") else coupling_1T

    def project(self, x_BTD: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """q (with the row's factor in it), k, v: each (B, H, T, K); logits of fidelity and dot are then plainly q.k."""
        return states(self._qkv(x_BTD), self.factor(rows), rows.cos_TK, rows.sin_TK, self.metric != "dot")

    def forward(self, x_BTD: Tensor, rows: Rows) -> Tensor:
        qkv_BT3HK, factor_HT = self._qkv(x_BTD), self.factor(rows)
        if self.metric == "geodesic":
            return self.out(geodesic_attention(qkv_BT3HK, factor_HT, rows.cos_TK, rows.sin_TK, rows.mask_TT))
        unit = self.metric == "fidelity"
        return self.out(attention(qkv_BT3HK, factor_HT, rows.cos_TK, rows.sin_TK, rows.mask_TT, unit))

    def _qkv(self, x_BTD: Tensor) -> Tensor:
        """q, k and v (B, T, 3, H, K); a shared key or value stands there for each head that shares it."""
        qkv = self.qkv(x_BTD)
        if self.groups == self.heads:
            return qkv.unflatten(-1, (3, self.heads, self.size))
        q, kv = qkv.split((self.heads * self.size, 2 * self.groups * self.size), dim=-1)
        kv_BT2HK = kv.unflatten(-1, (2, self.groups, self.size)).repeat_interleave(self.heads // self.groups, dim=-2)
        return torch.cat((q.unflatten(-1, (1, self.heads, self.size)), kv_BT2HK), dim=-3)


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
        self.norm_attention = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.norm_mlp = RMSNorm(config.width, eps=config.norm_eps)
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
        config.check()
        self.config = config
        table = torch.empty(config.vocab_size, config.width)
        self.embedding: nn.Embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        if not config.tied:
            self.head = Linear(config.width, config.vocab_size, bias=False)
        if config.basin_head:
            self.basin_head = Linear(config.width, BASIN_BINS, bias=False)
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
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("visible", torch.arange(1, config.context + 1).float(), persistent=False)
        if config.coupling != "learned":
            beta = torch.tensor(0.0 if config.coupling == "off" else config.coupling_beta)
            self.register_buffer("beta", beta, persistent=False)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """N(0, 1/fan_in); the two products that write to the residual stream start smaller by sqrt(2 depth)."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                scale = self.config.width**-0.5 if name.startswith("embedding") else weight.shape[1] ** -0.5
                weight.normal_(0, scale, generator=generator)
                if name.endswith("out.weight"):
                    weight.mul_((2 * len(self.config.order)) ** -0.5)

    def rows(self, length: int) -> Rows:
        """The rows 0..length-1 of a whole sequence."""
        mask = None
        if self.visible.device.type == "cpu" and (length <= EXPLICIT_UP_TO or self.config.metric == "geodesic"):
            mask = causal_mask(length)
        return Rows(self.cos[:length], self.sin[:length], self.coupling(length)[:, None], mask)

    def coupling(self, length: int) -> Tensor:
        """Of the rows 0..length-1, (length,): what multiplies c_h."""
        visible, ref = self.visible[:length], self.config.coupling_ref
        if self.config.coupling == "scalable":
            return torch.log(visible) / math.log(ref)
        return inverse_temperature(visible, self.beta, ref)

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
        for at in self.config.order:
            x = self.blocks[at](x, rows)
        return self.norm(x)

    @property
    def unembedding(self) -> Tensor:
        """W (V, D) of the head."""
        return self.embedding.weight if self.config.tied else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.unembedding)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.logits(self.hidden(tokens_BT))

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def parameter_count(config: KernelConfig) -> int:
    """V D [+ V D] [+ 64 D] + layers (2 D^2 (1 + G/H) + 3 D hidden + 2 D [+ H]) + D [+ D look-back] [+ 1 beta]."""
    ends = config.vocab_size * config.width * (1 if config.tied else 2)
    ends += config.width * (1 + config.look_back + BASIN_BINS * config.basin_head) + (config.coupling == "learned")
    return ends + config.layers * _block_parameters(config)


def multiplications(config: KernelConfig) -> int:
    """About as many as a token costs in matrix products: a tied group counts as often as it is applied."""
    return parameter_count(config) + (len(config.order) - config.layers) * _block_parameters(config)


def _block_parameters(config: KernelConfig) -> int:
    d = config.width
    projections = 2 * d * d + 2 * d * config.groups * config.size
    return projections + 3 * d * config.hidden + 2 * d + (config.heads if has_concentration(config) else 0)
