"""How fast is the decoder's product (csrc/product.c) beside torch's linear layer, shape by shape?

The decoder calls it from C, so the time of an empty call from Python is taken off ours; torch is called as its users
call it. Seconds are the processor's, of one thread; both take turns.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from constellation.decoding.native import Panels, Panels8

# rows, inputs, outputs: of the presets small and 23m, written and read
SHAPES = [
    (1, 128, 384), (8, 128, 384), (32, 128, 384), (32, 128, 1024), (32, 344, 128), (512, 128, 384),
    (1, 384, 1152), (16, 384, 1152), (16, 1024, 384), (1, 384, 32000), (16, 384, 32000), (256, 384, 1152),
]  # fmt: skip
SECONDS = 0.05
TARGETS = {"one row": 4.0, "more": 1.2}  # of the ratio in float32


@torch.inference_mode()
def compare(repeats: int) -> list[dict[str, Any]]:
    """A row a shape: GFLOP a CPU-second of both, and the median ratio of neighbouring repeats."""
    found = []
    for rows, inputs, outputs in SHAPES:
        x_NI, weight_OI = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        ours, ours8 = Panels(weight_OI), Panels8(weight_OI)
        calls: dict[str, Callable[[], Any]] = {
            "fp32": ours.prepared(x_NI), "int8": ours8.prepared(x_NI), "empty": ours.prepared(x_NI[:0]),
            "torch": functools.partial(F.linear, x_NI, weight_OI),
        }  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                seconds[name].append(_seconds(call))
        work = 2e-9 * rows * inputs * outputs
        empty = statistics.median(seconds["empty"])
        mine = {name: [s - empty for s in seconds[name]] for name in ("fp32", "int8")}
        ratios = {name: [b / a for a, b in zip(mine[name], seconds["torch"], strict=True)] for name in mine}
        ratio, target = statistics.median(ratios["fp32"]), TARGETS["one row" if rows == 1 else "more"]
        found.append({
            "rows": rows, "inputs": inputs, "outputs": outputs, "ratio": ratio, "target": target,
            "met": ratio >= target, "int8_ratio": statistics.median(ratios["int8"]),
            **{f"{name}_gflop": work / statistics.median(mine[name]) for name in mine},
            "torch_gflop": work / statistics.median(seconds["torch"]),
        })  # fmt: skip
    return found


def _seconds(call: Callable[[], Any]) -> float:
    """CPU-seconds of one call, of as many as fill SECONDS."""
    call()
    count, begin = 0, time.process_time()
    while (passed := time.process_time() - begin) < SECONDS:
        for _ in range(10):
            call()
        count += 10
    return passed / count


def report(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'rows':>5}{'inputs':>7}{'outputs':>8}  GFLOP a CPU-second: C, C int8, torch; fp32 / torch"]
    for row in rows:
        verdict = f">= {row['target']:g} {'met' if row['met'] else 'MISSED'}"
        lines.append(
            f"{row['rows']:>5}{row['inputs']:>7}{row['outputs']:>8}{row['fp32_gflop']:>14.1f}{row['int8_gflop']:>7.1f}"
            f"{row['torch_gflop']:>7.1f}{row['ratio']:>8.2f}  {verdict}"
        )
    return lines
