"""Tensor cores, matrices in shared memory and asynchronous copies on the emulator."""

import pytest
import torch

from tests.emulator import Module, Violation, library, nvcc
from tests.emulator.tensormap import encode_tensor_map
from tests.test_emulator_instructions import SOURCE

pytestmark = [
    pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not nvcc.available(), reason="needs nvcc"),
]


@pytest.fixture(scope="module")
def module() -> Module:
    return Module(nvcc.compile_ptx(SOURCE))


START = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(8, 0).repeat(1, 4)  # of C


@pytest.mark.parametrize(
    ("name", "dtype", "k"),
    [
        ("mma_bf16", torch.bfloat16, 16),
        ("mma_f16", torch.float16, 16),
        ("mma_tf32", torch.float32, 8),
        ("mma_s8", torch.int8, 32),
        ("mma_u8", torch.uint8, 32),
        ("mma_e4m3", torch.float8_e4m3fn, 32),
        ("mma_e5m2", torch.float8_e5m2, 32),
    ],
)
@pytest.mark.parametrize("perturb", [False, True])
def test_mma(module: Module, name: str, dtype: torch.dtype, k: int, perturb: bool) -> None:
    whole = not dtype.is_floating_point
    if whole:
        lowest = torch.iinfo(dtype).min
        a, b = (torch.randint(lowest, lowest + 256, (n, k), dtype=dtype) for n in (16, 8))
        out = torch.zeros(16, 8, dtype=torch.int32)
    else:
        a, b = torch.randn(16, k).to(dtype), torch.randn(8, k).to(dtype)
        out = torch.zeros(16, 8)
    if name == "mma_tf32":  # the lower bits do not count
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    x, y = (t.view(torch.uint8) if dtype.itemsize == 1 else t for t in (a, b))
    stats = module.launch(name, 1, 32, [x, y, out], perturb=perturb)
    exact = a.double() @ b.double().T + START
    bound = 0 if whole else 2.0**-23 * exact.abs().max()
    assert (out - exact).abs().max() <= bound
    if perturb and not whole:
        assert (out.abs().double() <= exact.abs()).all()  # cut off
    assert stats.mma_flops == 2 * 16 * 8 * k


def test_mma_with_half_accumulators(module: Module) -> None:
    a, b = torch.randn(16, 8).half(), torch.randn(8, 8).half()
    out = torch.zeros(16, 8, dtype=torch.float16)
    module.launch("mma_f16_f16", 1, 32, [a, b, out])
    assert torch.equal(out, (a.double() @ b.double().T).half())


def test_mma_in_double(module: Module) -> None:
    a, b = torch.randn(8, 4).double(), torch.randn(8, 4).double()
    out = torch.zeros(8, 8, dtype=torch.float64)
    module.launch("mma_f64", 1, 32, [a, b, out])
    torch.testing.assert_close(out, a @ b.T + torch.tensor([1.0, 2.0]).double().repeat(4))


def test_matrix_moves(module: Module) -> None:
    a, out = torch.randint(0, 9999, (2, 8, 8)).short(), torch.zeros(4, 8, 8).short()
    stats = module.launch("matrices", 1, 32, [a, out])
    assert torch.equal(out[:2], a) and torch.equal(out[2:], a.mT)
    assert stats.bank_factor == 1


@pytest.mark.parametrize("n", [64, 50, 0])
def test_cp_async_fills_the_tail_with_zeros(module: Module, n: int) -> None:
    a = torch.randint(0, 9999, (n, 4), dtype=torch.int32)
    out = torch.ones(64, 4, dtype=torch.int32)
    stats = module.launch("cp_async", 1, 64, [a, out, n])
    whole = torch.cat([a, torch.zeros(64 - n, 4, dtype=torch.int32)])
    assert torch.equal(out, whole[torch.arange(64) ^ 1])
    assert stats.load_bytes == 16 * n


@pytest.mark.parametrize("order", ["fixed", "random", "greedy"])
def test_bulk_copies_through_an_mbarrier(module: Module, order: str) -> None:
    a, out = torch.randn(5, 256), torch.zeros(5, 256)
    stats = module.launch("bulk_copy", 1, 96, [a, out, 5], order=order)
    assert torch.equal(out, 2 * a)
    assert (stats.load_bytes, stats.store_bytes) == (5120, 5120)


def test_cluster_reads_shared_memory_of_its_neighbours(module: Module) -> None:
    a = torch.randint(0, 9999, (2, 4, 32), dtype=torch.int32)
    out = torch.zeros(2, 4, 32, dtype=torch.int32)
    module.launch("cluster", 8, 32, [a, out], order="random", seed=2)
    assert torch.equal(out, a.roll(-1, 1).flip(2))


def wgmma(module: Module, swizzle: int, bug: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[64, 64] x [64, 64] in tiles of `swizzle` bytes; without swizzle, columns of 16 bytes."""
    a, b, out = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16(), torch.zeros(64, 64)
    columns = (swizzle or 16) // 2
    maps = [
        encode_tensor_map(t.data_ptr(), [64, 64], [64, 1], [64, columns], t.dtype, swizzle)
        for t in (a, b)
    ]
    stride = 8 * (swizzle or 16)  # of groups of eight rows
    leading = 64 * 16 if not swizzle else 16
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    high = mode << 62 | (stride >> 4) << 32 | (leading >> 4) << 16
    args = [*maps, out, high, columns, bug]
    module.launch(
        "wgmma_swizzles", 1, 128, args, shared_bytes=16384, reachable=[a, b], order="greedy"
    )
    return out, a.double() @ b.double().T


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_wgmma_reads_what_tensor_maps_wrote(module: Module, swizzle: int) -> None:
    out, exact = wgmma(module, swizzle)
    assert (out - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize(
    ("bug", "words"),
    [
        (1, "mbarrier"),  # reads the tiles before they have arrived
        (2, "missing wgmma.fence"),
        (3, "wgmma not waited for"),
        (4, "wgmma"),  # writes to a tile afterwards: right, so far as all have waited
    ],
)
def test_asynchrony_of_wgmma_is_checked(module: Module, bug: int, words: str) -> None:
    with pytest.raises(Violation, match=words):
        wgmma(module, 128, bug)


TILE = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry tile(.param .align 64 .b8 from[128], .param .align 64 .b8 to[128],
                     .param .u64 out, .param .s32 x, .param .s32 y) {
  .reg .pred %p<3>; .reg .b32 %r<16>; .reg .b64 %rd<8>;
  .shared .align 128 .b8 tile[512];
  .shared .align 8 .b8 bar[8];
  mov.b64 %rd0, from; cvta.param.u64 %rd1, %rd0;
  mov.b64 %rd2, to; cvta.param.u64 %rd3, %rd2;
  ld.param.s32 %r0, [x]; ld.param.s32 %r1, [y];
  mov.u32 %r2, tile; mov.u32 %r3, bar; mov.u32 %r4, %tid.x;
  setp.eq.u32 %p0, %r4, 0;
  @%p0 mbarrier.init.shared.b64 [%r3], 1;
  fence.proxy.async.shared::cta;
  bar.warp.sync -1;
  @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 512;
  @%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
       [%r2], [%rd1, {%r0, %r1}], [%r3];
$wait:
  mbarrier.try_wait.parity.shared.b64 %p1, [%r3], 0;
  @!%p1 bra $wait;
  ld.param.u64 %rd4, [out];
  shl.b32 %r5, %r4, 4; add.u32 %r6, %r2, %r5; cvt.u64.u32 %rd5, %r5; add.u64 %rd4, %rd4, %rd5;
  ld.shared.v4.b32 {%r7, %r8, %r9, %r10}, [%r6];
  st.global.v4.b32 [%rd4], {%r7, %r8, %r9, %r10};
  @%p0 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd3, {%r0, %r1}], [%r2];
  @%p0 cp.async.bulk.commit_group;
  @%p0 cp.async.bulk.wait_group 0;
  ret;
}
"""


@pytest.mark.parametrize("fill_nan", [False, True])
def test_tensor_map_cuts_at_the_edges(fill_nan: bool) -> None:
    """A tile that hangs over all edges: zeros or nan outside, nothing stored there."""
    kernel = Module(TILE)
    a = torch.randn(10, 12)
    for x, y in [(0, 0), (-3, -2), (5, 4), (9, 7), (20, 0), (0, -8)]:
        copy, seen = torch.full_like(a, 7), torch.zeros(8, 16)
        maps = [
            encode_tensor_map(t.data_ptr(), [10, 12], [12, 1], [8, 16], t.dtype, 0, fill_nan)
            for t in (a, copy)
        ]
        kernel.launch("tile", 1, 32, [*maps, seen, x, y], reachable=[a, copy])
        wide = torch.full((60, 60), float("nan") if fill_nan else 0.0)
        wide[20:30, 20:32] = a
        torch.testing.assert_close(seen, wide[20 + y : 28 + y, 20 + x : 36 + x], equal_nan=True)
        kept = torch.full((60, 60), 7.0)
        kept[20 + y : 28 + y, 20 + x : 36 + x] = wide[20 + y : 28 + y, 20 + x : 36 + x]
        assert torch.equal(copy, kept[20:30, 20:32])
