"""The kernels of linear_cross_entropy that make logits, tile by tile, and use them up at once."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels.cross_entropy_tiles import HUGE, LOWEST
from pyfast.kernels.gradient_product import THROUGH_REGISTERS
from pyfast.kernels.matmul import (
    MatmulConfig,
    capability,
    launch_config,
    product,
    tile_at,
    tile_offsets,
    whole,
)
from pyfast.kernels.packing import turned
from pyfast.kernels.processors import processors
from pyfast.kernels.tensor_maps import CAPABILITY, maps, operands

if TYPE_CHECKING:
    from pyfast.kernels.linear_cross_entropy import Problem

LOSS_ROWS = 64
LEAST_WORKSPACE = 16 << 20  # bytes that are never too many


@triton.jit
def _logits(
    x, weight, bias_ptr,
    row, col,
    M, N, K,
    x_row_stride, weight_row_stride, weight_k_stride,
    A_ORDER: tl.constexpr, B_ORDER: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile (row, col) of x @ weight.T + bias; x and weight are pointers or maps."""
    acc = product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        x, weight,
        row, col,
        M, N, K,
        x_row_stride, 1, weight_k_stride, weight_row_stride,
        A_ORDER, B_ORDER, MAPS, BLOCK_K,
    )  # fmt: skip
    if bias_ptr is not None:
        col_offs = tile_offsets(col, BLOCK_N)
        bias = tl.load(bias_ptr + col_offs, mask=col_offs < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    return acc


@triton.jit
def _place(target, col, N, BLOCK_N: tl.constexpr):
    """The column of the target in this tile of BLOCK_N classes of N; -1 where it has none."""
    inside = (target >= 0) & (target < N) & (target // BLOCK_N == col)
    return tl.where(inside, target - col.to(tl.int64) * BLOCK_N, -1).to(tl.int32)


@triton.jit
def _is_place(place, BLOCK_N: tl.constexpr):
    """[rows, BLOCK_N]: whether an element stands in the column of its row's target."""
    return tl.arange(0, BLOCK_N)[None, :] == place[:, None]


@triton.jit
def _plane(tiles, M):
    """tiles * M in 64 bits, also where either is 1 and therefore no tensor."""
    return tl.full((), tiles, tl.int64) * M


@triton.jit
def _logit_tiles_kernel(
    x, weight, bias_ptr, target_ptr, class_weight_ptr, count_ptr,
    partial_ptr, at_target_ptr,
    M, N, K,
    x_row_stride, weight_row_stride, weight_k_stride,
    SMOOTH: tl.constexpr,
    A_ORDER: tl.constexpr, B_ORDER: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Of every tile of logits the maximum of each row, the sum of exp(x - maximum) and, to SMOOTH,
    that of weight (x - maximum), in partial [3, column tiles, M]; and the logit of the target.
    """
    count, plane = tl.load(count_ptr), _plane(tl.cdiv(N, BLOCK_N), M)
    tiles = tl.cdiv(count, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = tile_at(tile, count, N, BLOCK_M, BLOCK_N, GROUP_M)
        row_offs, col_offs = tile_offsets(row, BLOCK_M), tile_offsets(col, BLOCK_N)
        z = _logits(
            x, weight, bias_ptr, row, col, count, N, K,
            x_row_stride, weight_row_stride, weight_k_stride,
            A_ORDER, B_ORDER, MAPS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        row_mask, col_mask = row_offs < count, col_offs < N
        target = tl.load(target_ptr + row_offs, mask=row_mask, other=-1)
        place = _place(target, col, N, BLOCK_N)
        at_target = tl.sum(tl.where(_is_place(place, BLOCK_N), z, 0.0), axis=1)
        tl.store(at_target_ptr + row_offs, at_target, mask=row_mask & (place >= 0))
        peak = tl.maximum(tl.max(tl.where(col_mask[None, :], z, float("-inf")), axis=1), LOWEST)
        z -= peak[:, None]
        total = tl.sum(tl.where(col_mask[None, :], tl.exp(z), 0.0), axis=1)
        at = partial_ptr + col.to(tl.int64) * M + row_offs
        tl.store(at, peak, mask=row_mask)
        tl.store(at + plane, total, mask=row_mask)
        if SMOOTH:
            if class_weight_ptr is not None:
                z *= tl.load(class_weight_ptr + col_offs, mask=col_mask, other=0.0)[None, :]
            smooth = tl.sum(tl.where(col_mask[None, :], z, 0.0), axis=1)
            tl.store(at + 2 * plane, smooth, mask=row_mask)


@triton.jit
def _losses_kernel(
    partial_ptr, at_target_ptr, target_ptr, class_weight_ptr, index_ptr, count_ptr,
    loss_ptr, lse_ptr,
    M, N, smoothing,
    TILE: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts the tiles of BLOCK rows together. With e the smoothing, w the class weights, t the
    target: loss = (1 - e) w_t (lse - x_t) + e / V sum_c w_c (lse - x_c).
    """
    row_offs = tile_offsets(tl.program_id(0), BLOCK)
    tiles = tl.cdiv(N, TILE)
    plane = _plane(tiles, M)
    mask = row_offs < tl.load(count_ptr)
    x_t = tl.load(at_target_ptr + row_offs, mask=mask, other=0.0)
    origin = tl.where(tl.abs(x_t) < HUGE, x_t, 0.0)
    peak = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    smooth, weights = tl.zeros((BLOCK,), tl.float32), 0.0
    for tile in range(0, tiles):
        at = partial_ptr + tile.to(tl.int64) * M + row_offs
        tile_peak = tl.load(at, mask=mask, other=LOWEST)
        tile_total = tl.load(at + plane, mask=mask, other=0.0)
        top = tl.maximum(peak, tile_peak)
        total = total * tl.exp(peak - top) + tile_total * tl.exp(tile_peak - top)
        peak = top
        if SMOOTH:
            col_offs = tile * TILE + tl.arange(0, TILE)
            if class_weight_ptr is not None:
                w = tl.load(class_weight_ptr + col_offs, mask=col_offs < N, other=0.0)
                tile_weight = tl.sum(w, axis=0)
            else:
                tile_weight = tl.minimum(N - tile * TILE, TILE).to(tl.float32)
            tile_smooth = tl.load(at + 2 * plane, mask=mask, other=0.0)
            smooth += tile_smooth + tile_weight * (tile_peak - origin)
            weights += tile_weight
    log_total = tl.log(total)
    loss = (1.0 - smoothing) * ((peak - x_t) + log_total)
    if class_weight_ptr is not None:
        target = tl.load(target_ptr + row_offs, mask=mask, other=-1)
        known = mask & (target >= 0) & (target < N)
        loss *= tl.load(class_weight_ptr + target, mask=known, other=float("nan"))
    if SMOOTH:
        loss += smoothing / N * (weights * ((peak - origin) + log_total) - smooth)
    to = tl.load(index_ptr + row_offs, mask=mask, other=0)
    tl.store(loss_ptr + to, loss, mask=mask)
    tl.store(lse_ptr + 2 * to, peak, mask=mask)
    tl.store(lse_ptr + 2 * to + 1, log_total, mask=mask)


@triton.jit
def _slab_kernel(
    x, weight, bias_ptr, target_ptr, class_weight_ptr, index_ptr, count_ptr,
    grad_ptr, lse_ptr, totals_ptr, dlogits_ptr,
    N, K, classes, first, grad_stride, smoothing, width, dlogits_stride,
    x_row_stride, weight_row_stride, weight_k_stride,
    MEAN: tl.constexpr,
    A_ORDER: tl.constexpr, B_ORDER: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dL [count, width] of the N classes from `first` on, then zeros; with g that of a row's loss:
    g ((1 - e) w_t + e / V sum(w)) softmax(x)_c - g e / V w_c - [c = t] g (1 - e) w_t.
    """
    count = tl.load(count_ptr)
    tiles = tl.cdiv(count, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = tile_at(tile, count, N, BLOCK_M, BLOCK_N, GROUP_M)
        row_offs, col_offs = tile_offsets(row, BLOCK_M), tile_offsets(col, BLOCK_N)
        z = _logits(
            x, weight, bias_ptr, row, col, count, N, K,
            x_row_stride, weight_row_stride, weight_k_stride,
            A_ORDER, B_ORDER, MAPS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        row_mask, col_mask = row_offs < count, col_offs < N
        target = tl.load(target_ptr + row_offs, mask=row_mask, other=0)
        source = tl.load(index_ptr + row_offs, mask=row_mask, other=0)
        g = tl.load(grad_ptr + source * grad_stride, mask=row_mask, other=0.0)
        if MEAN:
            g /= tl.load(totals_ptr)
        known = (target >= 0) & (target < classes)
        weights = tl.full((), classes, tl.float32)
        own = tl.where(known, 1.0, float("nan"))
        if class_weight_ptr is not None:
            weights = tl.load(totals_ptr + 1)
            own = tl.load(class_weight_ptr + target, mask=row_mask & known, other=float("nan"))
        hit = g * (1.0 - smoothing) * own
        each = g * (smoothing / classes)
        peak = tl.load(lse_ptr + 2 * source, mask=row_mask, other=0.0)
        log_total = tl.load(lse_ptr + 2 * source + 1, mask=row_mask, other=0.0)
        p = tl.exp((z - peak[:, None]) - log_total[:, None])
        d = p * (hit + each * weights)[:, None]
        if class_weight_ptr is not None:
            w = tl.load(class_weight_ptr + first + col_offs, mask=col_mask, other=0.0)
            d -= each[:, None] * w[None, :]
        else:
            d -= each[:, None]
        place = _place(target - first, col, N, BLOCK_N)
        d -= tl.where(_is_place(place, BLOCK_N), hit[:, None], 0.0)
        d = tl.where(col_mask[None, :], d, 0.0)
        at = row_offs[:, None] * dlogits_stride + col_offs[None, :]
        mask = row_mask[:, None] & (col_offs < whole(width, dlogits_ptr))[None, :]
        tl.store(dlogits_ptr + at, d.to(dlogits_ptr.dtype.element_ty), mask=mask)


def workspace(rows: int, classes: int, itemsize: int) -> int:
    """Bytes that a slab, or a copy of the weight, may take: an eighth of the logits, or 16 MB."""
    return max(LEAST_WORKSPACE, rows * classes * itemsize // 8)


def logits_config(
    capability: tuple[int, int], dtype: torch.dtype, m: int, n: int, k: int
) -> MatmulConfig:
    """The tiles of logits; pure. What is made of them needs registers beside the accumulators."""
    config = launch_config(capability, dtype, m, n, k)
    if config.block_m < 128:
        return config
    return replace(THROUGH_REGISTERS, block_k=64 if capability[0] == CAPABILITY else 32)


def launch_tiles(p: "Problem") -> tuple[Tensor, Tensor, int]:
    """(partial sums [3, column tiles, M], logit of the target [M], columns of a tile)."""
    m, n = p.x.shape[0], p.classes
    config = logits_config(capability(p.x), p.x.dtype, m, n, p.depth)
    shape = (3 if p.smoothing > 0 else 2, triton.cdiv(n, config.block_n), m)
    partial = p.x.new_empty(shape, dtype=torch.float32)
    at_target = torch.full((m,), float("nan"), dtype=torch.float32, device=p.x.device)
    mapped = p.depth > 0 and maps(config, p.x)
    weight = turned(p.weight, workspace(m, n, p.x.itemsize))
    given, orders = operands(mapped, config, p.x, weight)
    _logit_tiles_kernel[(config.programs(m, n, processors(p.x)),)](
        *given, p.bias, p.target, p.class_weight, p.count, partial, at_target,
        m, n, p.depth,
        p.x.stride(0), *weight.stride(),
        SMOOTH=p.smoothing > 0, MAPS=mapped, **orders, **config.keywords(),
    )  # fmt: skip
    return partial, at_target, config.block_n


def launch_losses(
    p: "Problem", tiles: tuple[Tensor, Tensor, int], loss: Tensor, lse: Tensor
) -> None:
    """Fills loss [M] and lse [M, 2] of the rows that count, in the given order."""
    partial, at_target, width = tiles
    m, n = p.x.shape[0], p.classes
    _losses_kernel[(triton.cdiv(m, LOSS_ROWS),)](
        partial, at_target, p.target, p.class_weight, p.index, p.count, loss, lse,
        m, n, p.smoothing,
        TILE=width, SMOOTH=p.smoothing > 0, BLOCK=LOSS_ROWS, num_warps=2,
    )  # fmt: skip


def launch_slab(
    p: "Problem",
    classes: slice,
    grad_loss: Tensor,
    lse: Tensor,
    totals: Tensor,
    mean: bool,
    dlogits: Tensor,
) -> None:
    """Fills dlogits [M, width], where rows count, with the gradient of logits, then zeros."""
    bias = None if p.bias is None else p.bias[classes]
    m, n = p.x.shape[0], classes.stop - classes.start
    # the last slab has what follows in memory, too: its loads stay 16 bytes wide
    stop = None if classes.stop == p.classes else classes.stop
    most = workspace(m, p.classes, p.x.itemsize)
    weight = turned(p.weight[classes.start : stop], most)
    config = logits_config(capability(p.x), p.x.dtype, m, n, p.depth)
    mapped = p.depth > 0 and maps(config, p.x)
    given, orders = operands(mapped, config, p.x, weight)
    _slab_kernel[(config.programs(m, n, processors(p.x)),)](
        *given, bias, p.target, p.class_weight, p.index, p.count,
        grad_loss, lse, totals, dlogits,
        n, p.depth, p.classes, classes.start, grad_loss.stride(0) if grad_loss.dim() else 0,
        p.smoothing, *dlogits.shape[1:], dlogits.stride(0),
        p.x.stride(0), *weight.stride(),
        MEAN=mean, MAPS=mapped, **orders, **config.keywords(),
    )  # fmt: skip
