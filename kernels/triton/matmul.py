"""What the matrix products share: tile shapes, the order of the tiles, and the loop over depth.

Every product is C [M, N] = A [M, K] B [K, N] with both strides of each operand passed, so that a
transposed, sliced or expanded operand is read where it lies. Strides of 1 and multiples of 16 are
compiled in, as Triton does by itself: then rows move by 16-byte cp.async.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

PROGRAMS = 128  # about the multiprocessors of a large GPU: fewer tiles than that leave some idle
MOST_SPLITS = 16
# Columns of a tile to finish at once - activate, round, store - without spills: by map, through
# pointers by 16 bytes, and element by element.
WIDEST, NARROW, NARROWEST = tl.constexpr(128), tl.constexpr(64), tl.constexpr(32)
BIG_SHARED = (9, 10)  # major capabilities with 227 KB of shared memory and wgmma or tcgen05


@dataclass(frozen=True)
class MatmulConfig:
    """How one product is cut: tile [block_m, block_n], depth per step, tiles per group of rows."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    persistent: bool = False  # as many programs as multiprocessors, each with tile after tile
    group_m: int = 8

    def tiles(self, m: int, n: int) -> int:
        """Tiles of C [m, n]."""
        return triton.cdiv(m, self.block_m) * triton.cdiv(n, self.block_n)

    def programs(self, m: int, n: int, processors: int) -> int:
        """How many programs share the tiles of C [m, n]."""
        return min(self.tiles(m, n), processors) if self.persistent else self.tiles(m, n)

    def keywords(self) -> dict[str, int]:
        """As the kernels and the launch take it."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def capability(t: Tensor) -> tuple[int, int]:
    """Compute capability of the device that Triton launches on for `t`."""
    if t.is_cuda:
        return torch.cuda.get_device_capability(t.device)
    return divmod(driver.active.get_current_target().arch, 10)


def launch_config(
    capability: tuple[int, int], dtype: torch.dtype, m: int, n: int, k: int
) -> MatmulConfig:
    """The tiles of C [m, n] = A [m, k] B [k, n] on a GPU of this compute capability; pure.

    Large tiles where they fill the GPU, small ones where they would not, and tiles of 16 rows where
    there are no more: a decoding step. Two warps and a depth of 128 then: with 4 and 64 a warp
    spent 7.1 to 7.8 integer instructions on addresses for each multiplication, now 2.3 to 4.

    float32 is multiplied plainly ("ieee"): tensor cores cut off their sums, and even three tf32
    products then err more than twice as far as torch. Its tiles are 128 columns wide, so that the
    lanes of a warp, of four columns each, share their rows: of two rows at once, those of the left
    operand, as it lies, are in one bank.
    """
    if dtype == torch.float32:
        wide = MatmulConfig(64, 128, 16, num_warps=8, num_stages=3)
        if m > 16 and wide.tiles(m, n) >= PROGRAMS:
            return wide
        return replace(wide, block_m=16 if m <= 16 else 32, num_warps=4)
    if m <= 16:
        return MatmulConfig(16, 64, 128 if k > 64 else 64, num_warps=2, num_stages=3)
    if capability[0] in BIG_SHARED:
        large = MatmulConfig(128, 256, 64, num_warps=8, num_stages=4, persistent=True)
    else:
        large = MatmulConfig(128, 128, 32, num_warps=8, num_stages=4)
    small = MatmulConfig(64, 64, 64, num_warps=4, num_stages=3)
    return large if large.tiles(m, n) >= PROGRAMS else small


def split_count(config: MatmulConfig, m: int, n: int, k: int) -> int:
    """Into how many parts to cut the depth of a product with few tiles; 8 steps each at least."""
    steps = triton.cdiv(k, config.block_k)
    return max(1, min(PROGRAMS // config.tiles(m, n), steps // 8, MOST_SPLITS))


@triton.jit
def tile_at(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of a tile, down groups of GROUP_M rows: neighbours share what L2 holds."""
    row_tiles = tl.cdiv(M, BLOCK_M)
    group_size = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_row = tile // group_size * GROUP_M
    rows = tl.minimum(row_tiles - first_row, GROUP_M)
    return first_row + tile % group_size % rows, tile % group_size // rows


@triton.jit
def tile_offsets(index, BLOCK: tl.constexpr):
    """The rows or columns of a tile, 64-bit: times a stride they pass 2**31."""
    return index.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def whole(n, ptr):
    """n, or what is packed there, to the next 16 bytes of what `ptr` points to, known as such."""
    UNIT: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    return tl.cdiv(n, UNIT) * UNIT


@triton.jit
def in_order(row_stride, k_stride, rows, depth, ptr, ORDER: tl.constexpr):
    """The strides and sizes of an operand, with what its order promises of them."""
    if ORDER == "rows":
        row_stride, depth = whole(row_stride, ptr), whole(depth, ptr)
    if ORDER == "depth":
        k_stride, rows = whole(k_stride, ptr), whole(rows, ptr)
    return row_stride, k_stride, rows, depth


@triton.jit
def product(
    acc,  # [BLOCK_M, BLOCK_N], float32
    a, b,
    row, col,
    M, N, K,
    a_row_stride, a_k_stride, b_k_stride, b_col_stride,
    A_ORDER: tl.constexpr, B_ORDER: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + the tile (row, col) of A @ B; a and b are pointers, or maps of A and of B transposed.

    Their orders are those of `tensor_maps.order`. An operand that has one lies in memory, through
    pointers, up to the next 16 bytes, with zeros past the depth.
    """
    if MAPS:
        for start in range(0, K, BLOCK_K):
            a_tile = mapped_tile(a, row * acc.shape[0], start, A_ORDER)
            b_tile = mapped_tile(b, col * acc.shape[1], start, B_ORDER)
            acc = tl.dot(a_tile, b_tile.T, acc)
    else:
        a_row_stride, a_k_stride, M, A_K = in_order(a_row_stride, a_k_stride, M, K, a, A_ORDER)
        b_col_stride, b_k_stride, N, B_K = in_order(b_col_stride, b_k_stride, N, K, b, B_ORDER)
        row_offs, col_offs = tile_offsets(row, acc.shape[0]), tile_offsets(col, acc.shape[1])
        k_offs = tl.arange(0, BLOCK_K)
        k_far, k_step = k_offs.to(tl.int64), tl.full((), BLOCK_K, tl.int64)
        a_ptrs = a + row_offs[:, None] * a_row_stride + k_far[None, :] * a_k_stride
        b_ptrs = b + k_far[:, None] * b_k_stride + col_offs[None, :] * b_col_stride
        row_mask, col_mask = row_offs[:, None] < M, col_offs[None, :] < N
        for start in range(0, K, BLOCK_K):
            a_mask = row_mask & (k_offs < A_K - start)[None, :]
            b_mask = col_mask & (k_offs < B_K - start)[:, None]
            a_tile = tl.load(a_ptrs, mask=a_mask, other=0.0)
            b_tile = tl.load(b_ptrs, mask=b_mask, other=0.0)
            acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
            a_ptrs += k_step * a_k_stride
            b_ptrs += k_step * b_k_stride
    return acc


@triton.jit
def mapped_tile(t, row, depth, ORDER: tl.constexpr):
    """The tile of t [rows, depth] that begins at (row, depth), by map; zeros past its ends."""
    if ORDER == "rows":  # noqa: SIM108 (decided when compiling)
        tile = t.load([row, depth])
    else:
        tile = t.load([depth, row]).T
    return tile


@triton.jit
def is_wide(acc, ORDER: tl.constexpr):
    """Whether to finish a tile half by half."""
    return acc.shape[1] > (WIDEST if ORDER == "map" else NARROW if ORDER == "rows" else NARROWEST)


@triton.jit
def halves(acc):
    """The left and the right half of a tile."""
    pair = tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1))
    return tl.split(pair)


@triton.jit
def result_offsets(row, col, M, N, row_stride, col_stride, shape):
    """Where the elements of a tile lie in a result [M, N], in 64 bits, and which are inside."""
    row_offs = row.to(tl.int64) + tl.arange(0, shape[0])[:, None]
    col_offs = col.to(tl.int64) + tl.arange(0, shape[1])[None, :]
    return row_offs * row_stride + col_offs * col_stride, (row_offs < M) & (col_offs < N)


@triton.jit
def store_tile(out, value, row, col, M, N, row_stride, col_stride, ORDER: tl.constexpr):
    """out [M, N] = value, from element (row, col) on; out is a map where ORDER says so."""
    if ORDER == "map":
        out.store([row, col], value.to(out.dtype))
    else:
        if ORDER == "rows":
            row_stride, N = whole(row_stride, out), whole(N, out)
        at, mask = result_offsets(row, col, M, N, row_stride, col_stride, value.shape)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def store_parts(out, value, row, col, M, N, row_stride, col_stride, ORDER: tl.constexpr):
    """`store_tile`, half by half where that is wide."""
    if is_wide(value, ORDER):
        left, right = halves(value)
        half = col + value.shape[1] // 2
        store_parts(out, left, row, col, M, N, row_stride, col_stride, ORDER)
        store_parts(out, right, row, half, M, N, row_stride, col_stride, ORDER)
    else:
        store_tile(out, value, row, col, M, N, row_stride, col_stride, ORDER)


@triton.jit
def fence(x):
    """x, in the layout it has: keeps what is computed on loaded operands out of the MMA's layout.

    Triton would load operands that are still to be changed straight into the registers of the MMA,
    from shared memory that is not swizzled for it: four-fold bank conflicts, counted. With a side
    effect in between, it loads them as they lie and passes them on through swizzled memory.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;",
        "=r,r",
        [x],
        dtype=x.dtype,
        is_pure=False,
        pack=32 // x.dtype.primitive_bitwidth,
    )


@triton.jit
def sum_parts_kernel(part_ptr, out_ptr, size, n_parts, BLOCK: tl.constexpr):
    """out[i] = sum of part[:, i], in one order."""
    offs = tile_offsets(tl.program_id(0), BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n_parts):
        total += tl.load(part_ptr + offs, mask=offs < size, other=0.0)
        part_ptr += size
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=offs < size)


def launch_sum_parts(parts: Tensor, out: Tensor) -> None:
    """out = the sum of parts[s], float32, each laid out in memory as `out`, which has no gaps."""
    block = 512  # 16 bytes of float32 for each thread: whole sectors
    grid = (triton.cdiv(out.numel(), block),)
    sum_parts_kernel[grid](parts, out, out.numel(), parts.shape[0], BLOCK=block, num_warps=4)
