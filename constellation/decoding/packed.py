"""A kernel's weights laid out for decoding: the same function of the tokens in fewer and faster operations.

    gains        of RMSNorm, and sqrt(D), go into the matrix that follows, so that a norm is x / hypot(|x|, sqrt(D eps))
    loops        a block that is applied several times is as many layers, with keys and values of their own
    rotations    act on pairs of neighbours, by a permutation of q and k within a head: one complex product turns both
    factors      of a row (coupling, 1 / sqrt(K)) go into its rotation; geodesic logits are multiplied by them
    look-back    reads a row of zeros after the vocabulary before the first token
    bias         -inf for tokens that must not come, is the head's

A large product on a CPU is oneDNN's on weights packed beforehand, a few times faster for few rows than one that packs
them each time. Rows do not depend on each other, nor on how many there are: of oneDNN's from two rows on, of the plain
ones (MKL's) from four, of int8 always (measured: AMD EPYC, AVX-512, torch 2.13; the laws of the tests hold every
machine to it). So a pass in fp32 takes at least four.
Shapes: N rows, each one token of one request; D width, H heads, G heads of keys and values, K head size, V vocabulary,
C context.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from constellation.decoding import int8
from constellation.errors import ConfigError
from constellation.kernel.attention import EPS
from constellation.kernel.model import Attention, Block, KernelLM, SwiGLU

PRECISIONS = ("fp32", "int8")
FEW = 2**16  # weights, below which a plain product is over before oneDNN has begun


class Product(Protocol):
    """A matrix to multiply rows with."""

    def __call__(self, x_NI: Tensor) -> Tensor:
        """x W^T + bias, (N, O)."""
        ...

    def onto(self, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        """y + x W^T."""
        ...


class Packed32:
    """float32 by oneDNN."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        self.weight, self.bias_O = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), 16), bias_O

    def __call__(self, x_NI: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, self.weight, self.bias_O, "none", [], "")
        return product

    def onto(self, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        return self(x_NI).add_(y_NO)  # oneDNN's own sum takes longer


class Plain32:
    """float32 by whatever the device has."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        self.weight_OI, self.bias_O = weight_OI.clone(), bias_O
        self.weight_IO = self.weight_OI.t()

    def __call__(self, x_NI: Tensor) -> Tensor:
        return F.linear(x_NI, self.weight_OI, self.bias_O)

    def onto(self, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        return torch.addmm(y_NO, x_NI, self.weight_IO)


class Gated:
    """silu(x G^T) * (x U^T), one product with both; two that end in silu and in the multiplication take longer."""

    def __init__(self, gate_up: Product):
        self.gate_up = gate_up

    def __call__(self, x_ND: Tensor) -> Tensor:
        gate, up = self.gate_up(x_ND).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


@dataclasses.dataclass
class Layer:
    qkv: Product
    out: Product
    gated: Gated
    down: Product
    norm_A1: tuple[Tensor, Tensor] | None  # eps / c^2 and 1 / c^2, A = H + G: q's (c = c_h), k's (c = 1); None: no norm
    concentration_H: Tensor | None = None  # c_h where the metric is geodesic, and q is of length 1 too


class Packed:
    """The weights of `model` as they are now; `bias_V` is added to all logits. `product`: other ones."""

    def __init__(
        self, model: KernelLM, precision: str = "fp32", bias_V: Tensor | None = None,
        product: Callable[[Tensor, Tensor | None], Product] | None = None,
    ):  # fmt: skip
        if precision not in PRECISIONS:
            raise ConfigError(f"precision={precision!r}: choose one of {', '.join(PRECISIONS)}")
        config, self.device = model.config, model.embedding.weight.device
        self.precision, self.onednn = precision, self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if precision == "int8" and self.device.type != "cpu":
            raise ConfigError(f"precision='int8' is for a CPU, not {self.device.type}; choose 'fp32'")
        self.width, self.heads, self.groups, self.size = config.width, config.heads, config.groups, config.size
        self.context, self.vocabulary, self.layers_count = config.context, config.vocab_size, len(config.order)
        self.min_rows = 1 if self.device.type != "cpu" or precision == "int8" or product else 4
        self.hidden, self._other = config.hidden, product
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            table_VD = model.embedding.weight
            self.embedding_VD = torch.cat((table_VD, table_VD.new_zeros(1, self.width)))
            self.look_back_D = model.look_back.detach().clone() if config.look_back else None
            blocks = [self._layer(block) for block in model.blocks]
            self.layers = [blocks[at] for at in config.order]
            self.head = self._after(model.norm.weight, model.unembedding, bias_V)
            self.coupling_C = model.coupling(self.context).detach().clone() if config.metric == "geodesic" else None
            self.rotary_C21K = self._rotary(model)
            self.eps_root = self.embedding_VD.new_tensor(math.sqrt(self.width * config.norm_eps))

    def _after(self, gain_D: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Product:
        return self._product(weight_OD * (gain_D * math.sqrt(self.width)), bias_O)

    def _product(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> Product:
        if self._other:
            return self._other(weight_OI, bias_O)
        if self.precision == "int8":
            return int8.Int8Product(weight_OI, bias_O)
        return (Packed32 if self.onednn and weight_OI.numel() >= FEW else Plain32)(weight_OI, bias_O)

    def _layer(self, block: torch.nn.Module) -> Layer:
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        assert isinstance(attention, Attention) and isinstance(mlp, SwiGLU)
        pairs = torch.arange(self.size)
        if self._other is None:
            pairs = pairs.view(2, -1).t().flatten()  # i, i + K/2 become neighbours
        q, k, v = attention.qkv.weight.unflatten(0, (-1, self.size)).split((self.heads, self.groups, self.groups))
        norm, concentration_H = None, attention.log_c.exp() if hasattr(attention, "log_c") else None
        if attention.metric == "dot" and concentration_H is not None:
            q = q * concentration_H[:, None, None]
        qkv = torch.cat((q[:, pairs], k[:, pairs], v)).flatten(0, 1)
        if attention.metric != "dot":
            c_A1 = q.new_ones(self.heads + self.groups, 1)
            if attention.metric == "fidelity":
                c_A1[: self.heads, 0] = concentration_H
            norm = (EPS / c_A1**2, 1 / c_A1**2)
        return Layer(
            self._after(block.norm_attention.weight, qkv),
            self._product(attention.out.weight),
            Gated(self._after(block.norm_mlp.weight, mlp.gate_up.weight)),
            self._product(mlp.out.weight),
            norm,
            concentration_H if attention.metric == "geodesic" else None,
        )

    def _rotary(self, model: KernelLM) -> Tensor:
        """e^{i angle} of every position for q, the row's factor in it, and for k: (C, 2, 1, K/2) complex."""
        turn_CK = torch.complex(model.cos, model.sin)
        factor_C1 = model.coupling(self.context)[:, None]
        if model.config.metric == "geodesic":
            factor_C1 = torch.ones_like(factor_C1)
        elif model.config.metric == "dot":
            factor_C1 = factor_C1 / math.sqrt(self.size)
        return torch.stack((turn_CK * factor_C1, turn_CK), dim=1)[:, :, None]

    def rotary_halves(self) -> Tensor:
        """The same as cos and sin, (C, 2, 2, K/2), for q and k whose halves make pairs."""
        return torch.view_as_real(self.rotary_C21K[:, :, 0]).transpose(-1, -2).contiguous()

    def embed(self, tokens_N: Tensor, before_N: Tensor) -> Tensor:
        """What the first layer reads; before the first token of a window comes the token V."""
        x_ND = self.embedding_VD.index_select(0, tokens_N)
        if self.look_back_D is None:
            return x_ND
        return x_ND.addcmul_(self.look_back_D, self.embedding_VD.index_select(0, before_N))

    def normal(self, x_ND: Tensor) -> Tensor:
        """x / hypot(|x|, sqrt(D eps)): RMSNorm but for its gain and sqrt(D), which are in the next matrix."""
        return x_ND / torch.hypot(torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True), self.eps_root)

    def turned(self, layer: Layer, qkv_NO: Tensor, rotary_N21K: Tensor) -> None:
        """q and k in `qkv_NO` become what the attention compares."""
        qk_NAK = qkv_NO[:, : self.width + self.groups * self.size].unflatten(-1, (-1, self.size))
        if layer.norm_A1 is not None:
            square_NA1 = torch.linalg.vecdot(qk_NAK, qk_NAK)[..., None]
            qk_NAK.mul_(torch.addcmul(layer.norm_A1[0], square_NA1, layer.norm_A1[1]).rsqrt_())
        pairs_NAK = torch.view_as_complex(qk_NAK.unflatten(-1, (-1, 2)))
        for part, rotary_N1K in zip(pairs_NAK.split((self.heads, self.groups), 1), rotary_N21K.unbind(1), strict=True):
            part.mul_(rotary_N1K)

    def logits(self, x_ND: Tensor) -> Tensor:
        return self.head(self.normal(x_ND))
