"""Gradients of linear layers: dX = dP W and dW = dP^T X, with dP = dY * act'(saved).

The derivative has two places. Where it follows from the output it costs a few instructions and is
taken inside the products, on the operand just loaded, and the bias gradient with it: dY and the
output are read, nothing else is written. Derivatives with erf or exp would be made again for every
tile beside the first, which costs more than the product: one pass makes them once.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels.activations import activate_grad
from pyfast.kernels.column_sums import launch_column_sums, padded, partial_rows
from pyfast.kernels.matmul import tile_offsets, whole
from pyfast.kernels.processors import processors
from pyfast.kernels.tensor_maps import whole_order

PASS_ROWS, PASS_COLS = 4, 256  # of the elementwise pass of one warp: a lane adds up whole columns
PASS_WARPS = 16  # of it, on each multiprocessor


@triton.jit
def _act_backward_kernel(
    dy_ptr, saved_ptr, dpre_ptr, sums_ptr,                               # pointers; None: absent
    M, N, width,                                                         # sizes
    dy_row_stride, dy_col_stride, saved_row_stride, saved_col_stride, sums_stride,
    ACT: tl.constexpr, ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dpre = dy * act'(saved) [M, width], and in sums[p] the column sums of the rows of program p.

    Columns of dpre past N are zeros. ORDER is that of dy and saved, see `tensor_maps.whole_order`.
    A program takes BLOCK_N columns and every num_programs(1)-th block of rows.
    """
    if ORDER == "rows":
        N, width = whole(N, dy_ptr), whole(width, dy_ptr)
        dy_row_stride = whole(dy_row_stride, dy_ptr)
        saved_row_stride = whole(saved_row_stride, dy_ptr)
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
            at = row_offs[:, None] * width + col_offs[None, :]
            mask = (row_offs[:, None] < M) & (col_offs[None, :] < width)
            tl.store(dpre_ptr + at, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        total += dpre
    if sums_ptr is not None:
        sums_ptrs = sums_ptr + tl.program_id(1).to(tl.int64) * sums_stride + col_offs
        tl.store(sums_ptrs, tl.sum(total, axis=0), mask=col_offs < sums_stride)


def pass_grid(m: int, n: int, rows: int, like: Tensor) -> tuple[int, int]:
    """Programs along the columns and the rows of an elementwise pass over [m, n]."""
    columns = triton.cdiv(n, PASS_COLS)
    most = triton.cdiv(PASS_WARPS * processors(like), columns)
    return columns, min(triton.cdiv(m, rows), most)


def act_backward(
    dy: Tensor, saved: Tensor | None, act: str, dpre: Tensor | None, dbias: Tensor | None
) -> None:
    """dpre = dy * act'(saved) and dbias [N] = its column sums, where they are given.

    dpre is [M, N], or has columns of zeros after those of dy.

    Workspace: float32 [rows of programs, N], about 16 programs per multiprocessor.
    """
    m, n = dy.shape
    wide = all(whole_order(t) == "rows" for t in (dy, saved) if t is not None)
    rows = PASS_ROWS if wide else PASS_ROWS // 2  # elements one by one want more registers
    grid = pass_grid(m, n, rows, dy)
    partial = None if dbias is None else partial_rows(1, grid[1], n, dy)
    _act_backward_kernel[grid](
        dy, saved, dpre, partial,
        m, n, n if dpre is None else dpre.shape[1],
        *dy.stride(), *(dy if saved is None else saved).stride(), padded(n),
        ACT=act, ORDER="rows" if wide else "any", BLOCK_M=rows, BLOCK_N=PASS_COLS, num_warps=1,
    )  # fmt: skip
    if dbias is not None:
        launch_column_sums(partial, [dbias])
