"""attention in Triton, on the emulator: every case, masks of all shapes, real tile shapes."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import pyfast
from pyfast import reference, testing, triton_rooms
from pyfast.testing import Case, Maker

pytest.importorskip("triton", reason="needs triton")
if not pytest.importorskip("tests.emulator.library").compiler():
    pytest.skip("the emulator needs a C++ compiler", allow_module_level=True)

from tests.emulator.triton import compiled, emulated
from tests.run_case import strided
from tests.triton_lanes import check, check_twice, runs

scores = triton_rooms._module("attention_scores")
B = torch.bfloat16


@pytest.mark.parametrize(("case", "dtype", "capability"), runs(testing.cases("attention")), ids=str)
def test_attention_is_as_good_as_torch(case, dtype, capability) -> None:
    check_twice(case, dtype, capability)


def masked(*shape: int) -> Case:
    """Two heads of 20 queries and 40 keys in two batches, and an additive mask of `shape`."""

    def make(t: Maker) -> dict[str, Tensor]:
        inputs = {n: t.normal(2, 2, s, 16) for n, s in (("query", 20), ("key", 40), ("value", 40))}
        return inputs | {"attn_mask": t.normal(*shape)}

    grads = ("query", "key", "value", "attn_mask")
    return Case("attention", f"mask {list(shape)}", make, grads, (1, 1), (1, 1))


@pytest.mark.parametrize("shape", [(2, 2, 1, 40), (1, 2, 20, 40), (2, 1, 1, 40)])
def test_attention_sums_the_gradient_of_a_mask_that_broadcasts(shape) -> None:
    check(masked(*shape), torch.float32, 80)


@pytest.mark.parametrize("shape", [(1, 2, 20, 1), (2, 1, 1, 1)])
def test_attention_does_not_feel_a_mask_that_is_the_same_for_all_keys(shape) -> None:
    inputs = masked(*shape).inputs(torch.float32)
    inputs["attn_mask"].requires_grad_()
    with emulated(), pyfast.using("triton"):
        pyfast.attention(**inputs).square().sum().backward()
    assert inputs["attn_mask"].grad.shape == shape
    assert inputs["attn_mask"].grad.abs().max() < 1e-4


@pytest.mark.parametrize("capability", [80, 90])
def test_attention_with_tiles_of_128_queries(capability) -> None:
    """150 queries: two of the tiles that long sequences have, whole keys before masked ones."""
    assert scores.forward_config((8, 0), B, 150, 64, False).block_queries == 128
    case = testing.attention(1, 1, 150, 64, causal=True)
    log = check(case, B, capability)
    forward = log[0].stats
    tiles = 2 * 2 * 64 * 64 * 128  # both products of 128 queries and 64 keys
    assert forward.mma_flops == (2 + 3) * tiles  # keys to 128, and to 150


def test_attention_reads_any_strides() -> None:
    check(testing.attention(1, 2, 5, 24, tk=7, mask="additive"), torch.float32, 80, strided)


def test_attention_of_values_of_another_size() -> None:
    case = Case(
        "attention",
        "values of 40",
        lambda t: (
            {"query": t.normal(1, 2, 9, 16), "key": t.normal(1, 2, 11, 16)}
            | {"value": t.normal(1, 2, 11, 40)}
        ),
        ("query", "key", "value"),
        (1, 1),
        (1, 1),
    )
    check(case, torch.float32, 80)


def test_attention_of_rows_that_see_nothing_is_0() -> None:
    q, k, v = (torch.randn(1, 1, 5, 16).requires_grad_() for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    with emulated(), pyfast.using("triton"):
        out = pyfast.attention(q, k, v, mask)
        out.sum().backward()
        _, lse = torch.ops.pyfast.attention(q, k, v, mask[None, None], False, 1.0)
    assert not out[0, 0, 2].any() and not q.grad[0, 0, 2].any()
    assert out.isfinite().all() and k.grad.isfinite().all()
    assert math.isinf(lse[0, 0, 2]) and lse[0, 0, 2] > 0


def test_attention_masked_by_the_lowest_float_averages() -> None:
    """A finite mask stays finite: as torch, and not as a row that sees nothing."""
    q, k, v = (torch.randn(1, 1, 5, 16) for _ in range(3))
    mask = torch.zeros(5, 5)
    mask[1] = torch.finfo(torch.float32).min
    with emulated(), pyfast.using("triton"):
        out = pyfast.attention(q, k, v, mask)
    assert torch.allclose(out, reference.attention(q, k, v, mask), atol=1e-5)


def test_attention_gives_the_same_bits_in_every_schedule() -> None:
    case = testing.attention(1, 2, 40, 16, kv=1, causal=True)
    runs = []
    for order in ("greedy", "random"):
        inputs = case.inputs(B)
        live = [inputs[name].requires_grad_() for name in case.grads]
        with emulated(order=order, seed=7), pyfast.using("triton"):
            out = pyfast.attention(**inputs)
            runs.append([out, *torch.autograd.grad(out.float().square().sum(), live)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_attention_of_nothing() -> None:
    for b, tq, tk in ((0, 3, 4), (1, 0, 4), (1, 3, 0)):
        q, k = torch.randn(b, 2, tq, 16).requires_grad_(), torch.randn(b, 2, tk, 16)
        with emulated(), pyfast.using("triton"):
            out = pyfast.attention(q, k, k)
            out.sum().backward()
        assert not out.any() and not q.grad.any()


@pytest.mark.parametrize("size", [16, 24, 64, 96, 128, 200, 256])
def test_attention_configurations_fit_every_gpu(size) -> None:
    features = scores.block_features(size)
    for dtype, arch in itertools.product((torch.float32, B), ((8, 0), (8, 9), (9, 0), (10, 0))):
        for queries in (1, 16, 17, 64, 65, 4096):
            config = scores.forward_config(arch, dtype, queries, size, False)
            assert config.block_queries <= 128 and config.num_stages <= 3
            assert config.precision in ("ieee", "tf32x3")
            rows = config.block_queries + 2 * config.num_stages * config.block_keys
            assert arch != (8, 9) or rows * features * dtype.itemsize <= 99 << 10
        by_queries, by_keys = scores.backward_config(arch, dtype, size)
        if arch == (9, 0) and dtype == B:  # 64 rows of a wgmma for each four warps, or none
            assert 16 * by_queries.num_warps == by_queries.block_queries
            assert size > 128 or 16 * by_keys.num_warps == by_keys.block_keys


@pytest.mark.parametrize("size", [64, 128, 256])
def test_attention_of_float32_spills_nothing(size) -> None:
    """The other dtypes: tests/budgets.json."""
    q, k = torch.empty(1, 4, 512, size), torch.empty(1, 2, 512, size)
    lse = torch.empty(1, 4, 512)
    with compiled(80) as log, pyfast.using("triton"):
        torch.ops.pyfast.attention(q, k, k, None, True, 0.1)
        torch.ops.pyfast.attention_backward(q, q, k, k, q, lse, None, True, 0.1, False)
    for launch in log:
        used = launch.binary.resources()
        assert used["STACK"] == used["LOCAL"] == 0, (launch.name, used)
        assert launch.binary.shared <= 99 << 10  # of a GPU of capability 8.9
