"""cross_entropy of short rows: a program has a tile of neighbours and all that is known of them.

A row by itself asks for whole sectors of its target, its results and its ends: of 10 classes, 5
times the bytes that must move. Neighbours are read and written as one run, see norm_tiles. The
gradient is made where the run lies: a row's few numbers go to its elements, which stay in place.
"""

import triton
import triton.language as tl

from pyfast.kernels.norm_tiles import (
    SECTOR,
    Layout,
    columns,
    load_affine,
    load_rows,
    row_of,
    row_sums,
    run_of,
    vector_group,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # and not -inf: a row of nothing but -inf adds 0
HUGE = tl.constexpr(1e30)  # logits beyond it are masks, from which differences would overflow
NO_CLASS, IGNORED = tl.constexpr(-1), tl.constexpr(-2)  # places of targets that are no column
MAX_COLS = 1023  # of longer rows what is known of each is little
ELEMENTS = 4096  # of a tile,
LEAST_ROWS = 8  # or more: their losses fill a sector;
MOST_ROWS = 256  # one for each thread
PROGRAMS_EACH = 16  # of a multiprocessor: about what it holds at once


def tile_layout(cols: int, itemsize: int, smoothed_weights: bool) -> tuple[Layout, int]:
    """For rows of `cols` elements of `itemsize` bytes; the warps.

    Two at least: in one, Triton gathers by shuffles, each of every element. A thread has 64
    elements, or 32 where weights of classes are smoothed, too: more would spill.
    """
    each_warp = 1024 if smoothed_weights else 2048
    sector, group = SECTOR // itemsize, vector_group(cols, itemsize)
    covered = triton.next_power_of_2(cols)
    rows = min(MOST_ROWS, max(LEAST_ROWS, ELEMENTS // covered))
    warps = max(2, min(8, max(rows * covered // each_warp, rows // 32)))
    each = min(covered, rows * covered // (32 * warps))
    apart = 0 if rows * cols % sector == 0 else sector - group
    run = triton.next_power_of_2(rows * cols + apart)
    return Layout(group, sector, 1, each, rows, covered // each, run), warps


def forward_layout(layout: Layout, cols: int) -> Layout:
    """Rows of whole sectors lie where they are loaded; others are skewed where banks want it."""
    covered, banked = layout.each * layout.side, 4 * layout.sector
    if layout.group == layout.sector:
        return layout._replace(each=1, side=covered, run=0)
    apart = [row * cols % banked for row in range(32 // layout.side)] if layout.side < 32 else [0]
    banks = {(at + i) % banked * 8 // layout.sector for at in apart for i in range(layout.side)}
    crowded = len(banks) < layout.side * len(apart) * 8 // layout.sector
    return layout._replace(skewed=crowded and covered >= banked)


def backward_layout(layout: Layout, warps: int) -> tuple[Layout, int]:
    """Twice the warps of forward: a thread has four numbers of the row of each element, too."""
    warps = min(2 * warps, max(warps, layout.run // 512))
    covered, side = layout.each * layout.side, max(1, 32 * warps // layout.rows)
    return layout._replace(each=covered // side, side=side), warps


@triton.jit
def _of_rows(values):
    """[ROWS] beside a tile [EACH, ROWS, SIDE]."""
    return values[None, :, None]


@triton.jit
def _row_maxima(values, LAYOUT: tl.constexpr):
    """[ROWS] of [EACH, ROWS, SIDE]."""
    each = tl.max(values, axis=0, keep_dims=True)
    return tl.reshape(tl.max(each, axis=2), (LAYOUT.rows,))


@triton.jit
def _rows_of(
    tile, target_ptr, n_rows, n_cols, ignore_index, LAYOUT: tl.constexpr, SIDE: tl.constexpr
):
    """The first row of a tile, how many there are, which, and the columns of their targets.

    NO_CLASS or IGNORED where that is none. Of the SIDE threads of a row one loads its target: all
    of them, in every layout it is wanted in, would be 7 in 100 more sectors of 100 classes.
    """
    first = tile.to(tl.int64) * LAYOUT.rows
    count = tl.minimum(n_rows - first, LAYOUT.rows).to(tl.int32)
    rows = tl.arange(0, LAYOUT.rows)
    side = tl.arange(0, SIDE)[None, :]
    mask = (rows < count)[:, None] & (side == 0)
    target = tl.load(target_ptr + first + rows[:, None] + 0 * side, mask=mask, other=0)
    target = tl.where(rows < count, tl.sum(target, axis=1), ignore_index)
    place = tl.where((target >= 0) & (target < n_cols), target, NO_CLASS)
    place = tl.where(target == ignore_index, IGNORED, place)
    return first, count, rows, place.to(tl.int32)


@triton.jit
def _pairs(ptr, first, rows, count):
    """Pointers to two numbers of each row [ROWS, 2], side by side, and which there are."""
    offs = 2 * rows[:, None] + tl.arange(0, 2)[None, :]
    return ptr + 2 * first + offs, (rows < count)[:, None]


@triton.jit
def _load_pairs(ptr, first, rows, count, LAYOUT: tl.constexpr):
    """Those numbers, each loaded by one of the SIDE threads of a row."""
    ptrs, mask = _pairs(ptr, first, rows, count)
    side = tl.arange(0, (LAYOUT.side + 1) // 2)[None, None, :]
    mask = mask[:, :, None] & (side == 0)
    return tl.split(tl.sum(tl.load(ptrs[:, :, None] + 0 * side, mask=mask, other=0.0), axis=2))


@triton.jit(do_not_specialize=["n_rows", "n_groups", "ignore_index"])
def cross_entropy_tile_forward_kernel(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, lse_ptr,
    n_rows, n_groups, ignore_index, smoothing,
    HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, LAYOUT: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """As cross_entropy_forward_kernel; if the target is no class the loss is nan."""
    n_cols = n_groups * LAYOUT.group
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, LAYOUT.rows), tl.num_programs(0)):
        first, count, rows, place = _rows_of(
            tile, target_ptr, n_rows, n_cols, ignore_index, LAYOUT, SIDE
        )
        counts = place != IGNORED
        x = load_rows(logits_ptr, first * n_cols, count, n_cols, 0, LAYOUT)
        col_offs, is_col = columns(n_cols, 0, LAYOUT)
        at_target = row_sums(tl.where(col_offs == _of_rows(place), x, 0.0), LAYOUT)
        at_target = tl.where(place >= 0, at_target, float("nan"))
        top = tl.maximum(_row_maxima(tl.where(is_col, x, float("-inf")), LAYOUT), LOWEST)
        total = row_sums(tl.where(is_col, tl.exp(x - _of_rows(top)), 0.0), LAYOUT)
        log_total = tl.log(total)
        loss = (1.0 - smoothing) * ((top - at_target) + log_total)
        if HAS_WEIGHT:
            loss *= tl.load(weight_ptr + place, mask=place >= 0, other=0.0)
        if SMOOTH:
            origin = tl.where(tl.abs(at_target) < HUGE, at_target, 0.0)
            d = tl.where(is_col, x - _of_rows(origin), 0.0)
            weight_sum = n_cols.to(tl.float32)
            if HAS_WEIGHT:
                w = load_affine(weight_ptr, n_cols, 0, LAYOUT)
                d *= w
                weight_sum = row_sums(w, LAYOUT)
            spread = weight_sum * ((top - origin) + log_total) - row_sums(d, LAYOUT)
            loss += smoothing / n_cols * spread
        tl.store(loss_ptr + first + rows, tl.where(counts, loss, 0.0), mask=rows < count)
        ptrs, mask = _pairs(lse_ptr, first, rows, count)
        kept = tl.join(tl.where(counts, top, 0.0), tl.where(counts, log_total, 0.0))
        tl.store(ptrs, kept, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "n_groups", "ignore_index", "grad_loss_stride"])
def cross_entropy_tile_backward_kernel(
    grad_loss_ptr, logits_ptr, target_ptr, weight_ptr, totals_ptr, lse_ptr, dx_ptr,
    n_rows, n_groups, ignore_index, smoothing, grad_loss_stride,
    EACH: tl.constexpr, MEAN: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """As cross_entropy_backward_kernel. EACH: every row has a gradient of its own."""
    n_cols = n_groups * LAYOUT.group
    COVERED: tl.constexpr = LAYOUT.each * LAYOUT.side
    if SMOOTH and HAS_WEIGHT:
        cols = tl.arange(0, COVERED)
        weights = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0)
    shared = 0.0 if EACH else tl.load(grad_loss_ptr)
    size = tl.load(totals_ptr) if MEAN else 1.0
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, LAYOUT.rows), tl.num_programs(0)):
        first, count, rows, place = _rows_of(
            tile, target_ptr, n_rows, n_cols, ignore_index, LAYOUT, LAYOUT.side
        )
        counts = place != IGNORED
        top, log_total = _load_pairs(lse_ptr, first, rows, count, LAYOUT)
        if EACH:
            g = tl.load(grad_loss_ptr + (first + rows) * grad_loss_stride, mask=counts, other=0.0)
        else:
            g = shared / size
        picked = tl.where(place >= 0, g * (1.0 - smoothing), float("nan"))
        if HAS_WEIGHT:
            picked *= tl.load(weight_ptr + place, mask=place >= 0, other=0.0)
        scale = picked
        uniform = g * (smoothing / n_cols) + tl.zeros_like(picked)
        if SMOOTH:
            scale += uniform * (tl.load(totals_ptr + 1) if HAS_WEIGHT else n_cols)
        x_ptrs, mask, shift = run_of(logits_ptr, first * n_cols, count, n_cols, LAYOUT)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        slots = tl.arange(0, LAYOUT.run) - shift
        row = row_of(slots, n_cols) & (LAYOUT.rows - 1)  # past the tile: anywhere
        col = slots - row * n_cols
        at, own = tl.gather(place, row, 0), tl.gather(scale, row, 0)
        dx = own * tl.exp((x - tl.gather(top, row, 0)) - tl.gather(log_total, row, 0))
        if SMOOTH:
            own = tl.gather(picked, row, 0)
        dx = tl.where(col == at, dx - own, dx)
        if SMOOTH:
            each = tl.gather(uniform, row, 0)
            if HAS_WEIGHT:
                each *= tl.gather(weights, col & (COVERED - 1), 0)
            dx -= each
        dx = tl.where(at == IGNORED, 0.0, dx)
        dx_ptrs, mask, _ = run_of(dx_ptr, first * n_cols, count, n_cols, LAYOUT)
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
