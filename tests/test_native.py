"""The library of csrc/ against torch: its products, whole kernels, and machines on which it cannot be made."""

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Kernel
from constellation.decoding.built import FLAGS, SOURCES, sources
from constellation.decoding.compiled import available
from constellation.decoding.native import NativeSlots, Panels, Panels8, suits
from constellation.decoding.packed import Packed
from constellation.kernel.model import KernelLM

if not available():
    pytest.skip("no C compiler", allow_module_level=True)

SMALL = Kernel(vocab_size=300, width=48, layers=2, heads=3, hidden=100, context=40, coupling_ref=8)


@given(rows=st.integers(1, 15), inputs=st.integers(1, 70), outputs=st.integers(1, 150), biased=st.booleans())
@settings(deadline=None)
def test_a_product_is_the_one_of_torch_and_rows_do_not_depend_on_each_other(rows, inputs, outputs, biased):
    generator = torch.Generator().manual_seed(rows + 100 * inputs + 10_000 * outputs)
    x, w = (torch.randn(n, inputs, generator=generator) for n in (rows, outputs))
    bias = torch.randn(outputs, generator=generator) if biased else None
    made = Panels(w, bias)
    wanted = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
    torch.testing.assert_close(made(x).double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([made(x[i : i + 1]) for i in range(rows)]), made(x))
    if not biased:
        y = torch.randn(rows, outputs, generator=generator)
        torch.testing.assert_close(made.onto(x, y), y + made(x), rtol=1e-5, atol=1e-5)
    rounded = Panels8(w, bias)
    torch.testing.assert_close(rounded(x).double(), in_whole_steps(x, w, bias), rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.cat([rounded(x[i : i + 1]) for i in range(rows)]), rounded(x))


def in_whole_steps(x, w, bias=None):
    """What int8 is defined to be (product.c), in float64."""
    levels = torch.tensor(float(min(32767, (2**31 - 1) // (127 * (w.shape[1] + w.shape[1] % 2)))))
    most = x.abs().amax(1, keepdim=True)
    q = torch.where(most > 0, x * (levels / most), 0).round()
    step = w.abs().amax(1, keepdim=True) / 127
    product = q.double() @ (w / step).round().double().T * step.double().T * (most / levels).double()
    return product if bias is None else product + bias.double()


@pytest.mark.parametrize("inputs", [2, 384, 1025, 5000])
def test_sums_of_int8_are_exact_for_the_largest_numbers(inputs):
    """No pair and no sum leaves its room: 127 x 127 twice is more than 16 bits hold."""
    x, w = torch.ones(7, inputs), torch.ones(20, inputs)
    w[::2] *= -1
    assert torch.equal(Panels8(w)(x), in_whole_steps(x, w).float())


def test_a_number_that_is_not_finite_stays_visible_in_int8():
    x = torch.ones(3, 40)
    x[0, 3], x[1, 39] = float("nan"), float("inf")
    finite = Panels8(torch.randn(20, 40))(x).isfinite().all(1)
    assert finite.tolist() == [False, False, True]


@pytest.mark.parametrize("metric", ["fidelity", "dot"])
@pytest.mark.parametrize("coupling", ["off", "fixed", "learned"])
@pytest.mark.parametrize("look_back", [0, 1])
def test_a_kernel_of_any_kind_gives_the_logits_of_its_model(metric, coupling, look_back):
    model = KernelLM(dataclasses.replace(SMALL, metric=metric, coupling=coupling, look_back=look_back), seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator) if p.dim() == 1 else 0.0)
    tokens = torch.randint(300, (40,), generator=generator).tolist()
    slots = NativeSlots(Packed(model, product=Panels), 3)
    with torch.inference_mode():
        logits = slots.logits(slots.read(tokens, [300, *tokens[:-1]], list(range(40)), [2] * 40, []))
        torch.testing.assert_close(logits, model(torch.tensor([tokens]))[0], rtol=1e-4, atol=1e-4)


def test_heads_that_do_not_fill_vectors_are_left_to_torch():
    assert suits(KernelLM(SMALL))
    assert not suits(KernelLM(dataclasses.replace(SMALL, heads=2)))


FALLBACK = """
import os, tempfile
tempfile.tempdir = os.environ.get("TMPDIR")
from constellation.config import Kernel
from constellation.decoding.batch import Batch
from constellation.kernel.model import KernelLM
from constellation.decoding.compiled import Unavailable, library
print(Batch(KernelLM(Kernel(vocab_size=300, width=32, layers=1, heads=2, hidden=40, context=16))).stats()["native"])
try:
    library()
except Unavailable as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"CC": "no-such-compiler"}, "no C compiler"), ({"CC": "false"}, "cannot compile csrc"),
     ({"XDG_CACHE_HOME": "/dev/null", "TMPDIR": "/dev/null"}, "set XDG_CACHE_HOME")],
    ids=["none", "broken", "no cache"],
)  # fmt: skip
def test_without_the_library_torch_decodes_and_the_reason_is_known(changes, reason, tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **changes}
    done = subprocess.run([sys.executable, "-c", FALLBACK], env=environment, capture_output=True, text=True, check=True)
    native, error = done.stdout.splitlines()
    assert native == "False" and reason in error


def made(cache, **changes):
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), **changes}
    return subprocess.run([sys.executable, "-c", FALLBACK], env=environment, capture_output=True, text=True).stdout


def test_the_library_is_made_once_and_again_when_it_is_damaged(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", FALLBACK], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0] for process in both] == ["True\n"] * 2
    (library,) = (tmp_path / "constellation").glob("*.so")
    first, content = library.stat().st_mtime_ns, library.read_bytes()
    assert made(tmp_path) == "True\n" and library.stat().st_mtime_ns == first
    library.write_bytes(content[:-100])
    assert made(tmp_path) == "True\n" and len(library.read_bytes()) >= len(content) - 8


def test_nothing_is_loaded_that_others_could_have_written(tmp_path):
    """The folder of temporary files takes its place, or none."""
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    for folder in (cache, temporary):
        folder.mkdir()
    assert made(cache, TMPDIR=str(temporary)) == "True\n"
    (library,) = (cache / "constellation").glob("*.so")
    library.chmod(0o777)
    assert made(cache, TMPDIR=str(temporary)) == "True\n"
    assert len(list(temporary.glob("*/*.so"))) == 1
    (temporary / f"constellation-{os.getuid()}").rename(temporary / "elsewhere")
    (temporary / f"constellation-{os.getuid()}").symlink_to(temporary / "elsewhere")
    native, error = made(cache, TMPDIR=str(temporary)).splitlines()
    assert native == "False" and error.count("not ours alone") == 2


def test_each_processor_has_a_library_of_its_own(tmp_path):
    """A home folder may be shared between them."""
    assert made(tmp_path) == "True\n"
    if os.uname().machine == "x86_64":
        assert made(tmp_path, CONSTELLATION_NATIVE_MARCH="x86-64-v2") == "True\n"
        assert len(list((tmp_path / "constellation").glob("*.so"))) == 2


OWN = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
# processors, the compiler for them, what runs their programs, and the flag without which ours cannot
PROCESSORS = {
    "avx2": (["cc", "-march=haswell"], [], "avx2"),
    "avx512": (["cc", "-march=x86-64-v4"], [], "avx512bw"),
    "avx512-vnni": (["cc", "-march=sapphirerapids"], [], "amx_tile"),
    "neon": (["aarch64-linux-gnu-gcc", "-static"], ["qemu-aarch64-static"], ""),
    "clang": (["clang", OWN], [], ""),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_all_processors_with_fused_sums_compute_the_same_bits(name, tmp_path):
    compiler, runner, flag = PROCESSORS[name]
    if missing := [word for word in (compiler[0], *runner) if not shutil.which(word)]:
        pytest.skip(f"no {missing[0]}")
    if flag and flag not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {flag}")
    own, theirs = (
        subprocess.run([*run, build(words, tmp_path / at)], check=True, capture_output=True, text=True).stdout
        for at, words, run in (("own", ["cc", OWN], []), ("theirs", compiler, runner))
    )
    assert own == theirs


@pytest.mark.parametrize("name", ["avx512", "avx512-vnni"])
def test_it_compiles_for_processors_that_are_not_here(name, tmp_path):
    if platform.machine() != "x86_64" or not shutil.which("cc"):
        pytest.skip("no compiler for it")
    build(PROCESSORS[name][0], tmp_path / "made")


def build(compiler, path):
    inputs = [str(Path(__file__).parent / "same_bits.c"), *sources()]
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    words = [*compiler, *flags, "-Wall", "-Wextra", "-Werror", *(f"-I{folder}" for folder in SOURCES), *inputs, "-lm"]
    subprocess.run([*words, "-o", str(path)], check=True)
    return str(path)
