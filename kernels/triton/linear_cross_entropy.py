"""linear_cross_entropy in Triton: logits exist as tiles, their gradient as slabs of classes.

Forward: every tile of logits leaves the maximum and the sum of exp(x - maximum) of its rows, which
a second kernel puts together. Backward, slab after slab of classes: the logits of the slab again
and from them their gradient dL, dX += dL W, dW = dL^T X. A slab of dW is finished, and rounded
once, before the next begins. Rows that do not count are sorted behind the others on the device, and
no product touches them; how many count, only the device knows.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pyfast.kernels import guards
from pyfast.kernels.class_weights import launch_reduce, launch_totals
from pyfast.kernels.gradient_product import gradient_product, sums_in_product
from pyfast.kernels.linear_backward import act_backward
from pyfast.kernels.logit_tiles import (
    launch_losses,
    launch_slab,
    launch_tiles,
    logits_config,
    workspace,
)
from pyfast.kernels.matmul import capability
from pyfast.kernels.packing import packed_rows, whole_columns
from pyfast.kernels.tensor_maps import arranged

OP = "linear_cross_entropy"
REDUCTIONS = ("none", "mean", "sum")
SLAB_STEP = 256  # classes
ROW_STEP = 16  # elements: rows of a slab begin where the widest loads can


class Problem(NamedTuple):
    """The operands after the guards, rows that count first."""

    x: Tensor  # [M, K], gathered, zeros where rows do not count; zeros may end its rows
    weight: Tensor  # [V, K], any strides; as x, and rows of zeros may follow
    classes: int  # V
    depth: int  # K
    bias: Tensor | None
    target: Tensor  # [M] int64, gathered
    all_targets: Tensor  # [M] int64, as given
    class_weight: Tensor | None  # [V] float32
    index: Tensor  # [M] int64: where each row came from
    count: Tensor  # [1] int32: how many rows count
    ignore_index: int
    smoothing: float


def slab_classes(rows: int, classes: int, itemsize: int) -> int:
    """How many classes a slab has: about an eighth of the logits, or 16 MB."""
    fits = workspace(rows, classes, itemsize) // max(1, rows * itemsize) // SLAB_STEP * SLAB_STEP
    return min(classes, max(SLAB_STEP, fits))


def _problem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    reduction: str,
) -> Problem:
    guards.first(OP, "x", x, 2)
    rows, depth = x.shape
    guards.expect(weight.dim() == 2, OP, "weight", "have 2 dimensions, [V, K]", list(weight.shape))
    classes = weight.shape[0]
    guards.expect_like(OP, "weight", weight, x, (classes, depth))
    bias = guards.operand(OP, "bias", bias, x, (classes,))
    target = guards.operand(OP, "target", target, x, (rows,), torch.int64)
    class_weight = guards.operand(OP, "class_weight", class_weight, x, (classes,), torch.float32)
    known = ", ".join(REDUCTIONS)
    guards.expect(reduction in REDUCTIONS, OP, "reduction", f"be one of {known}", repr(reduction))
    ignored = target == ignore_index
    index = torch.argsort(ignored, stable=True)
    count = (rows - ignored.sum(dtype=torch.int32)).reshape(1).to(torch.int32)
    (weight,) = arranged(logits_config(capability(x), x.dtype, rows, classes, depth), weight)
    return Problem(
        packed_rows(x, index, count), weight, classes, depth, bias, target.index_select(0, index),
        target, class_weight, index, count, ignore_index, smoothing,
    )  # fmt: skip


def _gradients(
    p: Problem, grad_loss: Tensor, lse: Tensor, reduction: str, need: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias), empty where not needed; lse [M, 2] in the given order."""
    need_x, need_weight, need_bias = need[0], need[1], need[2] and p.bias is not None
    rows, classes, depth = p.x.shape[0], p.classes, p.depth
    dx = p.x.new_zeros((rows, depth) if need_x else 0)
    dweight = p.x.new_empty((classes, depth) if need_weight else 0)
    dbias = p.x.new_empty(classes if need_bias else 0)
    if rows * classes == 0 or not any((need_x, need_weight, need_bias)):
        return dx, dweight.zero_(), dbias.zero_()
    totals = launch_totals(p.all_targets, p.class_weight, classes, p.ignore_index)
    slab = slab_classes(rows, classes, p.x.itemsize)
    buffer = p.x.new_zeros(rows, triton.cdiv(slab, ROW_STEP) * ROW_STEP)
    summed = p.x.new_zeros((rows, depth) if need_x else 0, dtype=torch.float32)
    for first in range(0, classes, slab):
        part = slice(first, min(first + slab, classes))
        dlogits = buffer[:, : whole_columns(part.stop - first, p.x.itemsize)]
        launch_slab(p, part, grad_loss, lse, totals, reduction == "mean", dlogits)
        if need_x and depth:
            gradient_product(
                dlogits, None, "none", p.weight[part], summed,
                count=p.count, counts="rows", accumulate=True,
            )  # fmt: skip
        sums = dbias[part] if need_bias else None
        inside = need_weight and depth and sums_in_product(dlogits.t(), None, p.x)
        if need_bias and not inside:
            given = dlogits[:, : part.stop - first]
            act_backward(given, None, "none", None, sums)  # rows that do not count are zeros
            sums = None
        if need_weight and depth:
            gradient_product(
                dlogits.t(), None, "none", p.x, dweight[part], sums, p.count, counts="depth"
            )
    if need_x:
        dx.index_copy_(0, p.index, summed.to(dx.dtype))
    return dx, dweight, dbias


def linear_cross_entropy_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse [M, 2], grad_x, grad_weight, grad_bias); the gradients as the schema says.

    x [M, K], weight [V, K], any strides. A target that is no class gives nan, as does a mean of
    no rows. Workspace: a copy of x, three numbers for each row of each tile, and of the gradients
    a slab of dL and x in float32.
    """
    p = _problem(x, weight, bias, target, class_weight, ignore_index, label_smoothing, reduction)
    rows, classes = x.shape[0], weight.shape[0]
    each = torch.zeros(rows, dtype=torch.float32, device=x.device)
    lse = torch.zeros((rows, 2), dtype=torch.float32, device=x.device)
    if rows * classes:
        launch_losses(p, launch_tiles(p), each, lse)
    loss = each
    if reduction != "none":
        mean = reduction == "mean"
        loss = launch_reduce(each, p.all_targets, p.class_weight, classes, ignore_index, mean)
    now = reduction != "none" and x.dtype == torch.float32
    need = (need_x and now, need_weight and now, need_bias and now)
    return loss, lse, *_gradients(p, loss.new_ones(()), lse, reduction, need)


def linear_cross_entropy_backward_triton(
    grad_loss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias), empty where not needed; the logits are made again."""
    p = _problem(x, weight, bias, target, class_weight, ignore_index, label_smoothing, reduction)
    shape = (x.shape[0],) if reduction == "none" else ()
    guards.expect_like(OP, "grad_loss", grad_loss, x, shape, torch.float32)
    lse = guards.operand(OP, "lse", lse, x, (x.shape[0], 2), torch.float32)
    return _gradients(p, grad_loss, lse, reduction, (need_x, need_weight, need_bias))
