"""The kernels of a backward pass' products: out = A B, A = dy * act'(saved), and sums of A's rows.

Two of them: through pointers, and by tensor map (see tensor_maps.py), where wgmma multiplies.
"""

import triton
import triton.language as tl

from pyfast.kernels.activations import activate_grad
from pyfast.kernels.matmul import (
    fence,
    halves,
    in_order,
    is_wide,
    mapped_tile,
    result_offsets,
    store_tile,
    tile_at,
    tile_offsets,
    whole,
)
from pyfast.kernels.tensor_maps import settled

SUM_ROWS = tl.constexpr(16)  # of partial sums for each part of the depth: what each thread adds up


@triton.jit
def _few_sums(a):
    """Sums over depth of a [depth, rows], SUM_ROWS of them: no thread asks another."""
    return tl.sum(tl.reshape(a, (a.shape[0] // SUM_ROWS, SUM_ROWS, a.shape[1])), axis=0)


@triton.jit
def _store_sums(total, sums_ptr, split, row, col, sums_stride):
    """Stores the sums [SUM_ROWS, rows] of a tile of the first column over the depth of a split."""
    if sums_ptr is not None:  # noqa: SIM102 (the first is decided when compiling)
        if col == 0:
            row_offs = tile_offsets(row, total.shape[1])
            sum_offs = split.to(tl.int64) * SUM_ROWS + tl.arange(0, SUM_ROWS)
            sums_ptrs = sums_ptr + sum_offs[:, None] * sums_stride + row_offs[None, :]
            tl.store(sums_ptrs, total, mask=row_offs[None, :] < sums_stride)


@triton.jit
def _finish(
    acc, out, row, col, M, N, row_stride, col_stride,
    ACCUMULATE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Stores acc, or what is there and acc, from element (row, col) of out on."""
    if is_wide(acc, ORDER):
        left, right = halves(acc)
        _finish(left, out, row, col, M, N, row_stride, col_stride, ACCUMULATE, ORDER)
        col += acc.shape[1] // 2
        _finish(right, out, row, col, M, N, row_stride, col_stride, ACCUMULATE, ORDER)
    else:
        if ACCUMULATE:
            if ORDER == "rows":
                row_stride, N = whole(row_stride, out), whole(N, out)
            at, mask = result_offsets(row, col, M, N, row_stride, col_stride, acc.shape)
            acc += tl.load(out + at, mask=mask, other=0.0)
        store_tile(out, acc, row, col, M, N, row_stride, col_stride, ORDER)


@triton.jit
def _changed(a, saved_ptrs, mask, sums_ptr, ACT: tl.constexpr):
    """(a act'(saved), the same in float32); fenced where threads do more with it than multiply."""
    wide = a.to(tl.float32)
    if ACT != "none":
        wide *= activate_grad(tl.load(saved_ptrs, mask=mask, other=0.0).to(tl.float32), ACT)
    if ACT != "none" or sums_ptr is not None:
        a = fence(wide.to(a.dtype))
    return a, wide


@triton.jit
def _with_sums(total, wide, sums_ptr, col):
    """total and the sums of one step, in tiles of the first column and where they are wanted."""
    if sums_ptr is not None:  # noqa: SIM102 (the first is decided when compiling)
        if col == 0:
            total += _few_sums(wide.T)
    return total


@triton.jit
def _counted(M, K, count_ptr, COUNTS: tl.constexpr):
    """M and K, one of them the count where there is one."""
    M = tl.load(count_ptr) if COUNTS == "rows" else M
    K = tl.load(count_ptr) if COUNTS == "depth" else K
    return M, K


@triton.jit
def gradient_product_kernel(
    dy_ptr, saved_ptr, b_ptr, out_ptr, sums_ptr, count_ptr,              # pointers; None: absent
    M, N, K, split_k,                                                    # sizes
    dy_row_stride, dy_k_stride, saved_row_stride, saved_k_stride,        # strides
    b_k_stride, b_col_stride, out_row_stride, out_col_stride, sums_stride,
    ACT: tl.constexpr, COUNTS: tl.constexpr, ACCUMULATE: tl.constexpr,
    A_ORDER: tl.constexpr, B_ORDER: tl.constexpr, OUT_ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out[s] = A @ B [M, N] over depth s split_k to (s + 1) split_k, A = dy * act'(saved).

    sums[s] are sums of A over that depth, taken by the first column of tiles on its way. Of the
    rows, or of the depth, only the first `count` are there, as COUNTS says. ACCUMULATE adds to out.
    """
    split = tl.program_id(1)
    out_ptr += split.to(tl.int64) * M * N
    M, K = _counted(M, K, count_ptr, COUNTS)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    dy_row_stride, dy_k_stride, a_rows, a_depth = in_order(
        dy_row_stride, dy_k_stride, M, K, dy_ptr, A_ORDER
    )
    b_col_stride, b_k_stride, b_cols, b_depth = in_order(
        b_col_stride, b_k_stride, N, K, b_ptr, B_ORDER
    )
    saved_row_stride, saved_k_stride, _, _ = in_order(
        saved_row_stride, saved_k_stride, M, K, dy_ptr, A_ORDER
    )
    first, last = split * split_k, tl.minimum((split + 1) * split_k, K)
    k_offs = tl.arange(0, BLOCK_K)
    k_far, k_step = first + k_offs.to(tl.int64), tl.full((), BLOCK_K, tl.int64)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row_offs, col_offs = tile_offsets(row, BLOCK_M), tile_offsets(col, BLOCK_N)
        row_mask, col_mask = row_offs[:, None] < a_rows, col_offs[None, :] < b_cols
        dy_ptrs = dy_ptr + row_offs[:, None] * dy_row_stride + k_far[None, :] * dy_k_stride
        b_ptrs = b_ptr + k_far[:, None] * b_k_stride + col_offs[None, :] * b_col_stride
        saved_ptrs = dy_ptrs
        if ACT != "none":
            saved_ptrs = saved_ptr + row_offs[:, None] * saved_row_stride
            saved_ptrs += k_far[None, :] * saved_k_stride
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = tl.zeros((SUM_ROWS, BLOCK_M), tl.float32)
        for start in range(first, last, BLOCK_K):
            a_mask = row_mask & (k_offs < a_depth - start)[None, :]
            b_mask = col_mask & (k_offs < b_depth - start)[:, None]
            a = tl.load(dy_ptrs, mask=a_mask, other=0.0)
            b = tl.load(b_ptrs, mask=b_mask, other=0.0)
            a, wide = _changed(a, saved_ptrs, a_mask, sums_ptr, ACT)
            total = _with_sums(total, wide, sums_ptr, col)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            dy_ptrs += k_step * dy_k_stride
            if ACT != "none":
                saved_ptrs += k_step * saved_k_stride
            b_ptrs += k_step * b_k_stride
        _store_sums(total, sums_ptr, split, row, col, sums_stride)
        row *= BLOCK_M
        col *= BLOCK_N
        _finish(acc, out_ptr, row, col, M, N, out_row_stride, out_col_stride, ACCUMULATE, OUT_ORDER)


@triton.jit
def mapped_gradient_kernel(
    dy, saved, b, out, sums_ptr, count_ptr,                         # maps; sums, parts: pointers
    M, N, K, split_k,
    out_row_stride, out_col_stride, sums_stride,
    ACT: tl.constexpr, COUNTS: tl.constexpr, ACCUMULATE: tl.constexpr,
    A_ORDER: tl.constexpr, B_ORDER: tl.constexpr, OUT_ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As gradient_product_kernel; past the count, and to the end of a tile, A and B are finite.

    The left operand of a wgmma that is changed on its way stays in registers. The other is finite
    so that what a tile reads past the count, where dy is zero, adds nothing.
    """
    split = tl.program_id(1)
    if OUT_ORDER != "map":
        out += split.to(tl.int64) * M * N
    M, K = _counted(M, K, count_ptr, COUNTS)
    first, last = split * split_k, tl.minimum((split + 1) * split_k, K)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = tl.zeros((SUM_ROWS, BLOCK_M), tl.float32)
        for start in range(first, last, BLOCK_K):
            a = mapped_tile(dy, row * BLOCK_M, start, A_ORDER)
            wide = a.to(tl.float32)
            if ACT != "none":
                tile_saved = mapped_tile(saved, row * BLOCK_M, start, A_ORDER).to(tl.float32)
                wide *= activate_grad(tile_saved, ACT)
                a = wide.to(a.dtype)
            total = _with_sums(total, wide, sums_ptr, col)
            acc = tl.dot(a, mapped_tile(b, col * BLOCK_N, start, B_ORDER).T, acc)
            if ACT != "none" or sums_ptr is not None:
                acc = settled(acc)
        _store_sums(total, sums_ptr, split, row, col, sums_stride)
        row *= BLOCK_M
        col *= BLOCK_N
        _finish(acc, out, row, col, M, N, out_row_stride, out_col_stride, ACCUMULATE, OUT_ORDER)
