"""The CUDA kernels of attention, kernel by kernel on the emulator, against float64."""

import dataclasses
import math
import re
import shutil
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfast.tolerance import assert_as_good_as_torch
from tests.cuda_attention import SOURCE, B, Call, F, H, backward, forward, module, operands
from tests.emulator import Module, Stats, library, nvcc

pytestmark = [
    pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not nvcc.available(), reason="needs nvcc"),
]
ARCHS = ["sm_80", "sm_90", "sm_90a"]  # of the second, GPUs of 9.0 have to take mma.sync


@pytest.fixture(scope="module")
def kernels() -> Module:
    return module("sm_80")


def check(kernels: Module, call: Call, **options: Any) -> tuple[Stats, Stats]:
    """Output, log-sum-exp and every gradient are as good as torch's; the counters of both ways."""
    out, lse, counted = forward(kernels, call, **options)
    torch.manual_seed(1)
    grad_out = torch.randn(out.shape).to(out.dtype)
    grads, counted_backward = backward(kernels, call, grad_out, out, lse, **options)

    def results(cast: Any) -> dict[str, Tensor]:
        leaves = {n: cast(getattr(call, n)).clone().requires_grad_() for n in "qkv"}
        mask = call.mask
        if mask is not None and mask.is_floating_point():
            mask = leaves["mask"] = cast(mask).clone().requires_grad_()
        plain = Call(leaves["q"], leaves["k"], leaves["v"], mask, call.causal)
        out, lse = plain.reference(lambda t: t)
        named = zip(
            leaves, torch.autograd.grad(out, list(leaves.values()), cast(grad_out)), strict=True
        )
        return {"out": out.detach(), "lse": lse.detach(), **dict(named)}

    truth, theirs = results(Tensor.double), results(lambda t: t)
    for name, ours in ({"out": out, "lse": lse} | grads).items():
        if name in truth:
            other = theirs[name].to(ours.dtype)
            assert_as_good_as_torch(f"{call.q.dtype} {name}", ours, other, truth[name])
    return counted, counted_backward


# Sizes: several tiles each way with short ones at the ends; fewer queries than a warp has; longer
# queries than keys and the reverse; head sizes that are no multiple of 8 and of another value size.
CASES = {
    "causal": (B, (1, 2, 2, 150, 150, 64, 64), "", True),
    "grouped": (B, (2, 4, 2, 70, 40, 16, 16), "", True),
    "boolean": (B, (2, 2, 2, 33, 130, 24, 24), "boolean", False),
    "one query": (B, (2, 2, 1, 1, 70, 32, 32), "", False),
    "odd sizes": (B, (1, 1, 1, 9, 70, 10, 33), "", False),
    "long queries": (B, (1, 1, 1, 140, 33, 40, 64), "", True),
    "wide": (B, (1, 1, 1, 40, 70, 256, 200), "", True),
    "additive": (B, (1, 2, 2, 70, 33, 40, 40), "same", False),
    "between": (H, (1, 2, 1, 70, 140, 90, 96), "", True),
    "wide between": (B, (1, 1, 1, 70, 100, 192, 150), "", True),
    "half": (H, (1, 2, 1, 140, 170, 128, 96), "", True),
    "half boolean": (H, (1, 1, 1, 70, 70, 80, 80), "boolean", True),
    "wide boolean": (B, (1, 2, 1, 70, 100, 192, 256), "boolean", False),
    "float": (F, (1, 2, 1, 70, 40, 64, 48), "", True),
    "float wide": (F, (1, 2, 1, 20, 40, 200, 256), "", True),
    # 256 features in one chain of sums would leave 1.3 times the error that dK may have
    "float long": (F, (1, 2, 2, 3, 520, 256, 256), "", False),
    "float additive": (F, (1, 2, 2, 20, 40, 30, 7), (1, 2, 20, 40), False),
}


LANES = [("sm_80", name) for name in CASES]
LANES += [("sm_90a", name) for name, case in CASES.items() if case[0] != F]
LANES += [("sm_90", name) for name in ("causal", "boolean", "wide")]


@pytest.mark.parametrize(("arch", "name"), LANES)
def test_attention_kernels_are_as_good_as_torch(arch, name) -> None:
    dtype, sizes, mask, causal = CASES[name]
    check(module(arch), operands(dtype, sizes, mask, causal), order="random", seed=1, perturb=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("gap", "size"), [(8, 16), (3, 16), (3, 150), (2, 192)])
def test_attention_kernels_read_any_strides(arch, gap, size) -> None:
    sizes = (2, 2, 2, 20, 70, size, size) if size == 16 else (1, 2, 1, 70, 70, size, size)
    check(module(arch), operands(B, sizes, "", False, gap), order="greedy")


@pytest.mark.parametrize(
    "shape", [(2, 2, 1, 40), (2, 1, 70, 40), (1, 2, 70, 1), (2, 1, 1, 1)], ids=str
)
def test_attention_kernels_sum_the_gradient_of_a_mask_that_broadcasts(kernels, shape) -> None:
    call = operands(F, (2, 2, 1, 70, 40, 16, 16), shape)
    out, lse, _ = forward(kernels, call)
    whole = operands(F, (2, 2, 1, 70, 40, 16, 16), shape)
    whole.mask = call.mask.expand(2, 2, 70, 40).contiguous()
    torch.manual_seed(1)
    grad_out = torch.randn(out.shape)
    grads, _ = backward(kernels, call, grad_out, out, lse)
    each, _ = backward(kernels, whole, grad_out, out, lse)
    dims = [d for d, n in enumerate(shape) if n != whole.mask.shape[d]]
    wanted = each["mask"].double().sum(dims, keepdim=True)
    scale = each["mask"].abs().sum(dims, keepdim=True)
    assert ((grads["mask"] - wanted).abs() <= 1e-6 * scale + 1e-6).all()


def test_attention_kernels_leave_rows_that_see_nothing_at_0(kernels) -> None:
    call = operands(B, (1, 1, 1, 9, 20, 16, 16), "boolean")
    out, lse, _ = forward(kernels, call)
    assert not out[0, 0, 4].any() and math.isinf(lse[0, 0, 4]) and lse[0, 0, 4] > 0
    grads, _ = backward(kernels, call, torch.ones_like(out), out, lse)
    assert not grads["q"][0, 0, 4].any() and all(g.isfinite().all() for g in grads.values())


def test_attention_kernels_leave_no_gradient_where_one_key_is_seen(kernels) -> None:
    """Its probability is 1 whatever its score: float32 has nothing left of delta - dP."""
    call = operands(F, (1, 1, 1, 5, 5, 250, 250), "", True)
    out, lse, _ = forward(kernels, call)
    torch.manual_seed(1)
    grads, _ = backward(kernels, call, torch.randn(out.shape), out, lse)
    assert not grads["q"][0, 0, 0].any()


@pytest.mark.parametrize(("arch", "size"), [("sm_80", 16), ("sm_90a", 16), ("sm_90a", 256)])
def test_attention_kernels_give_the_same_bits_in_every_schedule(arch, size) -> None:
    call = operands(B, (1, 2, 1, 70, 70, size, size), "", True)
    runs = []
    for order in ("greedy", "random"):
        out, lse, _ = forward(module(arch), call, order=order, seed=5)
        grads, _ = backward(module(arch), call, call.q, out, lse, order=order, seed=5)
        runs.append([out, lse, *grads.values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def more(short: Stats, long: Stats) -> dict[str, int]:
    """What the longer run counts beyond the shorter: the main loop alone."""
    a, b = dataclasses.asdict(short), dataclasses.asdict(long)
    return {name: b[name] - a[name] for name in b if name != "kernel"}


LOOPS = [
    (arch, dtype, size)
    for arch in ("sm_80", "sm_90a")
    for dtype, size in ((B, 64), (H, 80), (H, 96), (H, 128), (B, 192), (B, 256))
    if (arch, size) != ("sm_80", 192)  # which is a head of 256 that skips products
]


@pytest.mark.parametrize(("arch", "dtype", "size"), LOOPS, ids=str)
def test_attention_main_loops_are_lean(arch, dtype, size) -> None:
    """Few integer instructions for a product, no bank conflicts; two products and seven, of nothing
    but the head's own features."""
    runs = []
    for keys in (64, 192):
        call = operands(dtype, (1, 1, 1, 128, keys, size, size))
        out, lse, counted = forward(module(arch), call)
        _, counted_backward = backward(module(arch), call, out, out, lse)
        runs.append((counted, counted_backward))
    for short, long, products in zip(*runs, (2, 7), strict=True):
        if arch == "sm_90a" and size <= 128 and products == 7:
            continue  # their blocks own 128 keys, of which 64 are less than one
        loop = more(short, long)
        assert loop["mma_flops"] == products * 2 * 128 * 128 * size
        integers = loop["integer_instructions"] / (loop["mma_flops"] / 4096)
        # with edges of blocks; sm_80 copies heads of 80 features as those of 128, beside 5/8 of the
        # products: chunks of 16 bytes are XORed with eight lines, which takes lines of a power of 2
        assert integers <= (5.1 if (arch, size) == ("sm_80", 80) else 5)
        assert long.bank_factor <= 1.05


@pytest.mark.parametrize(("arch", "rows", "step"), [("sm_80", 32, 64), ("sm_90a", 64, 64)])
def test_attention_skips_what_no_query_sees(arch, rows, step) -> None:
    """Each warp, or warpgroup, leaves out the keys after its last query."""
    call = operands(B, (1, 1, 1, 256, 256, 64, 64), "", True)
    out, lse, counted = forward(module(arch), call)
    tiles = sum(-(-(rows * at + rows) // step) for at in range(256 // rows))
    assert counted.mma_flops == 2 * tiles * rows * step * 128
    assert counted.sector_efficiency == 1
    if arch == "sm_90a":
        _, counted = backward(module(arch), call, out, out, lse)
        assert counted.mma_flops == 7 * (4 * 5 // 2) * 64 * 64 * 128


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_kernels_compile_to_lean_loops(arch, tmp_path) -> None:
    """Without spills; ptxas waits after every wgmma whose registers it cannot follow, and says so.

    The main loops have few integer instructions for each product of 16 x 8 x 16 of a warp.
    """
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("needs ptxas")
    text = tmp_path / "attention.ptx"
    text.write_text(nvcc.compile_ptx(SOURCE, arch))
    command = [ptxas, "-v", f"-arch={arch}", text, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    assert spills and not any(map(int, spills))
    assert "wgmma" not in done.stderr and "warpgroup" not in done.stderr
    sass = pytest.importorskip("bench.sass", reason="needs triton's nvdisasm")
    for name, code in sass.functions((tmp_path / "out").read_bytes()).items():
        loop = code.main_loop
        products = sass.products(loop)
        if "attention_backward_mask" in name or "kernelIf" in name:
            continue  # all of a mask is at an edge; products by FMA
        used = {i.name.split(".")[0] for i in loop if i.family == "tensor"}
        assert used == {"HGMMA" if arch == "sm_90a" else "HMMA"}, name
        if "backward" in name:  # an FMA would subtract lse, which is rounded, from what is not
            assert not any(i.name.startswith("FFMA") for i in loop), name
        integers = sum(i.family == "integer" for i in loop)
        # no GPU should have to take the smaller tiles of sm_90
        most = 8 if arch == "sm_90" else 4
        assert integers / products <= most, (name, integers, products)
