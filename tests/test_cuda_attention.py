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
from tests.cuda_attention import SOURCE, B, Call, F, H, backward, forward, module
from tests.emulator import Module, Stats, Violation, library, nvcc

pytestmark = [
    pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not nvcc.available(), reason="needs nvcc"),
]
ARCHS = ["sm_80", "sm_90a"]


@pytest.fixture(scope="module")
def kernels() -> Module:
    return module("sm_80")


def operands(
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int, int, int],
    mask: str | tuple[int, ...] = "",
    causal: bool = False,
    gap: int = 0,
) -> Call:
    """Of batch, heads, heads of keys, queries, keys, head size, value size; rows `gap` apart."""
    batch, heads, kv_heads, queries, keys, size, value_size = sizes
    torch.manual_seed(0)

    def make(heads: int, time: int, size: int) -> Tensor:
        t = torch.randn(batch, time, heads, size + gap).to(dtype)
        return t[..., :size].transpose(1, 2)

    tensor = None
    if mask == "boolean":
        tensor = torch.randint(4, (batch, 1, queries, keys)) > 0
        tensor[0, 0, queries // 2] = False  # a query that sees nothing
    elif mask == "same":
        tensor = torch.randn(1, heads, queries, keys).to(dtype)
    elif mask:
        tensor = torch.randn(*mask)
    q, k, v = (heads, queries, size), (kv_heads, keys, size), (kv_heads, keys, value_size)
    return Call(make(*q), make(*k), make(*v), tensor, causal)


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
    "half": (H, (1, 2, 1, 70, 90, 128, 96), "", True),
    "float": (F, (1, 2, 1, 70, 40, 64, 48), "", True),
    "float additive": (F, (1, 2, 2, 20, 40, 30, 7), (1, 2, 20, 40), False),
}


LANES = [("sm_80", name) for name in CASES]
LANES += [("sm_90a", name) for name in ("causal", "grouped", "boolean", "odd sizes")]


@pytest.mark.parametrize(("arch", "name"), LANES)
def test_attention_kernels_are_as_good_as_torch(arch, name) -> None:
    dtype, sizes, mask, causal = CASES[name]
    options = {"order": "random", "seed": 1, "perturb": dtype != F}
    check(module(arch), operands(dtype, sizes, mask, causal), **options)


@pytest.mark.parametrize("gap", [8, 3])
def test_attention_kernels_read_any_strides(kernels, gap) -> None:
    check(kernels, operands(B, (2, 2, 2, 20, 24, 16, 16), "", False, gap), order="greedy")


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


def test_attention_kernels_give_the_same_bits_in_every_schedule(kernels) -> None:
    call = operands(B, (1, 2, 1, 70, 70, 16, 16), "", True)
    runs = []
    for order in ("greedy", "random"):
        out, lse, _ = forward(kernels, call, order=order, seed=5)
        grads, _ = backward(kernels, call, call.q, out, lse, order=order, seed=5)
        runs.append([out, lse, *grads.values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def more(short: Stats, long: Stats) -> dict[str, int]:
    """What the longer run counts beyond the shorter: the main loop alone."""
    a, b = dataclasses.asdict(short), dataclasses.asdict(long)
    return {name: b[name] - a[name] for name in b if name != "kernel"}


@pytest.mark.parametrize(("dtype", "size"), [(B, 64), (H, 128), (B, 256)], ids=str)
def test_attention_main_loops_are_lean(kernels, dtype, size) -> None:
    """Few integer instructions for a product, no bank conflicts, no product that is not needed."""
    runs = []
    for keys in (64, 192):
        call = operands(dtype, (1, 1, 1, 128, keys, size, size))
        out, lse, counted = forward(kernels, call)
        _, counted_backward = backward(kernels, call, out, out, lse)
        runs.append((counted, counted_backward))
    for short, long, products in zip(*runs, ((2, 2), (7, 8)), strict=True):
        loop = more(short, long)
        useful = 2 * 128 * 128 * size
        assert loop["mma_flops"] == products[size > 128] * useful
        assert (
            loop["integer_instructions"] / (loop["mma_flops"] / 4096) <= 5
        )  # with edges of blocks
        assert long.bank_factor <= 1.05


def test_attention_skips_what_no_query_sees(kernels) -> None:
    """Each warp leaves out the keys after its last query."""
    call = operands(B, (1, 1, 1, 256, 256, 64, 64), "", True)
    _, _, counted = forward(kernels, call)
    tiles = sum(-(-(32 * warp + 32) // 64) for warp in range(8))  # of 64 keys, for 32 queries each
    assert counted.mma_flops == 2 * tiles * 32 * 64 * 128
    assert counted.sector_efficiency == 1


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_kernels_spill_nothing(arch, tmp_path) -> None:
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("needs ptxas")
    text = tmp_path / "attention.ptx"
    text.write_text(nvcc.compile_ptx(SOURCE, arch))
    command = [ptxas, "-v", f"-arch={arch}", text, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    assert spills and not any(map(int, spills))


def only_forward(kernels: Module, causal: bool) -> None:
    """Without the backward kernels, which forward's defects are compiled without."""
    call = operands(B, (1, 1, 1, 70, 150, 16, 16), "", causal)
    out, _, _ = forward(kernels, call)
    truth, theirs = call.reference(Tensor.double)[0], call.reference(lambda t: t)[0]
    assert_as_good_as_torch("out", out, theirs, truth)


def only_backward(kernels: Module) -> None:
    """Gradients from an output and sums that torch has made."""
    call = operands(B, (1, 2, 1, 70, 150, 16, 16))
    truth, lse = call.reference(Tensor.double)
    torch.manual_seed(1)
    grad_out = torch.randn(truth.shape).to(B)
    grads, _ = backward(kernels, call, grad_out, truth.to(B).contiguous(), lse.float())
    leaves = [t.double().requires_grad_() for t in (call.q, call.k, call.v)]
    wide, _ = Call(*leaves).reference(lambda t: t)
    for name, exact in zip(
        "qkv", torch.autograd.grad(wide, leaves, grad_out.double()), strict=True
    ):
        error = (grads[name] - exact).abs().max()
        assert error <= 0.02 * exact.abs().max(), name


# What each defect is: kernels/cuda names it where it stands.
DEFECTS = {
    141: lambda k: only_forward(k, True),
    142: lambda k: only_forward(k, False),
    143: lambda k: only_forward(k, False),
    144: lambda k: only_forward(k, False),
    145: only_backward,
    146: only_backward,
    147: only_backward,
    148: only_backward,
    149: only_backward,
}


@pytest.mark.parametrize("mutant", DEFECTS)
def test_attention_defect_is_caught(mutant) -> None:
    with pytest.raises((AssertionError, Violation)):
        DEFECTS[mutant](module("sm_80", mutant))


def test_attention_without_defect_passes_what_catches_them() -> None:
    kernels = module("sm_80")
    for check_one in DEFECTS.values():
        check_one(kernels)
