"""linear_act in Triton: act(x weight^T + bias), the activation on the accumulators."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels import guards
from pyfast.kernels.activations import GRAD_FROM_OUTPUT, activate
from pyfast.kernels.gradient_product import act_in_product, gradient_product, sums_in_product
from pyfast.kernels.guards import ALIGNMENT
from pyfast.kernels.linear_backward import act_backward
from pyfast.kernels.linear_operands import check_linear, empty_weight, is_transposed
from pyfast.kernels.matmul import (
    MatmulConfig,
    capability,
    halves,
    is_wide,
    launch_config,
    product,
    store_tile,
    tile_at,
)
from pyfast.kernels.packing import turned, whole_columns
from pyfast.kernels.processors import processors
from pyfast.kernels.tensor_maps import CAPABILITY, arranged, maps, operands, results

OP = "linear_act"


@triton.jit
def _finish(acc, bias_ptr, out, preact, row, col, M, N, ACT: tl.constexpr, ORDER: tl.constexpr):
    """Adds the bias to x @ weight.T from element (row, col) on, and stores what comes of it."""
    if is_wide(acc, ORDER):
        left, right = halves(acc)
        _finish(left, bias_ptr, out, preact, row, col, M, N, ACT, ORDER)
        _finish(right, bias_ptr, out, preact, row, col + acc.shape[1] // 2, M, N, ACT, ORDER)
    else:
        if bias_ptr is not None:
            col_offs = col.to(tl.int64) + tl.arange(0, acc.shape[1])
            bias = tl.load(bias_ptr + col_offs, mask=col_offs < N, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        if preact is not None:
            store_tile(preact, acc, row, col, M, N, N, 1, ORDER)
        store_tile(out, activate(acc, ACT), row, col, M, N, N, 1, ORDER)


@triton.jit
def _linear_act_forward_kernel(
    x, weight, bias_ptr, out, preact,                              # pointers or maps; None: absent
    M, N, K,                                                             # sizes
    x_row_stride, x_k_stride, weight_row_stride, weight_k_stride,        # strides
    ACT: tl.constexpr,
    A_ORDER: tl.constexpr, B_ORDER: tl.constexpr, OUT_ORDER: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out = act(x @ weight.T + bias) [M, N]; a program takes every num_programs-th tile."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = product(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            x, weight,
            row, col,
            M, N, K,
            x_row_stride, x_k_stride, weight_k_stride, weight_row_stride,
            A_ORDER, B_ORDER, MAPS, BLOCK_K,
        )  # fmt: skip
        row *= BLOCK_M
        col *= BLOCK_N
        _finish(acc, bias_ptr, out, preact, row, col, M, N, ACT, OUT_ORDER)


def act_launch_config(
    capability: tuple[int, int], dtype: torch.dtype, act: str, m: int, n: int, k: int
) -> MatmulConfig:
    """The tiles of the forward pass; pure.

    What most activations need spills beside the widest with tcgen05; with wgmma where the result is
    stored element by element.
    """
    config = launch_config(capability, dtype, m, n, k)
    if config.block_n > 128 and capability[0] == CAPABILITY and n * dtype.itemsize % ALIGNMENT:
        return replace(config, block_n=128)
    if act in ("none", "relu") or config.block_n <= 128 or capability[0] == CAPABILITY:
        return config
    return replace(config, block_n=64)


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
    x, weight = arranged(config, x, weight)
    weight, mapped = turned(weight), k > 0 and maps(config, x)
    given, orders = operands(mapped, config, x, weight)
    made, out_order = results(mapped, config, out, preact)
    _linear_act_forward_kernel[(config.programs(m, n, processors(x)),)](
        *given, bias, *made,
        m, n, k,
        *x.stride(), *weight.stride(),
        ACT=act, MAPS=mapped, **orders, **out_order, **config.keywords(),
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
    products = [(grad_out, saved, weight, dx)] if k > 0 and need_x else []
    if k > 0 and need_weight:
        products.append((grad_out.t(), None if saved is None else saved.t(), x, dweight))
    inside = all(act_in_product(dy, s, act, b) for dy, s, b, _ in products)
    dbias_inside = k > 0 and need_weight and sums_in_product(grad_out.t(), None, x)
    if not inside or (need_bias and not dbias_inside):
        dpre = None if inside else x.new_empty(m, whole_columns(n, x.itemsize))
        act_backward(grad_out, saved, act, dpre, dbias if need_bias else None)
        need_bias = False
        if dpre is not None:
            act = "none"
            products = [(dpre if out is dx else dpre.t(), None, b, out) for *_, b, out in products]
    for dy, s, b, out in products:
        gradient_product(dy, s, act, b, out, dbias if need_bias and out is dweight else None)
    return dx, dweight, dbias
