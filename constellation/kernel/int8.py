"""Products in int8: each row of x and each row of W its own scale, sums exact in int32.

    y_no = s_n t_o sum_i round(x_ni / s_n) round(w_oi / t_o) + b_o      s_n = max_i |x_ni| / 127, t_o alike

A row's result depends on that row alone, to the bit, as sums of integers have no order. Rounding errors are at most
half a scale for each factor; what they do to greedy text `constellation bench decode` measures. The instructions
(VNNI) multiply unsigned by signed, so x is shifted by 128 and oneDNN takes 128 times the sum of the weights off again.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127
SHIFT = 128
_SMALLEST = 1e-30  # a row of zeros has no scale


def quantise(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """(levels shifted by 128, uint8 (N, I); scale (N, 1)): x is close to (levels - 128) scale."""
    scale_N1 = x_NI.abs().amax(-1, keepdim=True).clamp_(min=_SMALLEST).mul_(1 / LEVELS)
    # the conversion cuts off, so the half makes it round; the shift keeps it above 0
    return (x_NI / scale_N1).add_(SHIFT + 0.5).to(torch.uint8), scale_N1


class Product:
    """x W^T + b with W in int8 (packed.py says what a product is)."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        levels, scale_O1 = quantise(weight_OI)
        signed = (levels.to(torch.int16) - SHIFT).to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(signed, None)
        self.scale_O = scale_O1[:, 0].contiguous()
        self.zero_O = torch.zeros(len(signed), dtype=torch.int64)
        self.bias_O = bias_O

    def __call__(self, x_NI: Tensor) -> Tensor:
        product, scale_N1 = self._unscaled(x_NI)
        return product.mul_(scale_N1) if self.bias_O is None else torch.addcmul(self.bias_O, product, scale_N1)

    def onto(self, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        return torch.addcmul(y_NO, *self._unscaled(x_NI))

    def _unscaled(self, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        levels, scale_N1 = quantise(x_NI)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, SHIFT, self.weight, self.scale_O, self.zero_O, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product, scale_N1
