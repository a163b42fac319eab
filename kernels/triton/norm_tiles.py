"""Tiles of rows: how layer_norm and rms_norm bring rows of any length to registers and back.

Rows that are no multiple of a sector of 32 bytes share one with each neighbour, and read where they
lie every access of a warp would touch one more than it fills. Short ones are therefore read and
written as runs of neighbours, from the sector a run begins in, and go through shared memory to the
columns and back. A run of long ones would take too many registers: a program has those that begin
at the same distance from a sector, and holds the weight at that distance, too; what they share is
then little beside the row.

Where all rows together are whole pieces of 16 bytes, runs are loaded piece by piece, with what the
first and the last hold of the neighbours; what is stored goes element by element.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from pyfast.kernels.column_sums import padded

SECTOR = 32  # bytes; what memory delivers at once
MAX_COLS = 8192  # with the distance from a sector; more do not fit into registers
MAX_RUN = 4096  # columns of rows that are read as runs,
MAX_WIDE_RUN = 1792  # bytes where a thread can load 16 at once: half a sector of more is little
TILE = 2048  # bytes, of which a run fills half; it shares one sector with the next


class Layout(NamedTuple):
    """A tile of rows, where it lies in memory and in registers. Sizes are in elements."""

    group: int  # divides every offset a row can begin at
    sector: int
    period: int  # rows from one of a program to the next
    each: int  # of a row for a thread, `side` apart; 1: Triton decides
    rows: int
    side: int  # each * side covers a row, and its distance from a sector if it is not in a run
    run: int  # covers the rows of the tile and their distance from a sector; 0: they are no run
    piece: int = 1  # elements to load at once, with what they hold of the neighbours
    skewed: bool = False  # each row's columns begin anew elsewhere, see `skew`

    def loading(self, rows: int, cols: int) -> "Layout":
        """For all of `rows` x `cols` elements from a multiple of 16 bytes on: runs by pieces."""
        piece = self.sector // 2
        whole = self.run and self.group < piece and rows * cols % piece == 0
        return self._replace(piece=piece if whole else 1)


def vector_group(cols: int, itemsize: int) -> int:
    """Elements, up to a sector, that divide every offset a row of `cols` can begin at."""
    return math.gcd(cols, SECTOR // itemsize)


def layout_of(cols: int, itemsize: int) -> tuple[Layout, int]:
    """For rows of `cols` elements of `itemsize` bytes; the warps that have 8 or 16 for a thread."""
    sector, group = SECTOR // itemsize, vector_group(cols, itemsize)
    longest = MAX_RUN if group < sector // 2 else MAX_WIDE_RUN // itemsize
    if group == sector or cols > longest:
        side = triton.next_power_of_2(padded(cols) + sector - group)
        rows = max(1, TILE // itemsize // side)
        warps = max(1, min(16, rows * side // 256))
        return Layout(group, sector, sector // group, 1, rows, side, 0), warps
    covered = triton.next_power_of_2(padded(cols))
    rows = max(1, TILE // itemsize // covered)
    apart = 0 if rows * cols % sector == 0 else sector - group
    run = triton.next_power_of_2(rows * cols + apart)
    warps = max(1, min(8, max(run, rows * covered) // 256))  # 16 would leave too few registers
    each = min(covered, rows * covered // (32 * warps))
    return Layout(group, sector, 1, each, rows, covered // each, run), warps


@triton.jit
def walk(n_rows, n_cols, rows_each, LAYOUT: tl.constexpr):
    """The first row of this program, how many it has, and how far from a sector they begin.

    Of runs each has its own distance, see `run_of`.
    """
    first = (tl.program_id(0) // LAYOUT.period).to(tl.int64) * (rows_each * LAYOUT.period)
    first += tl.program_id(0) % LAYOUT.period
    count = tl.minimum(rows_each, tl.cdiv(n_rows - first, LAYOUT.period)).to(tl.int32)
    shift = 0
    if LAYOUT.period > 1:
        shift = (tl.program_id(0) % LAYOUT.sector) * (n_cols % LAYOUT.sector) % LAYOUT.sector
    return first, count, shift


@triton.jit
def columns(n_cols, shift, LAYOUT: tl.constexpr):
    """Offsets [EACH, 1, SIDE] from `shift` before a row on, and which are columns.

    The distance goes to the pointers: added to every offset it would take a register for each.
    """
    blocks = tl.arange(0, LAYOUT.each)[:, None, None] * LAYOUT.side
    offs = blocks + tl.arange(0, LAYOUT.side)[None, None, :]
    if LAYOUT.skewed:
        offs += skew(tl.arange(0, LAYOUT.rows)[None, :, None], n_cols, LAYOUT)
        offs = offs & (LAYOUT.each * LAYOUT.side - 1)
    return offs, (offs >= shift) & (offs < shift + n_cols)


@triton.jit
def skew(row, n_cols, LAYOUT: tl.constexpr):
    """Which column a row begins with, so that SIDE elements of each row lie in banks of their own.

    Row after row is SIDE elements on, by the banks, whatever the length of the rows.
    """
    return row * (LAYOUT.side - n_cols) & (4 * LAYOUT.sector - 1)


@triton.jit
def _tile(ptr, start, count, n_cols, shift, LAYOUT: tl.constexpr):
    """Pointers to `count` rows from `start` on, [EACH, ROWS, SIDE], and which of them there are."""
    rows = tl.arange(0, LAYOUT.rows)[None, :, None]
    cols, mask = columns(n_cols, shift, LAYOUT)
    return ptr + (start - shift) + (rows * n_cols + cols), mask & (rows < count)


@triton.jit
def run_of(ptr, start, count, n_cols, LAYOUT: tl.constexpr):
    """Pointers to `count` rows from `start` on as one run, from the sector it begins in."""
    shift = (start % LAYOUT.sector).to(tl.int32)
    offs = tl.arange(0, LAYOUT.run)
    mask = (offs >= shift) & (offs < shift + count * n_cols)
    return ptr + (start - shift) + offs, mask, shift


@triton.jit
def load_run(ptr, start, count, n_cols, LAYOUT: tl.constexpr):
    """`run_of` loaded: 0 where nothing is, or what is there of the neighbours if by pieces."""
    ptrs, mask, shift = run_of(ptr, start, count, n_cols, LAYOUT)
    if LAYOUT.piece == 1:
        run = tl.load(ptrs, mask=mask, other=0.0)
    else:
        # in two dimensions, or Triton would give threads pieces of what is stored, too
        begins = tl.arange(0, LAYOUT.run // LAYOUT.piece)[:, None] * LAYOUT.piece
        offs = begins + tl.arange(0, LAYOUT.piece)[None, :]
        ptr += start // LAYOUT.sector * LAYOUT.sector  # known to be a multiple
        pieces = tl.load(ptr + offs, mask=begins < shift + count * n_cols, other=0.0)
        run = tl.reshape(pieces, (LAYOUT.run,))
    return run, mask, shift


@triton.jit
def row_of(slots, n_cols):
    """slots // n_cols by a product: exact where slots * n_cols < 2**31, and slots from 0 on."""
    inverse = (0x7FFFFFFF // n_cols + 1).to(tl.uint32)
    return tl.umulhi(slots.to(tl.uint32) * 2, inverse).to(tl.int32)


@triton.jit
def _turned(run, places, LAYOUT: tl.constexpr):
    """run[places] as a tile. Triton keeps the layout of 1D: a thread has elements of one row."""
    return tl.reshape(tl.gather(run, places, 0), (LAYOUT.each, LAYOUT.rows, LAYOUT.side))


@triton.jit
def _slots(n_cols, LAYOUT: tl.constexpr):
    """The row and the column of each element of a tile [EACH * ROWS * SIDE]."""
    slots = tl.arange(0, LAYOUT.each * LAYOUT.rows * LAYOUT.side)
    rows = slots // LAYOUT.side % LAYOUT.rows
    cols = slots // (LAYOUT.rows * LAYOUT.side) * LAYOUT.side + slots % LAYOUT.side
    if LAYOUT.skewed:
        cols = (cols + skew(rows, n_cols, LAYOUT)) & (LAYOUT.each * LAYOUT.side - 1)
    return rows, cols


@triton.jit
def load_rows(ptr, start, count, n_cols, shift, LAYOUT: tl.constexpr):
    """`count` rows from `start` on in float32; 0 past the last column and the last row."""
    if LAYOUT.run == 0:
        ptrs, mask = _tile(ptr, start, count, n_cols, shift, LAYOUT)
        values = tl.load(ptrs, mask=mask, other=0.0)
    else:
        run, _, shift = load_run(ptr, start, count, n_cols, LAYOUT)
        rows, cols = _slots(n_cols, LAYOUT)
        places = (rows * n_cols + cols + shift) & (LAYOUT.run - 1)  # past the columns: anywhere
        _, is_col = columns(n_cols, 0, LAYOUT)
        values = tl.where(is_col, _turned(run, places, LAYOUT), 0.0)
    return values.to(tl.float32)


@triton.jit
def load_affine(ptr, n_cols, shift, LAYOUT: tl.constexpr):
    """weight or bias for every row of a tile, in float32."""
    if LAYOUT.run == 0:
        offs, mask = columns(n_cols, shift, LAYOUT)
        values = tl.load(ptr - shift + offs, mask=mask, other=0.0)
    else:
        # lanes side by side: elements of a thread are not loaded at once where the mask cuts them
        offs = tl.max_contiguous(tl.arange(0, LAYOUT.each * LAYOUT.side), 1)
        row = tl.load(ptr + offs, mask=offs < n_cols, other=0.0)
        _, cols = _slots(n_cols, LAYOUT)
        values = _turned(row, cols, LAYOUT)
    return values.to(tl.float32)


@triton.jit
def store_rows(ptr, start, count, n_cols, shift, values, LAYOUT: tl.constexpr):
    """Where load_rows would read, rounded to the dtype of `ptr`."""
    values = values.to(ptr.dtype.element_ty)
    if LAYOUT.run == 0:
        ptrs, mask = _tile(ptr, start, count, n_cols, shift, LAYOUT)
        tl.store(ptrs, values, mask=mask)
    else:
        ptrs, mask, shift = run_of(ptr, start, count, n_cols, LAYOUT)
        slots = tl.arange(0, LAYOUT.run) - shift
        if LAYOUT.rows > 1:
            row = row_of(slots, n_cols)
            slots -= row * n_cols
            slots += (slots // LAYOUT.side * (LAYOUT.rows - 1) + row) * LAYOUT.side
        slots = slots & (LAYOUT.each * LAYOUT.rows * LAYOUT.side - 1)  # what is masked: anywhere
        values = tl.reshape(values, (LAYOUT.each * LAYOUT.rows * LAYOUT.side,))
        tl.store(ptrs, tl.gather(values, slots, 0), mask=mask)


@triton.jit
def row_sums(values, LAYOUT: tl.constexpr):
    """[ROWS] of [EACH, ROWS, SIDE]."""
    each = tl.sum(values, axis=0, keep_dims=True)
    return tl.reshape(tl.sum(each, axis=2), (LAYOUT.rows,))
