"""Defects compiled into the CUDA kernels of attention (-DPYFAST_MUTANT=n): each must be caught."""

import ctypes
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyfast.tolerance import assert_as_good_as_torch
from tests.cuda_attention import (
    B,
    Call,
    Forward,
    Int,
    P,
    backward,
    empty_heads,
    forward,
    module,
    operands,
)
from tests.emulator import Module, Violation, library, nvcc

pytestmark = [
    pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not nvcc.available(), reason="needs nvcc"),
]
DECODE = Path(__file__).parent / "cuda/attention_decode.cu"


def only_forward(kernels: Module, causal: bool = False, size: int = 16) -> None:
    """Without the backward kernels, which forward's defects are compiled without."""
    call = operands(B, (1, 1, 1, 70, 150, size, size), "", causal)
    out, _, _ = forward(kernels, call)
    truth, theirs = call.reference(Tensor.double)[0], call.reference(lambda t: t)[0]
    assert_as_good_as_torch("out", out, theirs, truth)


def only_backward(kernels: Module, size: int = 16) -> None:
    """Gradients from an output and sums that torch has made."""
    call = operands(B, (1, 2, 1, 70, 150, size, size))
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
CAUSAL, FORWARD, BACKWARD = partial(only_forward, causal=True), only_forward, only_backward
GROUPS, PAIR = partial(only_forward, size=128), partial(only_backward, size=256)
DEFECTS = {("sm_80", 141): CAUSAL}
DEFECTS |= {("sm_80", number): FORWARD for number in (142, 143, 144)}
DEFECTS |= {("sm_80", number): BACKWARD for number in range(145, 150)}
DEFECTS |= {("sm_90a", number): GROUPS for number in range(150, 158)}
DEFECTS |= {("sm_90a", number): BACKWARD for number in range(160, 168)}
DEFECTS |= {("sm_90a", 168): PAIR}


@pytest.mark.parametrize(("arch", "mutant"), DEFECTS)
def test_attention_defect_is_caught(arch, mutant) -> None:
    with pytest.raises((AssertionError, Violation)):
        DEFECTS[arch, mutant](module(arch, mutant))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_attention_without_defect_passes_what_catches_them(arch) -> None:
    checks = {repr(check): check for (where, _), check in DEFECTS.items() if where == arch}
    if arch == "sm_90a":
        checks["bfloat16"] = partial(only_forward, size=64)
        del checks[repr(GROUPS)]  # compiled with defects only
    for check_one in checks.values():
        check_one(module(arch))


class Decode(ctypes.Structure):
    _fields_ = [("forward", Forward), ("parts_count", Int), ("part_keys", Int), ("stride", Int)]
    _fields_ += [("parts", P), ("sums", P)]


def decode(kernels: Module, call: Call, part_keys: int) -> tuple[Tensor, Tensor]:
    """(out, lse) by the kernels that split keys, of bfloat16 heads of up to 64 features."""
    batch, count, queries, _ = call.q.shape
    keys, size = call.v.shape[2:]
    out = empty_heads(batch, count, queries, size, call.q.dtype)
    lse = torch.empty(batch, count, queries)
    parts, stride = -(-keys // part_keys), -(-size // 4) * 4
    found = torch.empty(parts, batch, count, queries, stride)
    sums = torch.empty(parts, batch, count, queries, 2)
    pointers = found.data_ptr(), sums.data_ptr()
    args = bytes(Decode(call.args(out, lse), parts, part_keys, stride, *pointers))
    split, combine = sorted(kernels.kernels, key=lambda name: "combine" in name)
    blocks = batch * count * -(-queries // 16), parts
    shared = (16 + 2 * 2 * 64) * 64 * 2  # DecodeTile's, of two stages
    kernels.launch(
        split, blocks, 128, [args], shared_bytes=shared,
        reachable=[*call.inputs(), found, sums], uninitialised=[found, sums],
    )  # fmt: skip
    threads = batch * count * queries * stride // 4
    kernels.launch(
        combine, -(-threads // 128), 128, [args], reachable=[found, sums, out, lse],
        uninitialised=[out, lse],
    )  # fmt: skip
    return out, lse


def few_queries(kernels: Module) -> None:
    """On three parts of the keys, of which the last is short and the second has no scores."""
    call = operands(B, (1, 2, 1, 3, 330, 40, 33), "boolean")
    call.mask[..., 128:256] = False
    out, lse = decode(kernels, call, 128)
    truth, theirs = call.reference(Tensor.double), call.reference(lambda t: t)
    assert_as_good_as_torch("out", out, theirs[0], truth[0])
    assert_as_good_as_torch("lse", lse, theirs[1].float(), truth[1])


def test_attention_of_few_queries_is_combined_from_parts() -> None:
    few_queries(module("sm_80", 0, DECODE))


# A wrong peak in the log-sum-exp; a part left out; parts added as if they had one peak; a stage
# read without a barrier; keys past the last.
DECODE_DEFECTS = [170, 171, 172, 173, 152]


@pytest.mark.parametrize("mutant", DECODE_DEFECTS)
def test_attention_of_few_queries_defect_is_caught(mutant) -> None:
    with pytest.raises((AssertionError, Violation)):
        few_queries(module("sm_80", mutant, DECODE))
