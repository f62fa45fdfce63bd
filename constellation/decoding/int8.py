"""Products in int8 by torch's operations: each row of x and each row of W its own scale, sums of whole numbers.

    y_no = s_n t_o sum_i round(x_ni / s_n) round(w_oi / t_o) + b_o      s_n = max_i |x_ni| / 127, t_o alike

The whole numbers are multiplied as float32, whose sums of 1024 products of two numbers up to 127 are exact in any
order: on every processor, and a row's result depends on that row alone, to the bit. (oneDNN's product of unsigned by
signed bytes, faster where there is VNNI, saturates in 16 bits where there is none.) Rounding errors are at most half a
scale for each factor; what they do to greedy text `constellation bench decode` measures. Where there is the library of
native.py its products take the place of these: bytes in memory too, and x in up to 2^16 steps instead of 2^8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 127
EXACT = 1024  # inputs: 127^2 x 1024 < 2^24
_SMALLEST = 1e-30  # a row of zeros has no scale


def quantise(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers -127..127 as float32 (N, I); scale (N, 1)): x is close to their product."""
    scale_N1 = x_NI.abs().amax(-1, keepdim=True).clamp_(min=_SMALLEST).mul_(1 / LEVELS)
    return (x_NI / scale_N1).round_(), scale_N1


class Int8Product:
    """x W^T + b with W in int8 (packed.py says what a product is)."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        levels_OI, scale_O1 = quantise(weight_OI)
        self.parts = [part.contiguous() for part in levels_OI.split(EXACT, dim=1)]
        self.scale_O, self.bias_O = scale_O1[:, 0].contiguous(), bias_O

    def __call__(self, x_NI: Tensor) -> Tensor:
        product, scale_N1 = self._unscaled(x_NI)
        return product.mul_(scale_N1) if self.bias_O is None else torch.addcmul(self.bias_O, product, scale_N1)

    def onto(self, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        return torch.addcmul(y_NO, *self._unscaled(x_NI))

    def _unscaled(self, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        levels_NI, scale_N1 = quantise(x_NI)
        products = [F.linear(x, w) for x, w in zip(levels_NI.split(EXACT, dim=1), self.parts, strict=True)]
        return sum(products[1:], products[0]).mul(self.scale_O), scale_N1
