"""attention in CUDA C++ where few queries meet many keys: their parts, and what combines them."""

import pytest
import torch

import pyfast
from pyfast import testing
from tests.cuda_lanes import check, check_twice, needs_emulator
from tests.emulator.cuda import emulated
from tests.run_case import strided

pytestmark = needs_emulator
F, B, H = torch.float32, torch.bfloat16, torch.float16

# One query of grouped heads, which share keys as queries of one head; more heads than a tile has
# queries; several queries; sizes of all kernels; keys that end within a tile and within a part.
CASES = [
    (testing.attention(2, 8, 1, 64, tk=600, kv=2), B),
    (testing.attention(1, 4, 1, 128, tk=1030, kv=2, mask="bool"), H),
    (testing.attention(1, 40, 1, 32, tk=513, kv=2), B),
    (testing.attention(2, 2, 7, 40, tk=777, mask="additive"), B),
    (testing.attention(1, 2, 16, 192, tk=520, kv=1), B),
    (testing.attention(1, 4, 1, 24, tk=530, kv=2, mask="additive"), F),
    (testing.attention(1, 2, 3, 128, tk=520), F),
]


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_attention_of_few_queries_is_as_good_as_torch(case, dtype) -> None:
    check_twice(case, dtype, 90 if dtype == B else 80)


@pytest.mark.parametrize("dtype", [B, F], ids=str)
def test_attention_of_few_queries_reads_any_strides(dtype) -> None:
    check(testing.attention(1, 4, 1, 24, tk=530, kv=2), dtype, 80, strided)


def kernels(case: testing.Case, **options: object) -> tuple[list[str], list[int]]:
    """The kernels of the forward pass, and the parts of the keys."""
    with emulated(**options) as log, pyfast.using("cuda"):
        pyfast.attention(**case.inputs(B))
    return [launch.name for launch in log], [launch.grid[1] for launch in log]


def test_attention_splits_keys_by_the_sizes_alone() -> None:
    """On any GPU the same ones; tests/cuda/attention_decode.cu has more."""
    split = ["attention_decode_kernel", "attention_combine_kernel"]
    one = testing.attention(1, 2, 1, 16, tk=2048, kv=1)
    for processors in (2, 132):
        assert kernels(one, processors=processors) == (split, [8, 1])
    for whole in (
        testing.attention(1, 2, 1, 16, tk=511),
        testing.attention(1, 2, 17, 16, tk=600),
        testing.attention(1, 2, 4, 16, tk=600, causal=True),
    ):
        assert kernels(whole) == (["attention_forward_kernel"], [1])


def test_attention_of_few_queries_reads_each_key_once() -> None:
    """For all heads that share it; the parts are small beside them."""
    case = testing.attention(1, 8, 1, 64, tk=2048, kv=2)
    with emulated(90, cache_bytes=1 << 16) as log, pyfast.using("cuda"):
        pyfast.attention(**case.inputs(B))
    decode, combine = (launch.stats for launch in log)
    cache = 2 * 2 * 2048 * 64 * 2
    assert cache <= decode.dram_read <= 1.02 * cache
    assert decode.sector_efficiency >= 0.97 and decode.bank_factor <= 1.05
    assert combine.dram_read + combine.dram_written < 0.1 * cache


def test_attention_of_few_queries_gives_the_same_bits_in_every_schedule() -> None:
    case = testing.attention(1, 4, 1, 16, tk=1100, kv=2)
    runs = []
    for order in ("greedy", "random"):
        with emulated(order=order, seed=5), pyfast.using("cuda"):
            runs.append(pyfast.attention(**case.inputs(B)))
    assert torch.equal(*runs)


def test_attention_of_few_queries_that_see_nothing_is_0() -> None:
    q, k = torch.randn(1, 2, 2, 16), torch.randn(1, 2, 700, 16)
    mask = torch.ones(2, 700, dtype=torch.bool)
    mask[1] = False
    mask[0, :600] = False  # the first parts see nothing
    with emulated(), pyfast.using("cuda"):
        out, lse = torch.ops.pyfast.attention(q, k, k, mask[None, None], False, 1.0)
    assert not out[:, :, 1].any() and (lse[:, :, 1] == torch.inf).all()
    wanted = (q[:, :, :1] @ k[:, :, 600:].mT).softmax(-1) @ k[:, :, 600:]
    assert torch.allclose(out[:, :, :1], wanted, atol=1e-5)
