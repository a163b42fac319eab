"""Gradients inside a gated linear unit: dgate = dY up act'(gate), dup = dY act(gate), and dX."""

import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels.activations import GRAD_FROM_OUTPUT, activate, activate_grad
from pyfast.kernels.column_sums import launch_column_sums, padded, partial_rows
from pyfast.kernels.gradient_product import THROUGH_REGISTERS
from pyfast.kernels.linear_backward import PASS_COLS, pass_grid
from pyfast.kernels.matmul import (
    capability,
    launch_config,
    product,
    store_parts,
    tile_at,
    tile_offsets,
    whole,
)
from pyfast.kernels.packing import turned
from pyfast.kernels.processors import processors
from pyfast.kernels.tensor_maps import (
    CAPABILITY,
    arranged,
    maps,
    operands,
    results,
    whole_order,
)

PASS_ROWS = 2  # of the elementwise pass: half as many as of one product, for twice the sums


@triton.jit
def _glu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, sums_ptr,              # pointers; None: absent
    M, N, width,                                                         # sizes
    dy_row_stride, dy_col_stride, gate_row_stride, gate_col_stride, up_row_stride, up_col_stride,
    sums_stride,
    ACT: tl.constexpr, FROM_OUTPUT: tl.constexpr, ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dgate and dup [M, width]; in row p of both planes of sums their column sums, of program p.

    A program takes BLOCK_N columns and every num_programs(1)-th block of rows. Past N are zeros.
    ORDER is that of the operands, see `tensor_maps.whole_order`.
    """
    if ORDER == "rows":
        N, width = whole(N, dy_ptr), whole(width, dy_ptr)
        dy_row_stride, gate_row_stride = (
            whole(dy_row_stride, dy_ptr),
            whole(gate_row_stride, dy_ptr),
        )
        up_row_stride = whole(up_row_stride, dy_ptr)
    col_offs = tile_offsets(tl.program_id(0), BLOCK_N)
    gate_total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(M, BLOCK_M), tl.num_programs(1)):
        row_offs = tile_offsets(block, BLOCK_M)
        mask = (row_offs[:, None] < M) & (col_offs[None, :] < N)
        dy_at = row_offs[:, None] * dy_row_stride + col_offs[None, :] * dy_col_stride
        gate_at = row_offs[:, None] * gate_row_stride + col_offs[None, :] * gate_col_stride
        up_at = row_offs[:, None] * up_row_stride + col_offs[None, :] * up_col_stride
        dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + up_at, mask=mask, other=0.0).to(tl.float32)
        activated = activate(gate, ACT)
        dup = dy * activated
        dgate = dy * up
        if ACT != "none":
            dgate *= activate_grad(activated if FROM_OUTPUT else gate, ACT)
        if dgate_ptr is not None:
            at = row_offs[:, None] * width + col_offs[None, :]
            mask = (row_offs[:, None] < M) & (col_offs[None, :] < width)
            tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
            tl.store(dup_ptr + at, dup.to(dup_ptr.dtype.element_ty), mask=mask)
        gate_total += dgate
        up_total += dup
    if sums_ptr is not None:
        row, rows = tl.program_id(1).to(tl.int64), tl.num_programs(1)
        sums_mask = col_offs < sums_stride
        gate_ptrs = sums_ptr + row * sums_stride + col_offs
        tl.store(gate_ptrs, tl.sum(gate_total, axis=0), mask=sums_mask)
        up_ptrs = sums_ptr + (rows + row) * sums_stride + col_offs
        tl.store(up_ptrs, tl.sum(up_total, axis=0), mask=sums_mask)


@triton.jit
def _glu_input_gradient_kernel(
    dgate, dup, gate_weight, up_weight, dx,                                    # pointers or maps
    M, N, K, pair_stride,
    gate_row_stride, gate_col_stride, up_row_stride, up_col_stride,
    A_ORDER: tl.constexpr, GATE_ORDER: tl.constexpr, UP_ORDER: tl.constexpr,
    OUT_ORDER: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dx [M, N] = dgate @ gate_weight + dup @ up_weight, of depth K each, in one accumulator."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = product(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            dgate, gate_weight,
            row, col,
            M, N, K,
            pair_stride, 1, gate_row_stride, gate_col_stride,
            A_ORDER, GATE_ORDER, MAPS, BLOCK_K,
        )  # fmt: skip
        acc = product(
            acc,
            dup, up_weight,
            row, col,
            M, N, K,
            pair_stride, 1, up_row_stride, up_col_stride,
            A_ORDER, UP_ORDER, MAPS, BLOCK_K,
        )  # fmt: skip
        store_parts(dx, acc, row * BLOCK_M, col * BLOCK_N, M, N, N, 1, OUT_ORDER)


def glu_gradients(
    dy: Tensor, gate: Tensor, up: Tensor, act: str, pair: Tensor, dbiases: list[Tensor]
) -> None:
    """Fills pair with dgate and dup, unless empty, and dbiases with their column sums.

    pair is [2, M, N], or has columns of zeros after those of dy.
    """
    m, n = dy.shape
    grid = pass_grid(m, n, PASS_ROWS, dy)
    wide = all(whole_order(t) == "rows" for t in (dy, gate, up))
    partial = partial_rows(2, grid[1], n, dy) if dbiases else None
    dgate, dup = pair if pair.numel() else (None, None)
    _glu_backward_kernel[grid](
        dy, gate, up, dgate, dup, partial,
        m, n, pair.shape[2] if pair.numel() else n,
        *dy.stride(), *gate.stride(), *up.stride(), padded(n),
        ACT=act, FROM_OUTPUT=act in GRAD_FROM_OUTPUT, ORDER="rows" if wide else "any",
        BLOCK_M=PASS_ROWS, BLOCK_N=PASS_COLS, num_warps=1,
    )  # fmt: skip
    if dbiases:
        launch_column_sums(partial, dbiases)


def input_gradient(pair: Tensor, gate_weight: Tensor, up_weight: Tensor, dx: Tensor) -> None:
    """dx [M, K] = pair[0] @ gate_weight + pair[1] @ up_weight, zeros may end both of the pair."""
    (m, n), depth = dx.shape, gate_weight.shape[0]
    config = launch_config(capability(dx), dx.dtype, m, n, depth)
    if config.block_m == 128 and capability(dx)[0] != CAPABILITY:
        config = THROUGH_REGISTERS  # two loops have twice the addresses
    a, b, gate, up = arranged(config, pair[0], pair[1], gate_weight.t(), up_weight.t())
    gate, up, mapped = turned(gate), turned(up), maps(config, dx)
    (a_given, gate_given), orders = operands(mapped, config, a, gate)
    (b_given, up_given), up_orders = operands(mapped, config, b, up)
    (made,), out_order = results(mapped, config, dx)
    _glu_input_gradient_kernel[(config.programs(m, n, processors(dx)),)](
        a_given, b_given, gate_given, up_given, made,
        m, n, depth, a.stride(0),
        *gate.t().stride(), *up.t().stride(),
        A_ORDER=orders["A_ORDER"], GATE_ORDER=orders["B_ORDER"], UP_ORDER=up_orders["B_ORDER"],
        MAPS=mapped, **out_order, **config.keywords(),
    )  # fmt: skip
