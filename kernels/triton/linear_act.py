"""linear_act in Triton: act(x weight^T + bias), the activation on the accumulators."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels import guards
from pyfast.kernels.activations import GRAD_FROM_OUTPUT, activate
from pyfast.kernels.linear_backward import (
    act_backward,
    gradient_product,
    in_product,
    sums_in_product,
)
from pyfast.kernels.linear_operands import check_linear, empty_weight, is_transposed
from pyfast.kernels.matmul import (
    MatmulConfig,
    capability,
    launch_config,
    product,
    tile_at,
    tile_offsets,
)
from pyfast.kernels.processors import processors

OP = "linear_act"


@triton.jit
def _linear_act_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, preact_ptr,                    # pointers; None: absent
    M, N, K,                                                             # sizes
    x_row_stride, x_k_stride, weight_row_stride, weight_k_stride,        # strides
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out = act(x @ weight.T + bias) [M, N]; a program takes every num_programs-th tile."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row_offs, col_offs = tile_offsets(row, BLOCK_M), tile_offsets(col, BLOCK_N)
        acc = product(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            x_ptr, weight_ptr,
            row_offs, col_offs,
            M, N, K,
            x_row_stride, x_k_stride, weight_k_stride, weight_row_stride,
            BLOCK_K,
        )  # fmt: skip
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + col_offs, mask=col_offs < N, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        at = row_offs[:, None] * N + col_offs[None, :]
        mask = (row_offs[:, None] < M) & (col_offs[None, :] < N)
        if preact_ptr is not None:
            tl.store(preact_ptr + at, acc.to(preact_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + at, activate(acc, ACT).to(out_ptr.dtype.element_ty), mask=mask)


def act_launch_config(
    capability: tuple[int, int], dtype: torch.dtype, act: str, m: int, n: int, k: int
) -> MatmulConfig:
    """The tiles of the forward pass; pure. What most activations need spills beside the widest."""
    config = launch_config(capability, dtype, m, n, k)
    if act in ("none", "relu") or config.block_n <= 128:
        return config
    return replace(config, block_n=64 if capability[0] == 10 else 128, num_stages=4)


def linear_act_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, save: bool
) -> tuple[Tensor, Tensor]:
    """(out [M, N], pre-activation [M, N] or empty); x [M, K], weight [N, K], any strides."""
    m, n, k = check_linear(OP, x, weight, act)
    bias = guards.operand(OP, "bias", bias, x, (n,))
    keep = save and act != "none" and act not in GRAD_FROM_OUTPUT
    out, preact = x.new_empty(m, n), x.new_empty((m, n) if keep else 0)
    if m * n == 0:
        return out, preact
    config = act_launch_config(capability(x), x.dtype, act, m, n, k)
    _linear_act_forward_kernel[(config.programs(m, n, processors(x)),)](
        x, weight, bias, out, preact if keep else None,
        m, n, k,
        *x.stride(), *weight.stride(),
        ACT=act, **config.keywords(),
    )  # fmt: skip
    return out, preact


def linear_act_backward_triton(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    act: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias), empty where not needed; any strides."""
    m, n, k = check_linear(OP, x, weight, act)
    guards.expect_like(OP, "grad_out", grad_out, x, (m, n))
    if act == "none":
        saved = None
    else:
        guards.expect(saved is not None, OP, "saved", f'be given for act "{act}"', None)
        guards.expect_like(OP, "saved", saved, x, (m, n))
    dx = x.new_empty((m, k) if need_x else 0)
    dweight = empty_weight(x, n, k, is_transposed(weight), need_weight)
    dbias = x.new_empty(n if need_bias else 0)
    if m * n == 0:
        return dx.zero_(), dweight.zero_(), dbias.zero_()
    products = k > 0 and (need_x or need_weight)
    dy = grad_out
    inside = in_product(act, dy)
    sums_inside = k > 0 and need_weight and sums_in_product(dy)
    if (products and not inside) or (need_bias and not sums_inside):
        dpre = x.new_empty(m, n) if products and not inside else None
        act_backward(dy, saved, act, dpre, dbias if need_bias else None)
        need_bias = False
        if dpre is not None:
            dy, saved, act = dpre, None, "none"
    if products and need_x:
        gradient_product(dy, saved, act, weight, dx)
    if products and need_weight:
        flipped = None if saved is None else saved.t()
        gradient_product(dy.t(), flipped, act, x, dweight, dbias if need_bias else None)
    return dx, dweight, dbias
