"""Gradients of linear layers: dX = dP W and dW = dP^T X, with dP = dY * act'(saved).

The derivative has two places. Where it follows from the output it costs a few instructions and is
taken inside the products, on the operand just loaded, and the bias gradient with it: dY and the
output are read, nothing else is written. Derivatives with erf or exp would be made again for every
tile beside the first, which costs more than the product: one pass makes them once. So it does for
all since compute capability 9.0, whose tensor cores read the operand before any thread sees it.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels.activations import GRAD_FROM_OUTPUT, activate_grad
from pyfast.kernels.column_sums import launch_column_sums, padded, partial_rows
from pyfast.kernels.matmul import (
    BIG_SHARED,
    MatmulConfig,
    capability,
    fence,
    launch_config,
    launch_sum_parts,
    split_count,
    tile_at,
    tile_offsets,
)
from pyfast.kernels.processors import processors

PASS_ROWS, PASS_COLS = 4, 256  # of the elementwise pass of one warp: a lane adds up whole columns
PASS_WARPS = 16  # of it, on each multiprocessor
# The large tiles of a product whose left operand is changed, or summed, on its way: no spills.
THROUGH_REGISTERS = MatmulConfig(128, 128, 32, num_warps=8, num_stages=4, persistent=True)


@triton.jit
def _act_backward_kernel(
    dy_ptr, saved_ptr, dpre_ptr, sums_ptr,                               # pointers; None: absent
    M, N,                                                                # sizes
    dy_row_stride, dy_col_stride, saved_row_stride, saved_col_stride, sums_stride,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dpre = dy * act'(saved) [M, N], and in sums[p] the column sums of the rows of program p.

    A program takes BLOCK_N columns and every num_programs(1)-th block of rows.
    """
    col_offs = tile_offsets(tl.program_id(0), BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(M, BLOCK_M), tl.num_programs(1)):
        row_offs = tile_offsets(block, BLOCK_M)
        mask = (row_offs[:, None] < M) & (col_offs[None, :] < N)
        dy_at = row_offs[:, None] * dy_row_stride + col_offs[None, :] * dy_col_stride
        dpre = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        if ACT != "none":
            saved_at = row_offs[:, None] * saved_row_stride + col_offs[None, :] * saved_col_stride
            saved = tl.load(saved_ptr + saved_at, mask=mask, other=0.0).to(tl.float32)
            dpre *= activate_grad(saved, ACT)
        if dpre_ptr is not None:
            at = row_offs[:, None] * N + col_offs[None, :]
            tl.store(dpre_ptr + at, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        total += dpre
    if sums_ptr is not None:
        sums_ptrs = sums_ptr + tl.program_id(1).to(tl.int64) * sums_stride + col_offs
        tl.store(sums_ptrs, tl.sum(total, axis=0), mask=col_offs < sums_stride)


@triton.jit
def _gradient_product_kernel(
    dy_ptr, saved_ptr, b_ptr, out_ptr, sums_ptr, count_ptr,              # pointers; None: absent
    M, N, K, split_k,                                                    # sizes
    dy_row_stride, dy_k_stride, saved_row_stride, saved_k_stride,        # strides
    b_k_stride, b_col_stride, out_row_stride, out_col_stride, sums_stride,
    ACT: tl.constexpr, COUNTS: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out[s] = A @ B [M, N] over depth s split_k to (s + 1) split_k, A = dy * act'(saved).

    sums[s] is the sum of A over that depth, taken by the first column of tiles on its way. Of the
    rows, or of the depth, only the first `count` are there, as COUNTS says. ACCUMULATE adds to out.
    """
    split = tl.program_id(1)
    out_ptr += split.to(tl.int64) * M * N
    M = tl.load(count_ptr) if COUNTS == "rows" else M
    K = tl.load(count_ptr) if COUNTS == "depth" else K
    first, last = split * split_k, tl.minimum((split + 1) * split_k, K)
    k_offs = tl.arange(0, BLOCK_K)
    k_far, k_step = first + k_offs.to(tl.int64), tl.full((), BLOCK_K, tl.int64)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row_offs, col_offs = tile_offsets(row, BLOCK_M), tile_offsets(col, BLOCK_N)
        row_mask, col_mask = row_offs[:, None] < M, col_offs[None, :] < N
        dy_ptrs = dy_ptr + row_offs[:, None] * dy_row_stride + k_far[None, :] * dy_k_stride
        b_ptrs = b_ptr + k_far[:, None] * b_k_stride + col_offs[None, :] * b_col_stride
        if ACT != "none":
            saved_ptrs = saved_ptr + row_offs[:, None] * saved_row_stride
            saved_ptrs += k_far[None, :] * saved_k_stride
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for start in range(first, last, BLOCK_K):
            k_mask = k_offs < last - start
            a_mask = row_mask & k_mask[None, :]
            a = tl.load(dy_ptrs, mask=a_mask, other=0.0)
            b = tl.load(b_ptrs, mask=col_mask & k_mask[:, None], other=0.0)
            wide = a.to(tl.float32)
            if ACT != "none":
                saved = tl.load(saved_ptrs, mask=a_mask, other=0.0).to(tl.float32)
                wide *= activate_grad(saved, ACT)
                saved_ptrs += k_step * saved_k_stride
            if ACT != "none" or sums_ptr is not None:
                a = fence(wide.to(a.dtype))
            if sums_ptr is not None:  # noqa: SIM102 (the first is decided when compiling)
                if col == 0:
                    total += wide
            acc = tl.dot(a, b, acc, input_precision="ieee")
            dy_ptrs += k_step * dy_k_stride
            b_ptrs += k_step * b_k_stride
        out_ptrs = out_ptr + row_offs[:, None] * out_row_stride + col_offs[None, :] * out_col_stride
        if ACCUMULATE:
            acc += tl.load(out_ptrs, mask=row_mask & col_mask, other=0.0)
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=row_mask & col_mask)
        if sums_ptr is not None:  # noqa: SIM102
            if col == 0:
                sums_ptrs = sums_ptr + split.to(tl.int64) * sums_stride + row_offs
                tl.store(sums_ptrs, tl.sum(total, axis=1), mask=row_offs < sums_stride)


def sums_in_product(dy: Tensor) -> bool:
    """Whether a product may change or sum its left operand on the way.

    Not with wgmma and tcgen05, which read it from shared memory as it was copied there: Triton
    would pass it through registers that are overwritten while a wgmma still reads them, or fail to
    pipeline the tcgen05.
    """
    return capability(dy)[0] not in BIG_SHARED


def in_product(act: str, dy: Tensor) -> bool:
    """Whether the derivative is taken inside the products: at the cost of a few instructions."""
    return act == "none" or (act in GRAD_FROM_OUTPUT and sums_in_product(dy))


def pass_grid(m: int, n: int, rows: int, like: Tensor) -> tuple[int, int]:
    """Programs along the columns and the rows of an elementwise pass over [m, n]."""
    columns = triton.cdiv(n, PASS_COLS)
    most = triton.cdiv(PASS_WARPS * processors(like), columns)
    return columns, min(triton.cdiv(m, rows), most)


def act_backward(
    dy: Tensor, saved: Tensor | None, act: str, dpre: Tensor | None, dbias: Tensor | None
) -> None:
    """dpre = dy * act'(saved) [M, N] and dbias [N] = its column sums, where they are given.

    Workspace: float32 [rows of programs, N], about 16 programs per multiprocessor.
    """
    m, n = dy.shape
    grid = pass_grid(m, n, PASS_ROWS, dy)
    partial = None if dbias is None else partial_rows(1, grid[1], n, dy)
    _act_backward_kernel[grid](
        dy, saved, dpre, partial,
        m, n,
        *dy.stride(), *(dy if saved is None else saved).stride(), padded(n),
        ACT=act, BLOCK_M=PASS_ROWS, BLOCK_N=PASS_COLS, num_warps=1,
    )  # fmt: skip
    if dbias is not None:
        launch_column_sums(partial, [dbias])


def gradient_product(
    dy: Tensor,
    saved: Tensor | None,
    act: str,
    b: Tensor,
    out: Tensor,
    sums: Tensor | None = None,
    count: Tensor | None = None,
    counts: str = "none",
    accumulate: bool = False,
) -> None:
    """out [M, N] = A @ b and sums [M] = A.sum(1), A = dy * act'(saved) [M, K]; any strides.

    `counts` is "rows" or "depth" where `count`, an int32 on the device, says how many are there;
    with `accumulate`, `out`, float32, grows. Workspace where M N has few tiles and K is long:
    float32 [splits, M, N], at most 16 splits.
    """
    (m, k), n = dy.shape, b.shape[1]
    config = launch_config(capability(dy), dy.dtype, m, n, k)
    if (act != "none" or sums is not None or accumulate) and config.block_m == 128:
        config = THROUGH_REGISTERS
        if accumulate and capability(dy)[0] == 10:  # a wider tile of sums and addresses spills
            config = replace(config, block_n=64, block_k=64)
    splits = 1 if accumulate or counts == "rows" else split_count(config, m, n, k)
    part, part_sums, sums_stride = out, sums, m
    if splits > 1:
        part = out.new_empty((splits, m * n), dtype=torch.float32)
        if sums is not None:
            part_sums, sums_stride = partial_rows(1, splits, m, dy), padded(m)
    steps = triton.cdiv(triton.cdiv(k, config.block_k), splits)
    grid = (config.programs(m, n, processors(dy)), splits)
    _gradient_product_kernel[grid](
        dy, saved, b, part, part_sums, count,
        m, n, k, steps * config.block_k,
        *dy.stride(), *(dy if saved is None else saved).stride(),
        *b.stride(), *out.stride(), sums_stride,
        ACT=act, COUNTS=counts, ACCUMULATE=accumulate, **config.keywords(),
    )  # fmt: skip
    if splits > 1:
        launch_sum_parts(part, out)
        if sums is not None:
            launch_column_sums(part_sums, [sums])
