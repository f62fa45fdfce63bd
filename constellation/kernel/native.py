"""The forward pass of decoding on a CPU as one call of native.c, instead of a hundred operations of torch.

The C compiler of the machine (CC, or cc, gcc, clang) makes the library once for this source, compiler and processor,
in a second or two; it is kept in XDG_CACHE_HOME, ~/.cache without. Where there is no compiler kernels decode by
torch's operations, several times slower when small; `constellation doctor` and `/ready` tell.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from constellation.errors import ConfigError
from constellation.kernel.model import KernelLM
from constellation.kernel.packed import Packed, Product
from constellation.kernel.slots import Run, Slots

SOURCE = Path(__file__).with_suffix(".c")
PANEL, LANES = 64, 16  # of native.c
FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-lm")


class _Panels(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weights", "scale")]


class _Layer(ctypes.Structure):
    _fields_ = [*((name, _Panels) for name in ("qkv", "out", "gate_up", "down")), ("norm", ctypes.c_void_p)]


class _Kernel(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("width", "heads", "size", "hidden", "layers", "columns")),
        ("eps2", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embedding", "look_back", "rotary")),
        ("layer", ctypes.POINTER(_Layer)),
    ]


class Unavailable(ConfigError):
    """There is no library on this machine; the reason."""


@functools.cache
def library() -> ctypes.CDLL:
    """The library, compiled when this machine has none yet; Unavailable without a compiler."""
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")
    compiler = shlex.split(os.environ.get("CC", found))
    if not compiler or not shutil.which(compiler[0]):
        raise Unavailable("no C compiler (cc, gcc, clang) is on the PATH; small kernels decode several times slower")
    tuned = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    parts = (SOURCE.read_bytes(), version, _processor(), " ".join((tuned, *FLAGS)).encode())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "constellation"
    path = folder / f"native-{name}.so"
    if not path.exists():
        _compile([*compiler, tuned, str(SOURCE), *FLAGS], path)
    try:
        made = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded: {error}; remove it") from None
    for function in (made.forward, made.product, made.normal):
        function.restype = None
    return made


def _compile(words: Sequence[str], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / ".making").open("w") as lock, tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fcntl.flock(lock, fcntl.LOCK_EX)  # nine kernels start at once: one of them compiles
            if path.exists():
                return
            made = Path(folder) / "native.so"
            done = subprocess.run([*words, "-o", str(made)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unavailable(f"{words[0]} cannot compile {SOURCE.name}: {done.stderr.strip()[-300:]}")
            os.replace(made, path)
    except OSError as error:
        raise Unavailable(
            f"{path} cannot be made: {error}; set XDG_CACHE_HOME to a folder that can be written"
        ) from None


def _processor() -> bytes:
    """What distinguishes processors that a compiler tunes for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU part")
    return (
        "\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode() or platform.machine().encode()
    )


def available() -> bool:
    try:
        library()
    except Unavailable:
        return False
    return True


def suits(model: KernelLM) -> bool:
    """Whether native.c can compute such a kernel."""
    config, weight = model.config, model.embedding.weight
    vectors = config.width % LANES == 0 and (config.width // config.heads) % LANES == 0
    return vectors and weight.device.type == "cpu"


class Panels:
    """x W^T + bias by native.c; weights in panels of 64 outputs, input by input."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        self.outputs, self.inputs = weight_OI.shape
        self.padded = -(-self.outputs // PANEL) * PANEL
        self.bias_O = None if bias_O is None else F.pad(bias_O, (0, self.padded - self.outputs))
        self.weights, self.scale_O = self._stored(F.pad(weight_OI, (0, 0, 0, self.padded - self.outputs)))
        self.native = _Panels(_at(self.weights), None if self.scale_O is None else _at(self.scale_O))

    def _stored(self, weight_OI: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._cut(weight_OI), None

    def _cut(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.view(-1, PANEL, self.inputs).transpose(1, 2).contiguous()

    def __call__(self, x_NI: Tensor) -> Tensor:
        y_NO = x_NI.new_empty(len(x_NI), self.padded) if self.bias_O is None else self.bias_O.repeat(len(x_NI), 1)
        return self._add(x_NI, y_NO, self.bias_O is not None)[:, : self.outputs]

    def onto(self, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        sum_NO = y_NO.new_zeros(len(y_NO), self.padded)
        sum_NO[:, : self.outputs] = y_NO
        return self._add(x_NI, sum_NO, True)[:, : self.outputs]

    def _add(self, x_NI: Tensor, y_NO: Tensor, onto: bool) -> Tensor:
        x_NI = x_NI.contiguous()
        size = ctypes.c_long
        library().product(
            _at(x_NI), size(self.inputs), size(len(x_NI)), ctypes.byref(self.native), size(self.inputs),
            size(self.outputs), _at(y_NO), size(self.padded), int(onto),
        )  # fmt: skip
        return y_NO


class Panels8(Panels):
    """The same with weights w_oi = t_o round(w_oi / t_o), t_o = max_i |w_oi| / 127; x and the sums stay float."""

    def _stored(self, weight_OI: Tensor) -> tuple[Tensor, Tensor | None]:
        scale_O = weight_OI.abs().amax(1).clamp_(min=1e-10) / 127
        levels = self._cut((weight_OI / scale_O[:, None]).round_().to(torch.int8))
        return levels.unflatten(-1, (-1, LANES)).transpose(-1, -2).contiguous(), scale_O


class NativeSlots(Slots):
    """Slots whose forward pass is one call. `packed` has Panels for products."""

    def __init__(self, packed: Packed, count: int):
        super().__init__(packed, count)
        self._library, self._size = library(), ctypes.c_long
        self.stride = -(-packed.width // PANEL) * PANEL
        hidden = packed.hidden
        wide, gates = (-(-n // PANEL) * PANEL for n in (3 * packed.width, 2 * hidden))
        self._each, self._once = packed.width + wide + gates + -(-hidden // LANES) * LANES, self.columns + 2 * LANES
        self._scratch = torch.empty(0)
        layers = []
        self._kept: list[Tensor] = [torch.view_as_real(packed.rotary_C21K).contiguous()]
        for layer in packed.layers:
            norm = None
            if layer.norm_2H1 is not None:
                norm = torch.stack(layer.norm_2H1).contiguous()
                self._kept.append(norm)
            products = (layer.qkv, layer.out, layer.gated.gate_up, layer.down)
            layers.append(_Layer(*map(_panels, products), None if norm is None else _at(norm)))
        self._layers = (_Layer * len(layers))(*layers)
        self._held = (ctypes.c_void_p * len(layers))(*(_at(kv) for kv in self.held))
        look_back = packed.look_back_D
        self._kernel = _Kernel(
            packed.width, packed.heads, packed.size, hidden, len(layers), self.columns, float(packed.eps_root) ** 2,
            _at(packed.embedding_VD), None if look_back is None else _at(look_back), _at(self._kept[0]), self._layers,
        )  # fmt: skip

    def forward(self, rows_4N: Tensor, runs: Sequence[Run]) -> Tensor:
        rows_4N, count = rows_4N.contiguous(), rows_4N.shape[1]
        if (need := count * self._each + self._once) > len(self._scratch):
            self._scratch = torch.empty(need)
        x_ND = torch.empty(count, self.stride)
        self._library.forward(
            ctypes.byref(self._kernel), _at(rows_4N), self._size(count), self._held, _at(x_ND),
            self._size(self.stride), _at(self._scratch),
        )  # fmt: skip
        return x_ND[:, : self.packed.width]

    def logits(self, x_ND: Tensor) -> Tensor:
        mean_ND = torch.empty(len(x_ND), self.packed.width)
        size = self._size
        self._library.normal(
            _at(x_ND), size(x_ND.stride(0)), size(len(x_ND)), size(self.packed.width),
            ctypes.c_float(self._kernel.eps2), _at(mean_ND),
        )  # fmt: skip
        return self.packed.head(mean_ND)


def _panels(product: Product) -> _Panels:
    assert isinstance(product, Panels)
    return product.native


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())
