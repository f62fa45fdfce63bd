"""The forward pass of decoding on a CPU as one call of C (csrc/), instead of a hundred operations of torch.

compiled.py makes the library. Where it cannot be had kernels decode by torch's operations, several times slower when
small; `constellation doctor` and `/ready` tell.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from constellation.decoding.compiled import library
from constellation.decoding.packed import Packed, Product
from constellation.decoding.slots import Run, Slots
from constellation.kernel.model import KernelLM

WIDE = 16  # of vector.h


class _Panels(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Panels) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm", "concentration")),
    ]


class _Kernel(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("width", "heads", "groups", "size", "hidden", "layers", "columns")),
        ("eps2", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embedding", "look_back", "rotary", "coupling")),
        ("layer", ctypes.POINTER(_Layer)),
        ("head", _Panels),
    ]


def suits(model: KernelLM) -> bool:
    """Whether the library can compute such a kernel."""
    config, weight = model.config, model.embedding.weight
    vectors = config.width % WIDE == 0 and config.size % WIDE == 0
    return vectors and weight.device.type == "cpu"


class Panels:
    """x W^T + bias by product.c; weights in panels of 16 outputs, input by input."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        self.outputs, self.inputs = weight_OI.shape
        self.padded = _whole(self.outputs)
        self._kept = self._stored(weight_OI), None if bias_O is None else _padded(bias_O, self.padded)
        (weights, scale_O), bias_O = self._kept
        self.native = _Panels(_at(weights), _at(scale_O), _at(bias_O), self.inputs, self.outputs)

    def _stored(self, weight_OI: Tensor) -> tuple[Tensor, Tensor | None]:
        return _padded(weight_OI, self.padded).view(-1, WIDE, self.inputs).transpose(1, 2).contiguous(), None

    def __call__(self, x_NI: Tensor) -> Tensor:
        return self._add(x_NI, x_NI.new_empty(len(x_NI), self.padded), False)

    def onto(self, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        sum_NO = y_NO.new_zeros(len(y_NO), self.padded)
        sum_NO[:, : self.outputs] = y_NO
        return self._add(x_NI, sum_NO, True)

    def _add(self, x_NI: Tensor, y_NO: Tensor, onto: bool) -> Tensor:
        self.prepared(x_NI.contiguous(), y_NO, onto)()
        return y_NO[:, : self.outputs]

    def prepared(self, x_NI: Tensor, y_NO: Tensor | None = None, onto: bool = False) -> Callable[[], Any]:
        """The call that writes x W^T to `y_NO`."""
        y_NO, size = x_NI.new_empty(len(x_NI), self.padded) if y_NO is None else y_NO, ctypes.c_int64
        scratch = torch.empty(library().product_scratch(size(self.inputs)), dtype=torch.uint8)
        words = (
            _at(x_NI), size(self.inputs), size(len(x_NI)), ctypes.byref(self.native), _at(y_NO), size(self.padded),
            int(onto), _at(scratch),
        )  # fmt: skip
        kept = x_NI, y_NO, scratch  # alive as long as the call is
        return lambda: library().product(*words) if kept else None


class Panels8(Panels):
    """The same with weights w_oi = t_o q_oi, q in -127..127; pairs of inputs of an output lie together."""

    def _stored(self, weight_OI: Tensor) -> tuple[Tensor, Tensor | None]:
        scale_O = weight_OI.abs().amax(1).clamp_(min=1e-30) / 127
        q_OI = _padded((weight_OI / scale_O[:, None]).round_().to(torch.int8), self.padded)
        q_OI = torch.nn.functional.pad(q_OI, (0, self.inputs % 2))
        pairs = q_OI.view(self.padded // WIDE, WIDE, -1, 2).transpose(1, 2).contiguous()
        return pairs, _padded(scale_O, self.padded)


class NativeSlots(Slots):
    """Slots whose forward pass is one call. `packed` has Panels for products. Keys and values lie as in forward.c."""

    def __init__(self, packed: Packed, count: int):
        super().__init__(packed, count)
        self._library, self._size = library(), ctypes.c_int64
        self._kept: list[Tensor] = [packed.rotary_halves()]
        layers = []
        for layer in packed.layers:
            norm = None if layer.norm_A1 is None else torch.stack(layer.norm_A1).contiguous()
            if norm is not None:
                self._kept.append(norm)
            products = (layer.qkv, layer.out, layer.gated.gate_up, layer.down)
            layers.append(_Layer(*map(_panels, products), _at(norm), _at(layer.concentration_H)))
        self._layers = (_Layer * len(layers))(*layers)
        self._held = (ctypes.c_void_p * len(layers))(*(_at(kv) for kv in self.held))
        self._kernel = _Kernel(
            packed.width, packed.heads, packed.groups, packed.size, packed.hidden, len(layers), self.columns,
            float(packed.eps_root) ** 2, _at(packed.embedding_VD), _at(packed.look_back_D), _at(self._kept[0]),
            _at(packed.coupling_C), self._layers, _panels(packed.head),
        )  # fmt: skip
        self._scratch = torch.empty(0)

    def _allocate(self) -> tuple[Tensor, ...]:
        packed = self.packed
        shape = packed.layers_count, self.count, 2, packed.groups, self.columns * packed.size
        return torch.from_numpy(np.zeros(shape, np.float32)).unbind(0)

    def copy(self, source: int, target: int, length: int) -> None:
        size = self.packed.size
        for kv in self.held:
            kv[target, 0, :, : _whole(length) * size] = kv[source, 0, :, : _whole(length) * size]
            kv[target, 1, :, : length * size] = kv[source, 1, :, : length * size]

    def forward(self, rows_4N: Tensor, runs: Sequence[Run]) -> Tensor:
        rows_4N, count = rows_4N.contiguous(), rows_4N.shape[1]
        x_ND = torch.empty(count, self.packed.width)
        self._library.forward(
            ctypes.byref(self._kernel), _at(rows_4N), self._size(count), self._held, _at(x_ND), self._room(count)
        )
        return x_ND

    def logits(self, x_ND: Tensor) -> Tensor:
        x_ND, vocabulary = x_ND.contiguous(), self.packed.vocabulary
        y_NV = torch.empty(len(x_ND), _whole(vocabulary))
        self._library.logits(
            ctypes.byref(self._kernel), _at(x_ND), self._size(len(x_ND)), _at(y_NV), self._room(len(x_ND))
        )
        return y_NV[:, :vocabulary]

    def _room(self, rows: int) -> ctypes.c_void_p:
        need = self._library.forward_scratch(ctypes.byref(self._kernel), self._size(rows))
        if need > len(self._scratch):
            self._scratch = torch.empty(need)
        return _at(self._scratch)


def draw(logits_NV: Tensor, records_N: NDArray[Any], taken: Sequence[int]) -> list[int]:
    """`sample` by draw.c, of logits after penalties and RECORDs; -1 where they are not finite."""
    count, vocabulary = logits_NV.shape
    size = ctypes.c_int64
    tokens, drawn = np.empty(count, np.int64), np.array(taken, np.int64)
    scratch = np.empty(library().draw_scratch(size(vocabulary)), np.uint8)
    library().draw(
        _at(logits_NV), size(logits_NV.stride(0)), size(count), size(vocabulary), *map(_of, (records_N, drawn,
        tokens, scratch)),
    )  # fmt: skip
    chosen: list[int] = tokens.tolist()
    return chosen


def _of(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _whole(outputs: int) -> int:
    return -(-outputs // WIDE) * WIDE


def _padded(x: Tensor, length: int) -> Tensor:
    """Zeros behind the first dimension."""
    return torch.cat((x, x.new_zeros(length - len(x), *x.shape[1:])))


def _panels(product: Product) -> _Panels:
    assert isinstance(product, Panels)
    return product.native


def _at(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())
