"""Copies of matrices whose rows begin at multiples of 16 bytes, as the widest loads want them.

A product reads its operands again for every tile. Elements that do not lie 16 bytes after 16 bytes
would be loaded one by one each time, past cp.async and tensor maps: one copy costs less.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels.guards import ALIGNMENT
from pyfast.kernels.matmul import tile_offsets

BLOCK_ROWS, BLOCK_COLS = 8, 256


@triton.jit
def pack_rows_kernel(
    in_ptr, index_ptr, count_ptr, out_ptr,                               # pointers; None: absent
    rows, cols, pieces,                                                  # sizes
    row_stride, col_stride,                                              # strides
    PIECE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out [rows, pieces PIECE] = in[index], zeros past `cols` columns and past `count` rows."""
    row_offs = tile_offsets(tl.program_id(0), BLOCK_ROWS)
    col_offs = tile_offsets(tl.program_id(1), BLOCK_COLS)
    mask = row_offs < rows
    at = row_offs
    if index_ptr is not None:
        at = tl.load(index_ptr + row_offs, mask=mask, other=0)
    there = mask
    if count_ptr is not None:
        there = row_offs < tl.load(count_ptr)
    in_ptrs = in_ptr + at[:, None] * row_stride + col_offs[None, :] * col_stride
    value = tl.load(in_ptrs, mask=there[:, None] & (col_offs < cols)[None, :], other=0.0)
    width = pieces * PIECE
    out_ptrs = out_ptr + row_offs[:, None] * width + col_offs[None, :]
    tl.store(out_ptrs, value, mask=mask[:, None] & (col_offs < width)[None, :])


def whole_columns(cols: int, itemsize: int) -> int:
    """`cols`, or a few more, to the next 16 bytes."""
    piece = ALIGNMENT // itemsize
    return triton.cdiv(cols, piece) * piece


def packed_rows(t: Tensor, index: Tensor | None = None, count: Tensor | None = None) -> Tensor:
    """t [R, C] row by row, or t[index], with zeros up to whole 16 bytes of columns.

    With `count`, an int32 on the device, rows past it are zeros.
    """
    rows, cols = (t.shape[0] if index is None else index.shape[0]), t.shape[1]
    out = t.new_empty(rows, whole_columns(cols, t.itemsize))
    piece = ALIGNMENT // t.itemsize
    grid = triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(out.shape[1], BLOCK_COLS)
    if out.numel():
        pack_rows_kernel[grid](
            t, index, count, out,
            rows, cols, out.shape[1] // piece,
            *t.stride(),
            PIECE=piece, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=BLOCK_COLS, num_warps=4,
        )  # fmt: skip
    return out


def packed(t: Tensor) -> Tensor:
    """t [R, C] with its rows, or its columns if they are whole in memory, 16 bytes after 16 bytes.

    It has up to 15 bytes more of each, zeros.
    """
    return packed_rows(t.t()).t() if t.stride(0) == 1 and t.shape[1] > 1 else packed_rows(t)


def turned(t: Tensor, most: int | None = None) -> Tensor:
    """t [R, C] with its rows side by side if it is float32, as the right operand of a product.

    Threads multiply float32 themselves, each four columns, read from shared memory that Triton
    keeps in the order of memory and does not swizzle for them. Of operands [R, C] as they lie, 16
    lanes then wait for the same bank: 15,750 waves of shared memory for a tile of 64 x 64 x 32,
    2,440 of a copy. It stays as it lies where a copy would take more than `most` bytes.
    """
    if t.dtype != torch.float32 or t.stride(1) != 1 or min(t.shape) <= 1:
        return t
    if most is not None and t.numel() * t.itemsize > most:
        return t
    return packed_rows(t.t()).t()
