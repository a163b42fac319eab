"""The second step of a weight gradient: adds up the rows that the programs of the first left."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_COLS = 32, 32  # one warp: its lanes add up without shared memory
PADDING = tl.constexpr(8)  # columns: rows of partial sums are whole sectors, zeros at the end


def padded(cols: int) -> int:
    """The row length of partial sums of `cols` columns."""
    return triton.cdiv(cols, PADDING.value) * PADDING.value


def partial_rows(planes: int, rows: int, cols: int, like: Tensor) -> Tensor:
    """Room for `planes` times `rows` partial sums of `cols` columns."""
    return torch.empty((planes, rows, padded(cols)), dtype=torch.float32, device=like.device)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "n_padded"])
def column_sums_kernel(
    partial_ptr, first_ptr, second_ptr,
    n_rows, n_cols, n_padded,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """first[c] = sum of partial[0, :, c], second[c] of partial[1, :, c], always in one order."""
    col_offs = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_stride = n_padded * PADDING
    col_mask = col_offs < row_stride
    plane = tl.program_id(1).to(tl.int64) * n_rows
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for begin in range(0, n_rows, BLOCK_ROWS):
        row_offs = begin + tl.arange(0, BLOCK_ROWS)
        offs = (plane + row_offs)[:, None] * row_stride + col_offs[None, :]
        mask = (row_offs < n_rows)[:, None] & col_mask[None, :]
        total += tl.load(partial_ptr + offs, mask=mask, other=0.0)
    column = tl.sum(total, axis=0)
    col_mask = col_offs < n_cols
    if tl.program_id(1) == 0:
        tl.store(first_ptr + col_offs, column.to(first_ptr.dtype.element_ty), mask=col_mask)
    else:
        tl.store(second_ptr + col_offs, column.to(second_ptr.dtype.element_ty), mask=col_mask)


def launch_column_sums(partial: Tensor, sums: list[Tensor]) -> None:
    """sums[i][c] = the sum of partial[i, :, c]; one or two planes."""
    grid = (triton.cdiv(sums[0].numel(), BLOCK_COLS), len(sums))
    column_sums_kernel[grid](
        partial, sums[0], sums[-1],
        partial.shape[1], sums[0].numel(), partial.shape[2] // PADDING.value,
        BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=BLOCK_COLS, num_warps=1,
    )  # fmt: skip
