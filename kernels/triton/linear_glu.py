"""linear_glu in Triton: act(x Wg^T + bg) * (x Wu^T + bu), both products over one read of x."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels import guards
from pyfast.kernels.activations import activate
from pyfast.kernels.glu_backward import glu_gradients, input_gradient
from pyfast.kernels.gradient_product import gradient_product
from pyfast.kernels.linear_operands import check_linear, empty_weight, is_transposed
from pyfast.kernels.matmul import (
    MatmulConfig,
    capability,
    halves,
    in_order,
    is_wide,
    launch_config,
    mapped_tile,
    store_tile,
    tile_at,
    tile_offsets,
)
from pyfast.kernels.packing import turned, whole_columns
from pyfast.kernels.processors import processors
from pyfast.kernels.tensor_maps import (
    CAPABILITY,
    arranged,
    maps,
    operand,
    results,
)

OP = "linear_glu"


@triton.jit
def _both_products(
    x, gate_weight, up_weight,
    row, col,
    M, N, K,
    x_row_stride, x_k_stride, gate_row_stride, gate_k_stride, up_row_stride, up_k_stride,
    X_ORDER: tl.constexpr, GATE_ORDER: tl.constexpr, UP_ORDER: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tiles (row, col) of x @ gate_weight.T and x @ up_weight.T; as `matmul.product`."""
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if MAPS:
        for start in range(0, K, BLOCK_K):
            x_tile = mapped_tile(x, row * BLOCK_M, start, X_ORDER)
            gate = tl.dot(
                x_tile, mapped_tile(gate_weight, col * BLOCK_N, start, GATE_ORDER).T, gate
            )
            up = tl.dot(x_tile, mapped_tile(up_weight, col * BLOCK_N, start, UP_ORDER).T, up)
    else:
        x_row_stride, x_k_stride, x_rows, x_depth = in_order(
            x_row_stride, x_k_stride, M, K, x, X_ORDER
        )
        gate_row_stride, gate_k_stride, gate_cols, gate_depth = in_order(
            gate_row_stride, gate_k_stride, N, K, x, GATE_ORDER
        )
        up_row_stride, up_k_stride, up_cols, up_depth = in_order(
            up_row_stride, up_k_stride, N, K, x, UP_ORDER
        )
        k_offs = tl.arange(0, BLOCK_K)
        k_far, k_step = k_offs.to(tl.int64), tl.full((), BLOCK_K, tl.int64)
        row_offs, col_offs = tile_offsets(row, BLOCK_M), tile_offsets(col, BLOCK_N)
        row_mask = row_offs[:, None] < x_rows
        gate_mask, up_mask = col_offs[None, :] < gate_cols, col_offs[None, :] < up_cols
        x_ptrs = x + row_offs[:, None] * x_row_stride + k_far[None, :] * x_k_stride
        gate_ptrs = gate_weight + col_offs[None, :] * gate_row_stride
        gate_ptrs += k_far[:, None] * gate_k_stride
        up_ptrs = up_weight + col_offs[None, :] * up_row_stride + k_far[:, None] * up_k_stride
        for start in range(0, K, BLOCK_K):
            x_mask = row_mask & (k_offs < x_depth - start)[None, :]
            gate_there = gate_mask & (k_offs < gate_depth - start)[:, None]
            up_there = up_mask & (k_offs < up_depth - start)[:, None]
            x_tile = tl.load(x_ptrs, mask=x_mask, other=0.0)
            gate_tile = tl.load(gate_ptrs, mask=gate_there, other=0.0)
            up_tile = tl.load(up_ptrs, mask=up_there, other=0.0)
            gate = tl.dot(x_tile, gate_tile, gate, input_precision="ieee")
            up = tl.dot(x_tile, up_tile, up, input_precision="ieee")
            x_ptrs += k_step * x_k_stride
            gate_ptrs += k_step * gate_k_stride
            up_ptrs += k_step * up_k_stride
    return gate, up


@triton.jit
def _with_bias(acc, bias_ptr, col, N):
    """acc and the bias of its columns, from `col` on; without where there is none."""
    if bias_ptr is not None:
        col_offs = col.to(tl.int64) + tl.arange(0, acc.shape[1])
        bias = tl.load(bias_ptr + col_offs, mask=col_offs < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    return acc


@triton.jit
def _finish(
    gate, up, gate_bias_ptr, up_bias_ptr, out, gate_out, up_out,
    row, col, M, N,
    ACT: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Stores act(gate) up, and both where asked for, from element (row, col) on."""
    if is_wide(gate, ORDER):
        left, right = halves(gate)
        up_left, up_right = halves(up)
        half = col + gate.shape[1] // 2
        _finish(
            left, up_left, gate_bias_ptr, up_bias_ptr, out, gate_out, up_out,
            row, col, M, N, ACT, ORDER,
        )  # fmt: skip
        _finish(
            right, up_right, gate_bias_ptr, up_bias_ptr, out, gate_out, up_out,
            row, half, M, N, ACT, ORDER,
        )  # fmt: skip
    else:
        gate = _with_bias(gate, gate_bias_ptr, col, N)
        up = _with_bias(up, up_bias_ptr, col, N)
        if gate_out is not None:
            store_tile(gate_out, gate, row, col, M, N, N, 1, ORDER)
            store_tile(up_out, up, row, col, M, N, N, 1, ORDER)
        store_tile(out, activate(gate, ACT) * up, row, col, M, N, N, 1, ORDER)


@triton.jit
def _linear_glu_forward_kernel(
    x, gate_weight, up_weight, gate_bias_ptr, up_bias_ptr,         # pointers or maps; None: absent
    out, gate_out, up_out,
    M, N, K,                                                             # sizes
    x_row_stride, x_k_stride, gate_row_stride, gate_k_stride, up_row_stride, up_k_stride,
    ACT: tl.constexpr,
    X_ORDER: tl.constexpr, GATE_ORDER: tl.constexpr, UP_ORDER: tl.constexpr,
    OUT_ORDER: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out = act(gate) * up [M, N]; a program takes every num_programs-th tile."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        gate, up = _both_products(
            x, gate_weight, up_weight,
            row, col,
            M, N, K,
            x_row_stride, x_k_stride, gate_row_stride, gate_k_stride, up_row_stride, up_k_stride,
            X_ORDER, GATE_ORDER, UP_ORDER, MAPS,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        row *= BLOCK_M
        col *= BLOCK_N
        _finish(
            gate, up, gate_bias_ptr, up_bias_ptr, out, gate_out, up_out,
            row, col, M, N, ACT, OUT_ORDER,
        )  # fmt: skip


def glu_launch_config(
    capability: tuple[int, int], dtype: torch.dtype, m: int, n: int, k: int
) -> MatmulConfig:
    """The tiles of the forward pass; pure. Half as wide as of one product: there are two."""
    config = launch_config(capability, dtype, m, n, k)
    if config.block_m < 128:
        return config
    depth = 64 if capability[0] == CAPABILITY else 32
    return replace(config, block_n=config.block_n // 2, block_k=depth, num_stages=4)


def linear_glu_triton(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    act: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, gate, up), each [M, N], the last two empty unless `save`; any strides."""
    m, n, k = check_linear(OP, x, gate_weight, act, "gate_weight")
    guards.expect_like(OP, "up_weight", up_weight, x, (n, k))
    gate_bias = guards.operand(OP, "gate_bias", gate_bias, x, (n,))
    up_bias = guards.operand(OP, "up_bias", up_bias, x, (n,))
    out = x.new_empty(m, n)
    gate, up = (x.new_empty((m, n) if save else 0) for _ in range(2))
    if m * n == 0:
        return out, gate, up
    config = glu_launch_config(capability(x), x.dtype, m, n, k)
    x, gate_weight, up_weight = arranged(config, x, gate_weight, up_weight)
    gate_weight, up_weight = turned(gate_weight), turned(up_weight)
    mapped = k > 0 and maps(config, x)
    tile = config.block_n, config.block_k
    x_given, x_order = operand(mapped, x, config.block_m, config.block_k)
    gate_given, gate_order = operand(mapped, gate_weight, *tile)
    up_given, up_order = operand(mapped, up_weight, *tile)
    made, out_order = results(mapped, config, out, gate, up)
    _linear_glu_forward_kernel[(config.programs(m, n, processors(x)),)](
        x_given, gate_given, up_given, gate_bias, up_bias, *made,
        m, n, k,
        *x.stride(), *gate_weight.stride(), *up_weight.stride(),
        ACT=act, MAPS=mapped, X_ORDER=x_order, GATE_ORDER=gate_order, UP_ORDER=up_order,
        **out_order, **config.keywords(),
    )  # fmt: skip
    return out, gate, up


def linear_glu_backward_triton(
    grad_out: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate: Tensor,
    up: Tensor,
    act: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(grad_x, grad_gate_weight, grad_up_weight, grad_gate_bias, grad_up_bias).

    What is not needed is empty. Workspace: the gradients of gate and up, [2, M, N].
    """
    m, n, k = check_linear(OP, x, gate_weight, act, "gate_weight")
    guards.expect_like(OP, "up_weight", up_weight, x, (n, k))
    for name, t in (("grad_out", grad_out), ("gate", gate), ("up", up)):
        guards.expect_like(OP, name, t, x, (m, n))
    dx = x.new_empty((m, k) if need_x else 0)
    flipped = is_transposed(gate_weight) and is_transposed(up_weight)
    dweights = [empty_weight(x, n, k, flipped, need_weight) for _ in range(2)]
    dbiases = [x.new_empty(n if need_bias else 0) for _ in range(2)]
    if m * n == 0:
        return dx.zero_(), *(t.zero_() for t in (*dweights, *dbiases))
    products = k > 0 and (need_x or need_weight)
    if products or need_bias:
        pair = x.new_empty((2, m, whole_columns(n, x.itemsize)) if products else 0)
        glu_gradients(grad_out, gate, up, act, pair, dbiases if need_bias else [])
    if products and need_x:
        input_gradient(pair, gate_weight, up_weight, dx)
    if products and need_weight:
        config = launch_config(capability(x), x.dtype, n, k, m)
        x = arranged(config, x.t())[0].t()
        for d, dweight in zip(pair, dweights, strict=True):
            gradient_product(d.t(), None, "none", x, dweight)
    return dx, *dweights, *dbiases
