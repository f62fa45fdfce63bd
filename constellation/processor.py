"""What the processor multiplies fast: asked here alone, and written down by whoever acts on the answer.

A processor without bf16 instructions still computes in bf16, many times slower than in float32. So precision=auto
means bf16 where there are instructions for it, else fp32. The answer belongs into a run's configuration and an
optimizer's state: the bits of a run must not change with the machine that goes on with it.
"""

from __future__ import annotations

import ctypes
import functools
import os

KEPT_BYTES = 1 << 28  # of freed memory at the heap's end that a process that trains does not hand back
LARGEST_KEPT_BYTES = 1 << 25  # larger pieces come from the kernel and go back to it; more is refused by glibc
BF16_ISAS = ("BF16", "FP16", "AMX", "AVX10", "DEFAULT")  # in ONEDNN_MAX_CPU_ISA; FP16 and later contain BF16


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def fast_bf16(device: str) -> bool:
    """Whether a device of this type ("cpu", "cuda") has instructions for products of bf16.

    CPUs: AMX or AVX512-BF16, which torch and oneDNN have not been told to leave alone.
    """
    import torch

    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    probes = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    return (
        device == "cpu"
        and any(probe() for probe in probes if probe)
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and any(isa in allowed for isa in BF16_ISAS)
    )


def precision(device: str) -> str:
    """bf16 or fp32, whichever the device multiplies faster."""
    return "bf16" if fast_bf16(device) else "fp32"


def instructions() -> str:
    """The instruction set that torch runs on, with those for bf16 where it has them: a row's label in a bench."""
    import torch

    return torch.backends.cpu.get_cpu_capability() + (" with bf16" if fast_bf16("cpu") else ", no bf16")


def keep_memory() -> None:
    """Freed memory stays with this process, where the C library can be asked (glibc's mallopt); from now on.

    A training step asks for what the step before has freed. Handed back in between, every page of it is zeroed anew
    by the kernel: a tenth of a small model's step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-1, KEPT_BYTES)  # M_TRIM_THRESHOLD
        mallopt(-3, LARGEST_KEPT_BYTES)  # M_MMAP_THRESHOLD
