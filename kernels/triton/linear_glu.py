"""linear_glu in Triton: act(x Wg^T + bg) * (x Wu^T + bu), both products over one read of x."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels import guards
from pyfast.kernels.activations import activate
from pyfast.kernels.glu_backward import glu_gradients, input_gradient
from pyfast.kernels.linear_backward import gradient_product
from pyfast.kernels.linear_operands import check_linear, empty_weight, is_transposed
from pyfast.kernels.matmul import (
    MatmulConfig,
    capability,
    launch_config,
    tile_at,
    tile_offsets,
)
from pyfast.kernels.processors import processors

OP = "linear_glu"


@triton.jit
def _linear_glu_forward_kernel(
    x_ptr, gate_weight_ptr, up_weight_ptr, gate_bias_ptr, up_bias_ptr,   # pointers; None: absent
    out_ptr, gate_ptr, up_ptr,
    M, N, K,                                                             # sizes
    x_row_stride, x_k_stride, gate_row_stride, gate_k_stride, up_row_stride, up_k_stride,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out = act(gate) * up [M, N]; a program takes every num_programs-th tile."""
    k_offs = tl.arange(0, BLOCK_K)
    k_far, k_step = k_offs.to(tl.int64), tl.full((), BLOCK_K, tl.int64)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row_offs, col_offs = tile_offsets(row, BLOCK_M), tile_offsets(col, BLOCK_N)
        row_mask, col_mask = row_offs[:, None] < M, col_offs[None, :] < N
        x_ptrs = x_ptr + row_offs[:, None] * x_row_stride + k_far[None, :] * x_k_stride
        gate_ptrs = gate_weight_ptr + col_offs[None, :] * gate_row_stride
        gate_ptrs += k_far[:, None] * gate_k_stride
        up_ptrs = up_weight_ptr + col_offs[None, :] * up_row_stride + k_far[:, None] * up_k_stride
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            k_mask = k_offs < K - start
            weight_mask = col_mask & k_mask[:, None]
            x = tl.load(x_ptrs, mask=row_mask & k_mask[None, :], other=0.0)
            gate_weight = tl.load(gate_ptrs, mask=weight_mask, other=0.0)
            up_weight = tl.load(up_ptrs, mask=weight_mask, other=0.0)
            gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
            up = tl.dot(x, up_weight, up, input_precision="ieee")
            x_ptrs += k_step * x_k_stride
            gate_ptrs += k_step * gate_k_stride
            up_ptrs += k_step * up_k_stride
        if gate_bias_ptr is not None:
            bias = tl.load(gate_bias_ptr + col_offs, mask=col_offs < N, other=0.0)
            gate += bias.to(tl.float32)[None, :]
        if up_bias_ptr is not None:
            bias = tl.load(up_bias_ptr + col_offs, mask=col_offs < N, other=0.0)
            up += bias.to(tl.float32)[None, :]
        start = row.to(tl.int64) * BLOCK_M * N + col * BLOCK_N  # in 64 bits; inside a tile 32 do
        at = start + (tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :])
        mask = row_mask & col_mask
        if gate_ptr is not None:
            tl.store(gate_ptr + at, gate.to(gate_ptr.dtype.element_ty), mask=mask)
            tl.store(up_ptr + at, up.to(up_ptr.dtype.element_ty), mask=mask)
        out = activate(gate, ACT) * up
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def glu_launch_config(
    capability: tuple[int, int], dtype: torch.dtype, m: int, n: int, k: int
) -> MatmulConfig:
    """The tiles of the forward pass; pure. Half as wide as of one product: there are two."""
    config = launch_config(capability, dtype, m, n, k)
    if config.block_m < 128:
        return replace(config, block_k=16) if dtype == torch.float32 else config
    return replace(config, block_n=config.block_n // 2, block_k=32, num_stages=4)


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
    m, n, k = check_linear(OP, x, gate_weight, act)
    guards.expect_like(OP, "up_weight", up_weight, x, (n, k))
    gate_bias = guards.operand(OP, "gate_bias", gate_bias, x, (n,))
    up_bias = guards.operand(OP, "up_bias", up_bias, x, (n,))
    out = x.new_empty(m, n)
    gate, up = (x.new_empty((m, n) if save else 0) for _ in range(2))
    if m * n == 0:
        return out, gate, up
    config = glu_launch_config(capability(x), x.dtype, m, n, k)
    _linear_glu_forward_kernel[(config.programs(m, n, processors(x)),)](
        x, gate_weight, up_weight, gate_bias, up_bias,
        out, gate if save else None, up if save else None,
        m, n, k,
        *x.stride(), *gate_weight.stride(), *up_weight.stride(),
        ACT=act, **config.keywords(),
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
    m, n, k = check_linear(OP, x, gate_weight, act)
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
        pair = x.new_empty((2, m, n) if products else 0)
        glu_gradients(grad_out, gate, up, act, pair, dbiases if need_bias else [])
    if products and need_x:
        input_gradient(pair, gate_weight, up_weight, dx)
    if products and need_weight:
        for d, dweight in zip(pair, dweights, strict=True):
            gradient_product(d.t(), None, "none", x, dweight)
    return dx, *dweights, *dbiases
