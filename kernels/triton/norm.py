"""Kernels of layer_norm (CENTRE: the mean is taken away first) and rms_norm for rows that fit.

A program keeps one row in registers: it is read once and written once. It walks over rows so far
apart that they all begin at the same distance from a 32-byte sector, holds the weight in registers
meanwhile, and reads each row from the sector it begins in, so that no access of a warp straddles
one more sector than it fills, whatever the number of columns. Without that, rows of a number of
columns that is no multiple of 16 would be read at 25 to 80% of the sectors' worth.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from pyfast.kernels.column_sums import padded

SECTOR = 32  # bytes; what memory delivers at once
MAX_COLS = 8192  # more do not fit into the registers of one program


class Config(NamedTuple):
    """How many programs walk over the rows, and how."""

    programs: int
    block_cols: int  # covers a row and its distance from a sector
    group: int  # elements; divides every offset a row can begin at
    sector: int  # elements
    num_warps: int


def launch_config(rows: int, cols: int, itemsize: int, processors: int) -> Config:
    """The launch for `rows` x `cols` elements of `itemsize` bytes, rows and cols above 0.

    16 elements a thread; enough programs for 32 warps on every processor.
    """
    sector = SECTOR // itemsize
    group = math.gcd(cols, sector)
    block = max(32, triton.next_power_of_2(padded(cols) + sector - group))
    num_warps = min(16, max(1, block // 512))
    period = sector // group  # rows so far apart begin at the same distance from a sector
    wanted = max(1, processors * 32 // num_warps // period)
    programs = min(wanted, triton.cdiv(rows, period)) * period
    return Config(programs, block, group, sector, num_warps)


@triton.jit
def _window(n_cols, GROUP: tl.constexpr, SECTOR: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The columns this program reads at once, from the sector its rows begin in, and which are."""
    col_offs = tl.arange(0, BLOCK_COLS)
    if GROUP < SECTOR:
        col_offs -= (tl.program_id(0) % SECTOR) * (n_cols % SECTOR) % SECTOR
    return col_offs, (col_offs >= 0) & (col_offs < n_cols)


@triton.jit(do_not_specialize=["n_rows", "n_groups"])
def norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    n_rows, n_groups, eps,
    CENTRE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, SECTOR: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = (v - mean) * rstd * weight + bias, v = x + residual; a program takes every n-th row."""
    n_cols = n_groups * GROUP
    col_offs, col_mask = _window(n_cols, GROUP, SECTOR, BLOCK_COLS)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + col_offs, mask=col_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col_offs, mask=col_mask, other=0.0).to(tl.float32)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        start = row.to(tl.int64) * n_cols
        v = tl.load(x_ptr + start + col_offs, mask=col_mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            v += tl.load(residual_ptr + start + col_offs, mask=col_mask, other=0.0).to(tl.float32)
            rounded = v.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + start + col_offs, rounded, mask=col_mask)
            v = rounded.to(tl.float32)  # what is normalised is the sum as stored
        if CENTRE:
            mean = tl.sum(v, axis=0) / n_cols
            tl.store(mean_ptr + row, mean)
            v = tl.where(col_mask, v - mean, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(v * v, axis=0) / n_cols + eps)
        tl.store(rstd_ptr + row, rstd)
        out = v * rstd
        if HAS_WEIGHT:
            out *= weight
        if HAS_BIAS:
            out += bias
        tl.store(out_ptr + start + col_offs, out.to(out_ptr.dtype.element_ty), mask=col_mask)


@triton.jit(do_not_specialize=["n_rows", "n_groups"])
def norm_backward_kernel(
    grad_out_ptr, grad_sum_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr, partial_ptr,
    n_rows, n_groups, partial_row_stride,
    CENTRE: tl.constexpr, HAS_SUM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    GROUP: tl.constexpr, SECTOR: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g - mean(g) - xhat mean(g xhat)) + grad_sum, g = grad_out weight; a row at a time.

    The program's own sums of grad_out xhat and of grad_out go to its rows of partial [2, programs].
    """
    n_cols = n_groups * GROUP
    col_offs, col_mask = _window(n_cols, GROUP, SECTOR, BLOCK_COLS)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + col_offs, mask=col_mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_COLS,), tl.float32)
    dbias = tl.zeros((BLOCK_COLS,), tl.float32)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        start = row.to(tl.int64) * n_cols
        xhat = tl.load(x_ptr + start + col_offs, mask=col_mask, other=0.0).to(tl.float32)
        dy = tl.load(grad_out_ptr + start + col_offs, mask=col_mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if CENTRE:
            xhat -= tl.load(mean_ptr + row)
        xhat *= rstd
        if NEED_WEIGHT:
            dweight += dy * xhat  # past the row dy is 0
        if NEED_BIAS:
            dbias += dy
        g = dy
        if HAS_WEIGHT:
            g = dy * weight
        dx = g - xhat * (tl.sum(g * xhat, axis=0) / n_cols)
        if CENTRE:
            dx -= tl.sum(g, axis=0) / n_cols
        dx *= rstd
        if HAS_SUM:
            dx += tl.load(grad_sum_ptr + start + col_offs, mask=col_mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + start + col_offs, dx.to(dx_ptr.dtype.element_ty), mask=col_mask)
    partial_mask = (col_offs >= 0) & (col_offs < partial_row_stride)  # with the zeros at the end
    plane = tl.program_id(0).to(tl.int64) * partial_row_stride
    if NEED_WEIGHT:
        tl.store(partial_ptr + plane + col_offs, dweight, mask=partial_mask)
        plane += tl.num_programs(0).to(tl.int64) * partial_row_stride
    if NEED_BIAS:
        tl.store(partial_ptr + plane + col_offs, dbias, mask=partial_mask)
