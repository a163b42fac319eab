"""The room of layer_norm and rms_norm: what they check, allocate and launch is the same."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyfast.kernels import guards, norm, norm_wide
from pyfast.kernels.column_sums import launch_column_sums, partial_rows
from pyfast.kernels.processors import processors


class NormOutputs(NamedTuple):
    """`sum` is empty without residual, `mean` in rms_norm."""

    out: Tensor
    sum: Tensor
    mean: Tensor
    rstd: Tensor


def affine_dtype(op: str, x: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype of weight and bias: that of x, or float32 beside a 16-bit x, as under autocast."""
    if weight is None:
        return x.dtype
    guards.expect_dtype(op, "weight", weight, x.dtype, torch.float32)
    return weight.dtype


def norm_forward(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centre: bool,
) -> NormOutputs:
    """x, residual [rows, cols]; weight, bias [cols]."""
    x = guards.packed(guards.first(op, "x", x, 2))
    rows, cols = x.shape
    guards.expect(cols < 2**31, op, "x", "have fewer than 2**31 columns", cols)
    affine = affine_dtype(op, x, weight)
    residual = guards.operand(op, "residual", residual, x, (rows, cols))
    weight = guards.operand(op, "weight", weight, x, (cols,), affine)
    bias = guards.operand(op, "bias", bias, x, (cols,), affine)
    made = NormOutputs(
        torch.empty_like(x),
        x.new_empty(0) if residual is None else torch.empty_like(x),
        x.new_empty(rows if centre else 0, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )
    if rows * cols == 0:
        return made
    if not norm.fits(cols, x.itemsize):
        wide = norm_wide.launch_config(rows, cols, x.itemsize, processors(x))
        norm_wide.wide_norm_forward_kernel[(rows,)](
            x, residual, weight, bias, *made,
            cols // wide.group, eps,
            CENTRE=centre, GROUP=wide.group, SECTOR=wide.sector,
            BLOCK_COLS=norm_wide.BLOCK_COLS, num_warps=16,
        )  # fmt: skip
        return made
    config = norm.launch_config(rows, cols, x.itemsize, processors(x))
    norm.norm_forward_kernel[(config.programs,)](
        x, residual, weight, bias, *made,
        rows, config.rows_each, cols // config.layout.group, eps,
        CENTRE=centre, LAYOUT=config.layout, TILES=config.tiles,
        num_warps=norm.forward_warps(config),
    )  # fmt: skip
    return made


def norm_backward(
    op: str,
    grad_out: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x [rows, cols], grad_weight and grad_bias [cols] or empty; without mean: rms_norm."""
    x = guards.packed(guards.first(op, "x", x, 2))
    rows, cols = x.shape
    guards.expect(cols < 2**31, op, "x", "have fewer than 2**31 columns", cols)
    affine = affine_dtype(op, x, weight)
    grad_out = guards.operand(op, "grad_out", grad_out, x, (rows, cols))
    grad_sum = guards.operand(op, "grad_sum", grad_sum, x, (rows, cols))
    mean = guards.operand(op, "mean", mean, x, (rows,), torch.float32)
    rstd = guards.operand(op, "rstd", rstd, x, (rows,), torch.float32)
    weight = guards.operand(op, "weight", weight, x, (cols,), affine)
    needs = (need_weight, need_bias)
    grads = [x.new_zeros(cols if need and not rows else 0, dtype=affine) for need in needs]
    dx = torch.empty_like(x)
    if rows * cols == 0:
        return dx, *grads
    grads = [x.new_empty(cols if need else 0, dtype=affine) for need in needs]
    operands = (grad_out, grad_sum, x, mean, rstd, weight, dx)
    launch = _launch_backward if norm.fits(cols, x.itemsize) else _launch_wide_backward
    partial = launch(operands, need_weight, need_bias)
    if need_weight or need_bias:
        launch_column_sums(partial, [g for g, need in zip(grads, needs, strict=True) if need])
    return dx, *grads


def _launch_backward(operands: tuple, need_weight: bool, need_bias: bool) -> Tensor:
    """Writes dx; partial sums of the gradients of weight and bias, as column_sums takes them."""
    x = operands[2]
    rows, cols = x.shape
    config = norm.launch_config(rows, cols, x.itemsize, processors(x))
    partial = partial_rows(need_weight + need_bias, config.programs, cols, x)
    norm.norm_backward_kernel[(config.programs,)](
        *operands, partial,
        rows, config.rows_each, cols // config.layout.group, partial.shape[2],
        NEED_WEIGHT=need_weight, NEED_BIAS=need_bias, LAYOUT=config.layout, STATS=config.stats,
        num_warps=config.num_warps,
    )  # fmt: skip
    return partial


def _launch_wide_backward(operands: tuple, need_weight: bool, need_bias: bool) -> Tensor:
    """_launch_backward of rows that do not fit into registers."""
    grad_out, _, x, mean, rstd, *_ = operands
    rows, cols = x.shape
    config = norm_wide.launch_config(rows, cols, x.itemsize, processors(x))
    partial = partial_rows(need_weight + need_bias, config.parts, cols, x)
    norm_wide.wide_norm_backward_kernel[(rows,)](
        *operands,
        cols // config.group,
        GROUP=config.group, SECTOR=config.sector, BLOCK_COLS=norm_wide.BLOCK_COLS, num_warps=16,
    )  # fmt: skip
    if need_weight or need_bias:
        norm_wide.wide_norm_weight_kernel[(config.strips, config.parts)](
            grad_out, x, mean, rstd, partial,
            rows, cols // config.group, partial.shape[2],
            NEED_WEIGHT=need_weight, NEED_BIAS=need_bias, GROUP=config.group,
            SECTOR=config.sector, STRIP_COLS=norm_wide.STRIP_COLS, num_warps=4,
        )  # fmt: skip
    return partial
