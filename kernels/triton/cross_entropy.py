"""cross_entropy in Triton: one read of the logits forward, one read and one write backward.

A program walks along one row. In every column of its tile it keeps a running maximum and the sum of
exp(x - maximum) (Milakov & Gimelshein, 2018), which meet only at the end of the row: no barrier on
the way, and no limit to the number of classes. Rows are read from the 32-byte sector they begin in,
so that no access of a warp straddles one more sector than it fills.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels import guards
from pyfast.kernels.class_weights import launch_reduce, launch_totals
from pyfast.kernels.cross_entropy_tiles import (
    HUGE,
    LOWEST,
    MAX_COLS,
    PROGRAMS_EACH,
    backward_layout,
    cross_entropy_tile_backward_kernel,
    cross_entropy_tile_forward_kernel,
    forward_layout,
    tile_layout,
)
from pyfast.kernels.norm_tiles import SECTOR
from pyfast.kernels.processors import processors

OP = "cross_entropy"
REDUCTIONS = ("none", "mean", "sum")


class Config(NamedTuple):
    """The tile that walks along a row: `chunks` rows of `width` columns, one after the other."""

    chunks: int
    width: int
    group: int  # elements; divides every offset a row can begin at
    sector: int  # elements
    num_warps: int


def launch_config(cols: int, row_stride: int, itemsize: int, address: int) -> Config:
    """The launch for rows of `cols` elements, `row_stride` elements apart, from `address` on.

    A thread takes 16 bytes at a time of rows that allow it, and has four such loads on their way;
    of others it takes element by element, half as many, as each needs registers for its address.
    """
    sector = SECTOR // itemsize
    base = address % SECTOR // itemsize
    group = math.gcd(cols, row_stride, base, sector) if address % guards.ALIGNMENT == 0 else 1
    vector = 16 // itemsize
    wanted = max(1, cols // (4 * 32 * vector))  # one more would ask for what is known of the row
    num_warps = min(8, triton.next_power_of_2(wanted + 1) // 2)
    chunks = 4 if group >= vector else 2
    return Config(chunks, num_warps * 32 * vector, group, sector, num_warps)


@triton.jit
def _first_offs(start, SECTOR: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns [CHUNKS, WIDTH] of the first tile of a row that begins `start` elements on."""
    offs = (tl.arange(0, CHUNKS) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    return offs - (start % SECTOR).to(tl.int32)


@triton.jit(do_not_specialize=["n_groups", "stride_groups", "base", "ignore_index"])
def cross_entropy_forward_kernel(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, lse_ptr,
    n_groups, stride_groups, base, ignore_index, smoothing,
    HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, GROUP: tl.constexpr, SECTOR: tl.constexpr,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """With e the smoothing, w the class weights, t the target, all logits relative to x_t:
    loss = (1 - e) w_t (lse - x_t) + e / V sum_c w_c (lse - x_c). One program, one row.
    """
    row = tl.program_id(0).to(tl.int64)
    n_cols = n_groups * GROUP
    row_start = row * stride_groups * GROUP
    target = tl.load(target_ptr + row)
    loss, top, log_total = 0.0, 0.0, 0.0
    if target != ignore_index:
        is_class = (target >= 0) & (target < n_cols)  # else the loss is nan: memory stays safe
        at_target = tl.load(logits_ptr + row_start + target, mask=is_class, other=float("nan"))
        at_target = at_target.to(tl.float32)
        origin = tl.where(tl.abs(at_target) < HUGE, at_target, 0.0)
        peak = tl.full((WIDTH,), LOWEST, tl.float32)
        total = tl.zeros((WIDTH,), tl.float32)
        shifted = tl.zeros((WIDTH,), tl.float32)
        weights = tl.zeros((WIDTH,), tl.float32)
        offs = _first_offs(base * GROUP + row_start, SECTOR, CHUNKS, WIDTH)
        for _ in range(0, n_cols + SECTOR - GROUP, CHUNKS * WIDTH):
            mask = (offs >= 0) & (offs < n_cols)
            x = tl.load(logits_ptr + row_start + offs, mask=mask, other=-float("inf")).to(
                tl.float32
            )
            new_peak = tl.maximum(peak, tl.max(x, axis=0))
            total *= tl.exp(peak - new_peak)
            total += tl.sum(tl.exp(x - new_peak[None, :]), axis=0)
            peak = new_peak
            if SMOOTH:
                d = tl.where(mask, x - origin, 0.0)
                if HAS_WEIGHT:
                    w = tl.load(weight_ptr + offs, mask=mask, other=0.0)
                    d *= w
                    weights += tl.sum(w, axis=0)
                shifted += tl.sum(d, axis=0)
            offs += CHUNKS * WIDTH
        top = tl.max(peak, axis=0)
        log_total = tl.log(tl.sum(total * tl.exp(peak - top), axis=0))
        picked = 1.0 - smoothing
        if HAS_WEIGHT:
            picked *= tl.load(weight_ptr + target, mask=is_class, other=0.0)
        loss = picked * ((top - at_target) + log_total)
        if SMOOTH:
            weight_sum = tl.sum(weights, axis=0) if HAS_WEIGHT else n_cols
            spread = weight_sum * ((top - origin) + log_total) - tl.sum(shifted, axis=0)
            loss += smoothing / n_cols * spread
    tl.store(loss_ptr + row, loss)
    pair = tl.arange(0, 2)  # at once: they share a sector
    tl.store(lse_ptr + 2 * row + pair, tl.where(pair == 0, top, log_total))


@triton.jit(
    do_not_specialize=["n_groups", "stride_groups", "base", "ignore_index", "grad_loss_stride"]
)
def cross_entropy_backward_kernel(
    grad_loss_ptr, logits_ptr, target_ptr, weight_ptr, totals_ptr, lse_ptr, dx_ptr,
    n_groups, stride_groups, base, ignore_index, smoothing, grad_loss_stride,
    MEAN: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, GROUP: tl.constexpr,
    SECTOR: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dx_c = g ((1 - e) w_t + e / V sum(w)) softmax(x)_c - g e / V w_c - [c = t] g (1 - e) w_t."""
    row = tl.program_id(0).to(tl.int64)
    n_cols = n_groups * GROUP
    row_start, out_start = row * stride_groups * GROUP, row * n_cols
    target = tl.load(target_ptr + row)
    offs = _first_offs(base * GROUP + row_start, SECTOR, CHUNKS, WIDTH)
    if target == ignore_index:
        zeros = tl.zeros((CHUNKS, WIDTH), dx_ptr.dtype.element_ty)
        for _ in range(0, n_cols + SECTOR - GROUP, CHUNKS * WIDTH):
            tl.store(dx_ptr + out_start + offs, zeros, mask=(offs >= 0) & (offs < n_cols))
            offs += CHUNKS * WIDTH
    else:
        is_class = (target >= 0) & (target < n_cols)
        g = tl.load(grad_loss_ptr + row * grad_loss_stride)
        if MEAN:
            g /= tl.load(totals_ptr)
        top, log_total = tl.load(lse_ptr + 2 * row), tl.load(lse_ptr + 2 * row + 1)
        picked = tl.where(is_class, g * (1.0 - smoothing), float("nan"))
        scale = picked
        if HAS_WEIGHT:
            picked *= tl.load(weight_ptr + target, mask=is_class, other=0.0)
            scale = picked
        if SMOOTH:
            uniform = g * (smoothing / n_cols)
            if HAS_WEIGHT:
                scale = picked + uniform * tl.load(totals_ptr + 1)
            else:
                scale = picked + uniform * n_cols
        for _ in range(0, n_cols + SECTOR - GROUP, CHUNKS * WIDTH):
            mask = (offs >= 0) & (offs < n_cols)
            x = tl.load(logits_ptr + row_start + offs, mask=mask, other=0.0).to(tl.float32)
            dx = scale * tl.exp((x - top) - log_total)
            dx = tl.where(offs == target, dx - picked, dx)
            if SMOOTH:
                if HAS_WEIGHT:
                    dx -= uniform * tl.load(weight_ptr + offs, mask=mask, other=0.0)
                else:
                    dx -= uniform
            tl.store(dx_ptr + out_start + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            offs += CHUNKS * WIDTH


class Operands(NamedTuple):
    """The checked arguments: logits with adjacent columns, target and weight packed."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None


def operands(logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Operands:
    """logits [rows, cols] of any row stride, target [rows] int64, weight [cols] float32."""
    guards.first(OP, "logits", logits, 2)
    rows, cols = logits.shape
    guards.expect(cols < 2**31, OP, "logits", "have fewer than 2**31 classes", cols)
    known = "be none, mean or sum"
    guards.expect(reduction in REDUCTIONS, OP, "reduction", known, reduction)
    target = guards.operand(OP, "target", target, logits, (rows,), torch.int64)
    weight = guards.operand(OP, "weight", weight, logits, (cols,), torch.float32)
    if cols > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    return Operands(logits, target, weight)


def _are_tiles(x: Tensor) -> bool:
    """Whether rows are read many at a time: short ones, one after the other."""
    short = x.numel() > 0 and x.shape[1] <= MAX_COLS
    return short and x.is_contiguous() and x.data_ptr() % guards.ALIGNMENT == 0


def cross_entropy_triton(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """(loss, lse [rows, 2]), float32; of a target that is no class the loss is nan."""
    x, target, weight = operands(logits, target, weight, reduction)
    rows, cols = x.shape
    loss = x.new_empty(rows, dtype=torch.float32)
    lse = x.new_empty((rows, 2), dtype=torch.float32)
    smooth = label_smoothing > 0
    if _are_tiles(x):
        heavy = smooth and weight is not None
        layout, warps = tile_layout(cols, x.itemsize, heavy)
        side = max(1, 32 * warps // layout.rows)
        layout = forward_layout(layout.loading(rows, cols), cols)
        programs = min(triton.cdiv(rows, layout.rows), PROGRAMS_EACH * processors(x))
        cross_entropy_tile_forward_kernel[(programs,)](
            x, target, weight, loss, lse, rows, cols // layout.group, ignore_index, label_smoothing,
            HAS_WEIGHT=weight is not None, SMOOTH=smooth, LAYOUT=layout, SIDE=side, num_warps=warps,
        )  # fmt: skip
    elif rows:
        stride = x.stride(0)
        config = launch_config(cols, stride, x.itemsize, x.data_ptr())
        cross_entropy_forward_kernel[(rows,)](
            x, target, weight, loss, lse,
            cols // config.group, stride // config.group,
            x.data_ptr() % SECTOR // x.itemsize // config.group, ignore_index, label_smoothing,
            HAS_WEIGHT=weight is not None, SMOOTH=smooth, GROUP=config.group,
            SECTOR=config.sector, CHUNKS=config.chunks, WIDTH=config.width,
            num_warps=config.num_warps,
        )  # fmt: skip
    if reduction == "none":
        return loss, lse
    return launch_reduce(loss, target, weight, cols, ignore_index, reduction == "mean"), lse


def cross_entropy_backward_triton(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """The gradient of the logits, contiguous [rows, cols]."""
    x, target, weight = operands(logits, target, weight, reduction)
    rows, cols = x.shape
    each = reduction == "none"
    guards.expect_like(OP, "grad_loss", grad_loss, x, (rows,) if each else (), torch.float32)
    lse = guards.operand(OP, "lse", lse, x, (rows, 2), torch.float32)
    dx = x.new_empty((rows, cols))
    if rows * cols == 0:
        return dx
    mean, smooth = reduction == "mean", label_smoothing > 0
    totals = None
    if mean or (smooth and weight is not None):
        totals = launch_totals(target, weight, cols, ignore_index)
    grad_stride = grad_loss.stride(0) if each else 0
    if _are_tiles(x):
        heavy = smooth and weight is not None
        layout, warps = backward_layout(*tile_layout(cols, x.itemsize, heavy))
        programs = min(triton.cdiv(rows, layout.rows), PROGRAMS_EACH * processors(x))
        cross_entropy_tile_backward_kernel[(programs,)](
            grad_loss, x, target, weight, totals, lse, dx,
            rows, cols // layout.group, ignore_index, label_smoothing, grad_stride,
            EACH=each, MEAN=mean, HAS_WEIGHT=weight is not None, SMOOTH=smooth, LAYOUT=layout,
            num_warps=warps,
        )  # fmt: skip
        return dx
    stride = x.stride(0)
    config = launch_config(cols, stride, x.itemsize, x.data_ptr())
    cross_entropy_backward_kernel[(rows,)](
        grad_loss, x, target, weight, totals, lse, dx,
        cols // config.group, stride // config.group,
        x.data_ptr() % SECTOR // x.itemsize // config.group, ignore_index, label_smoothing,
        grad_stride,
        MEAN=mean, HAS_WEIGHT=weight is not None, SMOOTH=smooth, GROUP=config.group,
        SECTOR=config.sector, CHUNKS=config.chunks, WIDTH=config.width,
        num_warps=config.num_warps,
    )  # fmt: skip
    return dx
