"""Kernels of layer_norm (CENTRE) and rms_norm for rows that do not fit into registers.

A program walks along a row in blocks, and once more to write: the second read comes from a cache.
Blocks begin where sectors of the row do. Those of weight and bias, which need not, are loaded from
their own sectors and moved up to the row's through shared memory.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pyfast.kernels.column_sums import padded
from pyfast.kernels.norm_tiles import SECTOR, vector_group

BLOCK_COLS = 4096
STRIP_COLS = 1024  # of the weight gradient
STRIPS = 4  # programs for every processor


class Config(NamedTuple):
    """One program a row, and `parts` programs for every strip of columns of the weight gradient."""

    strips: int
    parts: int
    group: int
    sector: int


def launch_config(rows: int, cols: int, itemsize: int, processors: int) -> Config:
    """The launch for `rows` x `cols` elements of `itemsize` bytes."""
    sector, group = SECTOR // itemsize, vector_group(cols, itemsize)
    strips = triton.cdiv(padded(cols) + sector - group, STRIP_COLS)
    period = sector // group  # rows so far apart begin at the same distance from a sector
    parts = max(1, min(rows, processors * STRIPS // strips))
    return Config(strips, triton.cdiv(parts, period) * period, group, sector)


@triton.jit
def _row_and_offs(n_cols, SECTOR: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Where this program's row begins, and its first columns, from the sector it begins in."""
    start = tl.program_id(0).to(tl.int64) * n_cols
    return start, tl.arange(0, BLOCK_COLS) - (start % SECTOR).to(tl.int32)


@triton.jit
def _inside(offs, n_cols):
    """Which are columns: one comparison, as what is below 0 is far above them unsigned."""
    return offs.to(tl.uint32, bitcast=True) < n_cols.to(tl.uint32)


@triton.jit
def _taken(v, mask, mean, squares, seen, late):
    """Mean and squared deviations with one more element, after `seen` or, where `late`, one less.

    That is all the same but in the last block: nothing is divided for each element.
    """
    rate = tl.where(late > 0, 1.0 / tl.maximum(seen, 1), 1.0 / (seen + 1))
    d = tl.where(mask, v - mean, 0.0)
    mean += d * rate
    return mean, squares + d * (v - mean)


@triton.jit
def _nothing(ptr, BLOCK_COLS: tl.constexpr):
    """What `_beside` moves up into the first block."""
    return tl.zeros((BLOCK_COLS,), tl.float32 if ptr is None else ptr.dtype.element_ty)


@triton.jit
def _beside(ptr, before, begin, first_offs, n_cols, ALIGNED: tl.constexpr):
    """The weights of a block of columns, and those moved up that the next one begins with."""
    if ALIGNED:
        offs = first_offs + begin
        moved, values = before, tl.load(ptr + offs, mask=_inside(offs, n_cols), other=0.0)
    else:
        slots = begin + tl.arange(0, before.shape[0])
        slots = tl.max_contiguous(slots, 1)  # lanes side by side, as the row is loaded and stored
        block = tl.load(ptr + slots, mask=slots < n_cols, other=0.0)
        moved = tl.gather(block, first_offs & (before.shape[0] - 1), 0)
        values = tl.where(first_offs < 0, before, moved)
    return values.to(tl.float32), moved


@triton.jit(do_not_specialize=["n_groups"])
def wide_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    n_groups, eps,
    CENTRE: tl.constexpr, GROUP: tl.constexpr, SECTOR: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = (v - mean) * rstd * weight + bias, v = x + residual; one program, one row.

    Every lane keeps the mean and the squared deviations of what it has seen (Welford, 1962): the
    difference of two large sums would lose the digits.
    """
    n_cols = n_groups * GROUP
    start, first_offs = _row_and_offs(n_cols, SECTOR, BLOCK_COLS)
    late = (first_offs < 0).to(tl.int32)
    count = (tl.cdiv(n_cols - first_offs, BLOCK_COLS) - late).to(tl.float32)
    mean = tl.zeros((BLOCK_COLS,), tl.float32)
    squares = tl.zeros((BLOCK_COLS,), tl.float32)
    for begin in range(0, n_cols + SECTOR - GROUP, BLOCK_COLS):
        offs = first_offs + begin
        mask = _inside(offs, n_cols)
        v = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            v += tl.load(residual_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
            rounded = v.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + start + offs, rounded, mask=mask)
            v = rounded.to(tl.float32)
        if CENTRE:
            mean, squares = _taken(v, mask, mean, squares, begin // BLOCK_COLS, late)
        else:
            squares += v * v
    row_mean = 0.0
    total = tl.sum(squares, axis=0)
    if CENTRE:
        row_mean = tl.div_rn(tl.sum(count * mean, axis=0), n_cols.to(tl.float32))
        d = mean - row_mean
        total += tl.sum(count * d * d, axis=0)
        tl.store(mean_ptr + tl.program_id(0), row_mean)
    rstd = 1.0 / tl.sqrt_rn(total / n_cols + eps)
    tl.store(rstd_ptr + tl.program_id(0), rstd)
    v_ptr = x_ptr if residual_ptr is None else sum_ptr
    weights, biases = _nothing(weight_ptr, BLOCK_COLS), _nothing(bias_ptr, BLOCK_COLS)
    for begin in range(0, n_cols + SECTOR - GROUP, BLOCK_COLS):
        offs = first_offs + begin
        mask = _inside(offs, n_cols)
        v = tl.load(v_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        out = (v - row_mean) * rstd
        if weight_ptr is not None:
            weight, weights = _beside(
                weight_ptr, weights, begin, first_offs, n_cols, GROUP == SECTOR
            )
            out *= weight
        if bias_ptr is not None:
            bias, biases = _beside(bias_ptr, biases, begin, first_offs, n_cols, GROUP == SECTOR)
            out += bias
        tl.store(out_ptr + start + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _xhat_and_dy(x_ptr, grad_out_ptr, start, offs, mask, mean, rstd):
    """The normalised row and the gradient of what was made of it, a block of it."""
    x = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(grad_out_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    return (x - mean) * rstd, dy


@triton.jit(do_not_specialize=["n_groups"])
def wide_norm_backward_kernel(
    grad_out_ptr, grad_sum_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr,
    n_groups,
    GROUP: tl.constexpr, SECTOR: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g - mean(g) - xhat mean(g xhat)) + grad_sum, g = grad_out weight; one row.

    No mean(g) where there is no mean.
    """
    row = tl.program_id(0)
    n_cols = n_groups * GROUP
    start, first_offs = _row_and_offs(n_cols, SECTOR, BLOCK_COLS)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    g_sums = tl.zeros((BLOCK_COLS,), tl.float32)
    gx_sums = tl.zeros((BLOCK_COLS,), tl.float32)
    weights = _nothing(weight_ptr, BLOCK_COLS)
    for begin in range(0, n_cols + SECTOR - GROUP, BLOCK_COLS):
        offs = first_offs + begin
        mask = _inside(offs, n_cols)
        xhat, g = _xhat_and_dy(x_ptr, grad_out_ptr, start, offs, mask, mean, rstd)
        if weight_ptr is not None:
            weight, weights = _beside(
                weight_ptr, weights, begin, first_offs, n_cols, GROUP == SECTOR
            )
            g *= weight
        g_sums += g
        gx_sums += g * xhat
    gx_mean = tl.sum(gx_sums, axis=0) / n_cols
    g_mean = 0.0
    if mean_ptr is not None:
        g_mean = tl.div_rn(tl.sum(g_sums, axis=0), n_cols.to(tl.float32))
    for begin in range(0, n_cols + SECTOR - GROUP, BLOCK_COLS):
        offs = first_offs + begin
        mask = _inside(offs, n_cols)
        xhat, g = _xhat_and_dy(x_ptr, grad_out_ptr, start, offs, mask, mean, rstd)
        if weight_ptr is not None:
            weight, weights = _beside(
                weight_ptr, weights, begin, first_offs, n_cols, GROUP == SECTOR
            )
            g *= weight
        dx = (g - xhat * gx_mean - g_mean) * rstd
        if grad_sum_ptr is not None:
            dx += tl.load(grad_sum_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + start + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "n_groups", "partial_row_stride"])
def wide_norm_weight_kernel(
    grad_out_ptr, x_ptr, mean_ptr, rstd_ptr, partial_ptr,
    n_rows, n_groups, partial_row_stride,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    GROUP: tl.constexpr, SECTOR: tl.constexpr, STRIP_COLS: tl.constexpr,
):  # fmt: skip
    """Sums of grad_out xhat and of grad_out over every n-th row, a strip of columns.

    n is such that the rows of a program begin at the same distance from a sector; so do its strips.
    """
    n_cols = n_groups * GROUP
    shift = (tl.program_id(1) % SECTOR) * (n_cols % SECTOR) % SECTOR
    offs = tl.program_id(0) * STRIP_COLS + tl.arange(0, STRIP_COLS) - shift
    dweight = tl.zeros((STRIP_COLS,), tl.float32)
    dbias = tl.zeros((STRIP_COLS,), tl.float32)
    for row in range(tl.program_id(1), n_rows, tl.num_programs(1)):
        mean = 0.0
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row)
        start, rstd = row.to(tl.int64) * n_cols, tl.load(rstd_ptr + row)
        mask = _inside(offs, n_cols)
        xhat, dy = _xhat_and_dy(x_ptr, grad_out_ptr, start, offs, mask, mean, rstd)
        dweight += dy * xhat
        dbias += dy
    plane = tl.program_id(1).to(tl.int64) * partial_row_stride
    mask = (offs >= 0) & (offs < partial_row_stride)  # with the zeros at the end
    if NEED_WEIGHT:
        tl.store(partial_ptr + plane + offs, dweight, mask=mask)
        plane += tl.num_programs(1).to(tl.int64) * partial_row_stride
    if NEED_BIAS:
        tl.store(partial_ptr + plane + offs, dbias, mask=mask)
