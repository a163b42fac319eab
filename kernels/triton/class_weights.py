"""Sums over the rows of a cross entropy, on the device: nothing waits for them on the host."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _row_weights(target_ptr, weight_ptr, offs, mask, n_cols, ignore_index,
                 HAS_WEIGHT: tl.constexpr):  # fmt: skip
    """The weight of each row: that of its class, 1 without class weights, 0 if it is ignored."""
    target = tl.load(target_ptr + offs, mask=mask, other=0)
    counts = mask & (target != ignore_index)
    if HAS_WEIGHT:
        is_class = counts & (target >= 0) & (target < n_cols)
        return tl.load(weight_ptr + target, mask=is_class, other=0.0)
    return counts.to(tl.float32)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "ignore_index"])
def reduce_kernel(
    loss_ptr, target_ptr, weight_ptr, out_ptr,
    n_rows, n_cols, ignore_index,
    MEAN: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the sum of loss [n_rows], divided by the weights of all rows if MEAN. One program."""
    loss = tl.zeros((BLOCK,), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, n_rows, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        mask = offs < n_rows
        loss += tl.load(loss_ptr + offs, mask=mask, other=0.0)
        if MEAN:
            weight += _row_weights(
                target_ptr, weight_ptr, offs, mask, n_cols, ignore_index, HAS_WEIGHT
            )
    total = tl.sum(loss, axis=0)
    if MEAN:
        total = tl.div_rn(total, tl.sum(weight, axis=0))  # 0 / 0 is nan, as in torch
    tl.store(out_ptr, total)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "ignore_index"])
def totals_kernel(
    target_ptr, weight_ptr, totals_ptr,
    n_rows, n_cols, ignore_index,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """totals = (the weights of all rows, the weights of all classes). One program."""
    rows = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, n_rows, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        mask = offs < n_rows
        rows += _row_weights(target_ptr, weight_ptr, offs, mask, n_cols, ignore_index, HAS_WEIGHT)
    tl.store(totals_ptr, tl.sum(rows, axis=0))
    if HAS_WEIGHT:
        classes = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, n_cols, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            classes += tl.load(weight_ptr + offs, mask=offs < n_cols, other=0.0)
        tl.store(totals_ptr + 1, tl.sum(classes, axis=0))


def launch_reduce(
    loss: Tensor, target: Tensor, weight: Tensor | None, classes: int, ignore_index: int, mean: bool
) -> Tensor:
    """The sum of loss [rows], or its weighted mean: a float32 scalar."""
    out = loss.new_empty(())
    reduce_kernel[(1,)](
        loss, target, weight, out, loss.numel(), classes, ignore_index,
        MEAN=mean, HAS_WEIGHT=weight is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def launch_totals(target: Tensor, weight: Tensor | None, classes: int, ignore_index: int) -> Tensor:
    """[2] float32: the sum of the weights of the rows, and of the classes if they have any."""
    totals = torch.empty(2, dtype=torch.float32, device=target.device)
    totals_kernel[(1,)](
        target, weight, totals, target.numel(), classes, ignore_index,
        HAS_WEIGHT=weight is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return totals
