"""The products of a backward pass: out = A B, A = dy * act'(saved), and the sums of A's rows."""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from pyfast.kernels.activations import GRAD_FROM_OUTPUT
from pyfast.kernels.column_sums import launch_column_sums, padded, partial_rows
from pyfast.kernels.gradient_kernels import (
    SUM_ROWS,
    gradient_product_kernel,
    mapped_gradient_kernel,
)
from pyfast.kernels.matmul import (
    BIG_SHARED,
    MatmulConfig,
    capability,
    launch_config,
    launch_sum_parts,
    split_count,
)
from pyfast.kernels.packing import turned
from pyfast.kernels.processors import processors
from pyfast.kernels.tensor_maps import (
    CAPABILITY,
    arranged,
    is_whole,
    maps,
    operands,
    order,
    results,
    tile_map,
    whole_order,
)

# The large tiles of a product whose left operand is changed, or summed, on its way: no spills.
THROUGH_REGISTERS = MatmulConfig(128, 128, 32, num_warps=8, num_stages=4, persistent=True)
# Columns of b up to which a wgmma's left operand is changed on its way; a model, not a measurement:
# of 1024 x 256 by 256 columns 10% fewer bytes move than with a pass before, for 30% more warp
# instructions, of which each 256 columns more add as many again.
FUSED_COLUMNS = 1024


def _config(dy: Tensor, b: Tensor, act: str, sums: bool, accumulate: bool) -> MatmulConfig:
    """The tiles: smaller where registers or shared memory would not do for what comes on top."""
    (m, k), n = dy.shape, b.shape[1]
    config, major = launch_config(capability(dy), dy.dtype, m, n, k), capability(dy)[0]
    if config.block_m < THROUGH_REGISTERS.block_m:
        return config
    if major == CAPABILITY:
        return config if act == "none" else replace(config, num_stages=3)
    if accumulate and major == 10:  # a wider tile of sums and addresses spills
        return replace(THROUGH_REGISTERS, block_n=64, block_k=64)
    return config if act == "none" and not sums and not accumulate else THROUGH_REGISTERS


def sums_in_product(dy: Tensor, saved: Tensor | None, b: Tensor) -> bool:
    """Whether the product of dy [M, K] and b may change its left operand, or sum it, on the way.

    Not where a pass over it writes what else would be copied. tcgen05 Triton cannot pipeline so,
    nor a wgmma that does not read by map (see `settled`).
    """
    major, (m, k) = capability(dy)[0], dy.shape
    config = launch_config(capability(dy), dy.dtype, m, b.shape[1], k)
    if any(whole_order(t) == "any" for t in (dy, saved) if t is not None) and config.block_m > 16:
        return False
    if saved is not None and order(saved) != order(dy):
        return False
    return major not in BIG_SHARED or maps(config, dy)


def act_in_product(dy: Tensor, saved: Tensor | None, act: str, b: Tensor) -> bool:
    """Whether the product of dy act'(saved) and b takes the derivative at a low enough cost.

    With wgmma the threads take it before they multiply, not meanwhile: beyond FUSED_COLUMNS of b it
    is taken so often that one pass, which moves 3/5 of its bytes for naught, costs less.
    """
    if act == "none":
        (m, k), n = dy.shape, b.shape[1]
        return is_whole(launch_config(capability(dy), dy.dtype, m, n, k), dy)
    cheap = capability(dy)[0] != CAPABILITY or b.shape[1] <= FUSED_COLUMNS
    return act in GRAD_FROM_OUTPUT and cheap and sums_in_product(dy, saved, b)


def gradient_product(
    dy: Tensor,
    saved: Tensor | None,
    act: str,
    b: Tensor,
    out: Tensor,
    sums: Tensor | None = None,
    count: Tensor | None = None,
    counts: str = "none",
    accumulate: bool = False,
) -> None:
    """out [M, N] = A @ b and sums [M] = A.sum(1), A = dy * act'(saved) [M, K]; any strides.

    Operands with rows of zeros at their end make no difference: `out` and the shorter depth count.

    `counts` is "rows" or "depth" where `count`, an int32 on the device, says how many are there;
    past them dy is zero and b finite. With `accumulate`, `out`, float32, grows. Workspace: float32
    [splits, M, N] where M N has few tiles and K is long, at most 16 splits; for sums 16 rows each.
    """
    (m, n), k = out.shape, min(dy.shape[1], b.shape[0])
    config = _config(dy, b, act, sums is not None, accumulate)
    dy, bt = arranged(config, dy, b.t())
    bt, mapped = turned(bt), maps(config, dy)
    splits = 1 if accumulate or counts == "rows" else split_count(config, m, n, k)
    part = out if splits == 1 else out.new_empty((splits, m * n), dtype=torch.float32)
    rows = splits * SUM_ROWS.value
    part_sums = None if sums is None else partial_rows(1, rows, m, dy)
    steps = triton.cdiv(triton.cdiv(k, config.block_k), splits)
    (a_given, b_given), orders = operands(mapped, config, dy, bt)
    (made,), out_order = results(mapped and splits == 1 and not accumulate, config, out)
    constants = {"ACT": act, "COUNTS": counts, "ACCUMULATE": accumulate} | orders | out_order
    sizes = m, n, k, steps * config.block_k
    grid = (config.programs(m, n, processors(dy)), splits)
    if mapped:
        mapped_gradient_kernel[grid](
            a_given, None if saved is None else tile_map(saved, config.block_m, config.block_k),
            b_given, made if splits == 1 else part, part_sums, count,
            *sizes,
            *out.stride(), padded(m),
            **constants, **config.keywords(),
        )  # fmt: skip
    else:
        if saved is not None and whole_order(saved) != orders["A_ORDER"]:
            constants["A_ORDER"] = "any"
        gradient_product_kernel[grid](
            dy, saved, bt, part, part_sums, count,
            *sizes,
            *dy.stride(), *(dy if saved is None else saved).stride(),
            *bt.t().stride(), *out.stride(), padded(m),
            **constants, **config.keywords(),
        )  # fmt: skip
    if splits > 1:
        launch_sum_parts(part, out)
    if sums is not None:
        launch_column_sums(part_sums, [sums])
