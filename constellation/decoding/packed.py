"""A kernel's weights laid out for decoding: the same function of the tokens in fewer and faster operations.

    gains        of RMSNorm, and sqrt(D), go into the matrix that follows, so that a norm is x / hypot(|x|, sqrt(D eps))
    rotations    act on pairs of neighbours, by a permutation of q and k within a head: one complex product turns both
    factors      of a row (coupling, 1 / sqrt(K)) go into its rotation
    look-back    reads a row of zeros after the vocabulary before the first token
    bias         -inf for tokens that must not come, is the head's

A large product on a CPU is oneDNN's on weights packed beforehand, a few times faster for few rows than one that packs
them each time. Rows do not depend on each other, nor on how many there are: of oneDNN's from two rows on, of the plain
ones (MKL's) from four, of int8 always (measured: AMD EPYC, AVX-512, torch 2.13; the laws of the tests hold every
machine to it). So a pass in fp32 takes at least four.
Shapes: N rows, each one token of one request; D width, H heads, K head size, V vocabulary, C context.
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
from constellation.kernel.model import _EPS, Attention, Block, KernelLM, SwiGLU, inverse_temperature

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
    norm_2H1: tuple[Tensor, Tensor] | None  # eps / c^2 and 1 / c^2 of q (c = c_h) and k (c = 1); None: no norm


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
        self.width, self.heads, self.size = config.width, config.heads, config.width // config.heads
        self.context, self.vocabulary, self.layers_count = config.context, config.vocab_size, config.layers
        self.min_rows = 1 if self.device.type != "cpu" or precision == "int8" or product else 4
        self.hidden, self._other = config.hidden, product
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            table_VD = model.embedding.weight
            self.embedding_VD = torch.cat((table_VD, table_VD.new_zeros(1, self.width)))
            self.look_back_D = model.look_back.detach().clone() if config.look_back else None
            self.layers = [self._layer(block) for block in model.blocks]
            self.head = self._after(model.norm.weight, table_VD, bias_V)
            self.rotary_C21K = self._rotary(model)
            self.eps_root = self.embedding_VD.new_tensor(math.sqrt(self.width * _EPS))

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
        parts = attention.qkv.weight.view(3, self.heads, self.size, self.width)
        qkv = torch.cat((parts[:2, :, pairs], parts[2:])).flatten(0, 2)
        norm = None
        if attention.metric == "fidelity":
            c_2H1 = torch.stack((attention.log_c.exp(), torch.ones_like(attention.log_c)))[..., None]
            norm = (_EPS / c_2H1**2, 1 / c_2H1**2)
        return Layer(
            self._after(block.norm_attention.weight, qkv),
            self._product(attention.out.weight),
            Gated(self._after(block.norm_mlp.weight, mlp.gate_up.weight)),
            self._product(mlp.out.weight),
            norm,
        )

    def _rotary(self, model: KernelLM) -> Tensor:
        """e^{i angle} of every position for q, the row's factor in it, and for k: (C, 2, 1, K/2) complex."""
        config = model.config
        turn_CK = torch.complex(model.cos, model.sin)
        factor_C1 = inverse_temperature(model.visible, model.beta.detach(), config.coupling_ref)[:, None]
        if config.metric != "fidelity":
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

    def turned(self, layer: Layer, qkv_N3D: Tensor, rotary_N21K: Tensor) -> None:
        """q and k in `qkv_N3D` become what the attention compares."""
        qk_N2HK = qkv_N3D[:, : 2 * self.width].view(-1, 2, self.heads, self.size)
        if layer.norm_2H1 is not None:
            square_N2H1 = torch.linalg.vecdot(qk_N2HK, qk_N2HK)[..., None]
            qk_N2HK.mul_(torch.addcmul(layer.norm_2H1[0], square_N2H1, layer.norm_2H1[1]).rsqrt_())
        torch.view_as_complex(qk_N2HK.unflatten(-1, (-1, 2))).mul_(rotary_N21K)

    def logits(self, x_ND: Tensor) -> Tensor:
        return self.head(self.normal(x_ND))
