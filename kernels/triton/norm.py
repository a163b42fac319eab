"""Kernels of layer_norm (CENTRE: the mean is taken away first) and rms_norm, rows in registers.

A program keeps one row in registers: it is read once and written once. Its rows lie one after the
other where they are whole sectors of 32 bytes, else so far apart that they all begin at the same
distance from a sector: it holds the weight in registers meanwhile, and reads each row from the
sector it begins in, so that no access of a warp straddles one more sector than it fills. Without
that, rows of a number of columns that is no multiple of 16 would be read at 25 to 80% of the
sectors' worth. Statistics of up to STATS rows move at once: row by row each would cost a sector.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from pyfast.kernels.column_sums import padded

SECTOR = 32  # bytes; what memory delivers at once
MAX_BLOCK = 8192  # columns; more do not fit into the registers of one program
STATS = tl.constexpr(32)  # rows; one for each lane


class Config(NamedTuple):
    """How many programs walk over the rows, and how."""

    programs: int
    rows_each: int
    block_cols: int  # covers a row and its distance from a sector
    group: int  # elements; divides every offset a row can begin at
    sector: int  # elements
    num_warps: int
    ahead: int  # rows whose statistics are loaded at once


def vector_group(cols: int, itemsize: int) -> int:
    """Elements, up to a sector, that divide every offset a row of `cols` can begin at."""
    return math.gcd(cols, SECTOR // itemsize)


def fits(cols: int, itemsize: int) -> bool:
    """Whether a program can keep a row in its registers."""
    return launch_config(1, cols, itemsize, 1).block_cols <= MAX_BLOCK


def launch_config(rows: int, cols: int, itemsize: int, processors: int) -> Config:
    """The launch for `rows` x `cols` elements of `itemsize` bytes, rows and cols above 0.

    8 elements a thread, 16 of the widest rows; enough programs for 32 warps on every processor.
    Where they have 8 rows or more, they have a multiple of 8, whose statistics fill sectors.
    """
    sector, group = SECTOR // itemsize, vector_group(cols, itemsize)
    block = max(32, triton.next_power_of_2(padded(cols) + sector - group))
    num_warps = min(16, max(1, block // 256))
    period = sector // group  # rows so far apart begin at the same distance from a sector
    wanted = max(1, processors * 32 // num_warps // period)
    rows_each = triton.cdiv(rows, wanted * period)
    if rows_each > 8:
        rows_each = triton.cdiv(rows_each, 8) * 8
    programs = triton.cdiv(rows, rows_each * period) * period
    ahead = 32 * num_warps if period > 1 else 32
    return Config(programs, rows_each, block, group, sector, num_warps, ahead)


@triton.jit
def _walk(n_rows, rows_each, PERIOD: tl.constexpr):
    """The first row of this program and how many it has, PERIOD apart."""
    first = (tl.program_id(0) // PERIOD).to(tl.int64) * (rows_each * PERIOD)
    first += tl.program_id(0) % PERIOD
    return first, tl.minimum(rows_each, tl.cdiv(n_rows - first, PERIOD)).to(tl.int32)


@triton.jit
def _window(n_cols, GROUP: tl.constexpr, SECTOR: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """What this program reads at once: how far before its rows that begins, and which are columns.

    Offsets into a row are `offs` less that distance, which goes to the pointers: added to every
    offset it would take a register for the address of every element.
    """
    offs = tl.arange(0, BLOCK_COLS)
    shift = 0
    if GROUP < SECTOR:
        shift = (tl.program_id(0) % SECTOR) * (n_cols % SECTOR) % SECTOR
    return shift, offs, (offs >= shift) & (offs < shift + n_cols)


@triton.jit(do_not_specialize=["n_rows", "rows_each", "n_groups"])
def norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    n_rows, rows_each, n_groups, eps,
    CENTRE: tl.constexpr, GROUP: tl.constexpr, SECTOR: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = (v - mean) * rstd * weight + bias, v = x + residual; row by row."""
    PERIOD: tl.constexpr = SECTOR // GROUP
    n_cols = n_groups * GROUP
    shift, offs, mask = _window(n_cols, GROUP, SECTOR, BLOCK_COLS)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr - shift + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr - shift + offs, mask=mask, other=0.0).to(tl.float32)
    first, count = _walk(n_rows, rows_each, PERIOD)
    slots = tl.arange(0, STATS)
    for begin in range(0, count, STATS):
        means = tl.zeros((STATS,), tl.float32)
        rstds = tl.zeros((STATS,), tl.float32)
        for i in range(0, tl.minimum(count - begin, STATS)):
            start = (first + (begin + i) * PERIOD) * n_cols - shift
            v = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
            if residual_ptr is not None:
                v += tl.load(residual_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
                rounded = v.to(sum_ptr.dtype.element_ty)
                tl.store(sum_ptr + start + offs, rounded, mask=mask)
                v = rounded.to(tl.float32)  # what is normalised is the sum as stored
            if CENTRE:
                # exact, as what is left of equal columns grows by 1 / sqrt(eps)
                mean = tl.div_rn(tl.sum(v, axis=0), n_cols.to(tl.float32))
                means = tl.where(slots == i, mean, means)
                v = tl.where(mask, v - mean, 0.0)
            rstd = 1.0 / tl.sqrt_rn(tl.sum(v * v, axis=0) / n_cols + eps)
            rstds = tl.where(slots == i, rstd, rstds)
            out = v * rstd
            if weight_ptr is not None:
                out *= weight
            if bias_ptr is not None:
                out += bias
            tl.store(out_ptr + start + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
        rows, row_mask = first + (begin + slots) * PERIOD, begin + slots < count
        if CENTRE:
            tl.store(mean_ptr + rows, means, mask=row_mask)
        tl.store(rstd_ptr + rows, rstds, mask=row_mask)


@triton.jit
def _statistics(ptr, first, begin, count, PERIOD: tl.constexpr, AHEAD: tl.constexpr):
    """Of AHEAD rows of the program, each loaded by one lane."""
    rows = begin + tl.arange(0, AHEAD)
    return tl.load(ptr + first + rows * PERIOD, mask=rows < count, other=0.0)


@triton.jit
def _next(ahead, begin, AHEAD: tl.constexpr):
    """STATS of these, in every warp."""
    slots = begin % AHEAD + tl.arange(0, STATS)
    return tl.gather(ahead, slots, 0) if AHEAD > STATS else ahead


@triton.jit(do_not_specialize=["n_rows", "rows_each", "n_groups"])
def norm_backward_kernel(
    grad_out_ptr, grad_sum_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr, partial_ptr,
    n_rows, rows_each, n_groups, partial_row_stride,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    GROUP: tl.constexpr, SECTOR: tl.constexpr, BLOCK_COLS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g - mean(g) - xhat mean(g xhat)) + grad_sum, g = grad_out weight; a row at a time.

    The program's own sums of grad_out xhat and of grad_out go to its rows of partial [2, programs].
    Statistics of AHEAD rows are loaded at once, each by one lane, where they lie sectors apart.
    """
    PERIOD: tl.constexpr = SECTOR // GROUP
    n_cols = n_groups * GROUP
    shift, offs, mask = _window(n_cols, GROUP, SECTOR, BLOCK_COLS)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr - shift + offs, mask=mask, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros((BLOCK_COLS,), tl.float32), tl.zeros((BLOCK_COLS,), tl.float32)
    first, count = _walk(n_rows, rows_each, PERIOD)
    slots = tl.arange(0, STATS)
    means_ahead, rstds_ahead = tl.zeros((AHEAD,), tl.float32), tl.zeros((AHEAD,), tl.float32)
    for begin in range(0, count, STATS):
        if begin % AHEAD == 0:
            if mean_ptr is not None:
                means_ahead = _statistics(mean_ptr, first, begin, count, PERIOD, AHEAD)
            rstds_ahead = _statistics(rstd_ptr, first, begin, count, PERIOD, AHEAD)
        rstds = _next(rstds_ahead, begin, AHEAD)
        if mean_ptr is not None:
            means = _next(means_ahead, begin, AHEAD)
        for i in range(0, tl.minimum(count - begin, STATS)):
            start = (first + (begin + i) * PERIOD) * n_cols - shift
            xhat = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(grad_out_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.sum(tl.where(slots == i, rstds, 0.0), axis=0)
            if mean_ptr is not None:
                xhat -= tl.sum(tl.where(slots == i, means, 0.0), axis=0)
            xhat *= rstd
            if NEED_WEIGHT:
                dweight += dy * xhat  # past the row dy is 0
            if NEED_BIAS:
                dbias += dy
            g = dy * weight if weight_ptr is not None else dy
            dx = g - xhat * (tl.sum(g * xhat, axis=0) / n_cols)
            if mean_ptr is not None:
                dx -= tl.div_rn(tl.sum(g, axis=0), n_cols.to(tl.float32))
            dx *= rstd
            if grad_sum_ptr is not None:
                dx += tl.load(grad_sum_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + start + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial_mask = (offs >= shift) & (offs < shift + partial_row_stride)  # zeros at the end
    plane = tl.program_id(0).to(tl.int64) * partial_row_stride - shift
    if NEED_WEIGHT:
        tl.store(partial_ptr + plane + offs, dweight, mask=partial_mask)
        plane += tl.num_programs(0).to(tl.int64) * partial_row_stride
    if NEED_BIAS:
        tl.store(partial_ptr + plane + offs, dbias, mask=partial_mask)
