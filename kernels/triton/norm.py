"""Kernels of layer_norm (CENTRE: the mean is taken away first) and rms_norm, rows in registers.

A program walks along its rows in tiles that it keeps in registers (see norm_tiles): each is read
once and written once, as are the statistics of its rows.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from pyfast.kernels.norm_tiles import (
    MAX_COLS,
    Layout,
    columns,
    layout_of,
    load_affine,
    load_rows,
    row_sums,
    store_rows,
    walk,
)

EACH_WARP = 256  # elements of a row for each warp that takes them one by one
STATS = 32  # rows whose statistics move at once: one for each lane


class Config(NamedTuple):
    """How many programs walk over the rows, and how."""

    programs: int
    rows_each: int
    layout: Layout
    num_warps: int
    tiles: int  # whose statistics are stored at once
    stats: int  # rows whose statistics are loaded at once


def fits(cols: int, itemsize: int) -> bool:
    """Whether a program can keep a row in its registers."""
    layout, _ = layout_of(cols, itemsize)
    return layout.each * layout.side <= MAX_COLS


def launch_config(rows: int, cols: int, itemsize: int, processors: int) -> Config:
    """The launch for `rows` x `cols` elements of `itemsize` bytes, rows and cols above 0.

    Enough programs for 32 warps on every processor, each with whole tiles and, where it has 8 rows
    or more, with whole sectors of statistics.
    """
    layout, num_warps = layout_of(cols, itemsize)
    layout = layout.loading(rows, cols)
    period, at_once = layout.period, layout.rows
    wanted = max(1, processors * 32 // num_warps // period)
    rows_each = triton.cdiv(triton.cdiv(rows, wanted * period), at_once) * at_once
    if rows_each > 8:
        rows_each = triton.cdiv(rows_each, 8) * 8
    return Config(
        triton.cdiv(rows, rows_each * period) * period,
        rows_each,
        layout,
        num_warps,
        tiles=STATS // at_once if at_once < 8 else 1,
        stats=STATS if at_once == period == 1 else max(at_once, 32 * num_warps),
    )


def forward_warps(config: Config) -> int:
    """The warps of the forward pass: more where rows of up to 8192 begin anywhere.

    A thread of 16 warps would load, add, store and normalise 16 elements one by one, and spill.
    """
    layout = config.layout
    alike = layout.run or layout.period == 1
    return config.num_warps if alike else max(config.num_warps, layout.side // EACH_WARP)


@triton.jit(do_not_specialize=["n_rows", "rows_each", "n_groups"])
def norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    n_rows, rows_each, n_groups, eps,
    CENTRE: tl.constexpr, LAYOUT: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """out = (v - mean) * rstd * weight + bias, v = x + residual; statistics of TILES at once."""
    ROWS: tl.constexpr = LAYOUT.rows
    n_cols = n_groups * LAYOUT.group
    first, n_own, shift = walk(n_rows, n_cols, rows_each, LAYOUT)
    _, is_col = columns(n_cols, shift, LAYOUT)
    if weight_ptr is not None:
        weight = load_affine(weight_ptr, n_cols, shift, LAYOUT)
    if bias_ptr is not None:
        bias = load_affine(bias_ptr, n_cols, shift, LAYOUT)
    tiles = tl.arange(0, TILES)[:, None]
    for begin in range(0, n_own, TILES * ROWS):
        means, rstds = tl.zeros((TILES, ROWS), tl.float32), tl.zeros((TILES, ROWS), tl.float32)
        for i in range(0, tl.minimum(tl.cdiv(n_own - begin, ROWS), TILES)):
            row = begin + i * ROWS
            count = ROWS if ROWS == 1 else tl.minimum(n_own - row, ROWS)
            start = (first + row * LAYOUT.period) * n_cols
            v = load_rows(x_ptr, start, count, n_cols, shift, LAYOUT)
            if residual_ptr is not None:
                v += load_rows(residual_ptr, start, count, n_cols, shift, LAYOUT)
                rounded = v.to(sum_ptr.dtype.element_ty)
                store_rows(sum_ptr, start, count, n_cols, shift, rounded, LAYOUT)
                v = rounded.to(tl.float32)  # what is normalised is the sum as stored
            if CENTRE:
                # exact, as what is left of equal columns grows by 1 / sqrt(eps)
                mean = tl.div_rn(row_sums(v, LAYOUT), n_cols.to(tl.float32))
                means = tl.where(tiles == i, mean[None, :], means)
                v = tl.where(is_col, v - mean[None, :, None], 0.0)
            rstd = 1.0 / tl.sqrt_rn(row_sums(v * v, LAYOUT) / n_cols + eps)
            rstds = tl.where(tiles == i, rstd[None, :], rstds)
            out = v * rstd[None, :, None]
            if weight_ptr is not None:
                out *= weight
            if bias_ptr is not None:
                out += bias
            store_rows(out_ptr, start, count, n_cols, shift, out, LAYOUT)
        rows = begin + tiles * ROWS + tl.arange(0, ROWS)[None, :]
        if CENTRE:
            tl.store(mean_ptr + first + rows * LAYOUT.period, means, mask=rows < n_own)
        tl.store(rstd_ptr + first + rows * LAYOUT.period, rstds, mask=rows < n_own)


@triton.jit
def _statistics(ptr, first, begin, n_own, PERIOD: tl.constexpr, STATS: tl.constexpr):
    """Of STATS rows of the program."""
    rows = begin + tl.arange(0, STATS)
    return tl.load(ptr + first + rows * PERIOD, mask=rows < n_own, other=0.0)


@triton.jit(do_not_specialize=["n_rows", "rows_each", "n_groups"])
def norm_backward_kernel(
    grad_out_ptr, grad_sum_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr, partial_ptr,
    n_rows, rows_each, n_groups, partial_row_stride,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    LAYOUT: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g - mean(g) - xhat mean(g xhat)) + grad_sum, g = grad_out weight; tile by tile.

    The program's own sums of grad_out xhat and of grad_out go to its rows of partial [2, programs].
    Statistics of STATS rows are loaded at once.
    """
    ROWS: tl.constexpr = LAYOUT.rows
    SHAPE: tl.constexpr = (LAYOUT.each, LAYOUT.rows, LAYOUT.side)
    n_cols = n_groups * LAYOUT.group
    first, n_own, shift = walk(n_rows, n_cols, rows_each, LAYOUT)
    if weight_ptr is not None:
        weight = load_affine(weight_ptr, n_cols, shift, LAYOUT)
    dweight, dbias = tl.zeros(SHAPE, tl.float32), tl.zeros(SHAPE, tl.float32)
    slots = tl.arange(0, ROWS)
    means, rstds = tl.zeros((STATS,), tl.float32), tl.zeros((STATS,), tl.float32)
    for begin in range(0, n_own, ROWS):
        if begin % STATS == 0:
            if mean_ptr is not None:
                means = _statistics(mean_ptr, first, begin, n_own, LAYOUT.period, STATS)
            rstds = _statistics(rstd_ptr, first, begin, n_own, LAYOUT.period, STATS)
        start = (first + begin * LAYOUT.period) * n_cols
        count = ROWS if ROWS == 1 else tl.minimum(n_own - begin, ROWS)
        xhat = load_rows(x_ptr, start, count, n_cols, shift, LAYOUT)
        dy = load_rows(grad_out_ptr, start, count, n_cols, shift, LAYOUT)
        rstd = tl.gather(rstds, begin % STATS + slots, 0)[None, :, None]
        if mean_ptr is not None:
            xhat -= tl.gather(means, begin % STATS + slots, 0)[None, :, None]
        xhat *= rstd
        if NEED_WEIGHT:
            dweight += dy * xhat  # past the row dy is 0
        if NEED_BIAS:
            dbias += dy
        g = dy * weight if weight_ptr is not None else dy
        dx = g - xhat * (row_sums(g * xhat, LAYOUT) / n_cols)[None, :, None]
        if mean_ptr is not None:
            dx -= tl.div_rn(row_sums(g, LAYOUT), n_cols.to(tl.float32))[None, :, None]
        dx *= rstd
        if grad_sum_ptr is not None:
            dx += load_rows(grad_sum_ptr, start, count, n_cols, shift, LAYOUT)
        store_rows(dx_ptr, start, count, n_cols, shift, dx, LAYOUT)
    offs, mask = columns(partial_row_stride, shift, LAYOUT)  # with the zeros at the end
    offs, mask = tl.sum(offs, axis=1), tl.sum(mask.to(tl.int32), axis=1) > 0
    partial_ptr += tl.program_id(0).to(tl.int64) * partial_row_stride - shift
    if NEED_WEIGHT:
        tl.store(partial_ptr + offs, tl.sum(dweight, axis=1), mask=mask)
        partial_ptr += tl.num_programs(0).to(tl.int64) * partial_row_stride
    if NEED_BIAS:
        tl.store(partial_ptr + offs, tl.sum(dbias, axis=1), mask=mask)
