"""Operands by tensor map: with compute capability 9 one thread asks for a whole tile at once.

Maps are made on the host, for each launch, and are parameters of the kernel: nothing is allocated
for them on the device, and a CUDA graph keeps them. They are worth it where wgmma multiplies, which
reads from shared memory what a map has put there. A map wants what cp.async of 16 bytes wants, too:
elements side by side one way, and the other way multiples of 16 bytes; other operands are copied.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pyfast.kernels.guards import ALIGNMENT
from pyfast.kernels.matmul import WIDEST, MatmulConfig, capability
from pyfast.kernels.packing import packed

CAPABILITY = 9  # major; tcgen05 of 10 has maps too, but nothing here runs it yet
LEAST_ROWS = 64  # of a tile: what four warps multiply with one wgmma
LONGEST = 2**31  # elements; coordinates have 32 bits


def order(t: Tensor) -> str:
    """Along what the elements of t [rows, depth] lie side by side, 16 bytes after 16 bytes.

    "rows" where rows are whole in memory, "depth" where columns are, "any" where neither holds.
    """
    if t.data_ptr() % ALIGNMENT == 0 and min(t.shape) > 0 and max(t.shape) < LONGEST:
        for name, view in (("rows", t), ("depth", t.t())):
            outer, inner = view.stride()
            if inner == 1 and outer >= view.shape[1] and outer * t.itemsize % ALIGNMENT == 0:
                return name
    return "any"


def whole_order(t: Tensor) -> str:
    """`order`, for pointers: "any" also where rows or columns end within 16 bytes."""
    found = order(t)
    inner = t.shape[1] if found == "rows" else t.shape[0]
    return found if inner * t.itemsize % ALIGNMENT == 0 else "any"


def maps(config: MatmulConfig, like: Tensor) -> bool:
    """Whether a product of tensors like this one, with these tiles, reads by map."""
    return capability(like)[0] == CAPABILITY and _moves_whole(config, like)


def _moves_whole(config: MatmulConfig, like: Tensor) -> bool:
    """Whether operands are worth a copy that puts their elements 16 bytes after 16 bytes.

    Not where the rows of one tile are all there are: each operand is read once.
    """
    return like.dtype in (torch.bfloat16, torch.float16) and config.block_m >= LEAST_ROWS


def is_whole(config: MatmulConfig, *operands: Tensor) -> bool:
    """Whether the product with these tiles can read `operands` as they lie, in its widest loads."""
    found = order if maps(config, operands[0]) else whole_order
    return not _moves_whole(config, operands[0]) or all(found(t) != "any" for t in operands)


def arranged(config: MatmulConfig, *operands: Tensor) -> list[Tensor]:
    """`operands` [rows, depth], those that cannot be read in the widest loads packed."""
    return [t if is_whole(config, t) else packed(t) for t in operands]


def tile_map(t: Tensor, rows: int, depth: int) -> TensorDescriptor:
    """The map of t [rows, depth], cut into tiles of these sizes."""
    if order(t) == "rows":
        return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, depth])
    flipped = t.t()
    return TensorDescriptor(flipped, list(flipped.shape), list(flipped.stride()), [depth, rows])


def operand(
    mapped: bool, t: Tensor, rows: int, depth: int
) -> tuple[Tensor | TensorDescriptor, str]:
    """(t [rows, depth] as a kernel takes it that reads tiles of these sizes, its order)."""
    return (tile_map(t, rows, depth), order(t)) if mapped else (t, whole_order(t))


def operands(
    mapped: bool, config: MatmulConfig, a: Tensor, b: Tensor
) -> tuple[tuple[Any, Any], dict[str, str]]:
    """(a [M, K] and b [N, K] as a kernel takes them, its constants that say how)."""
    a_given, a_order = operand(mapped, a, config.block_m, config.block_k)
    b_given, b_order = operand(mapped, b, config.block_n, config.block_k)
    return (a_given, b_given), {"A_ORDER": a_order, "B_ORDER": b_order}


def results(mapped: bool, config: MatmulConfig, *outs: Tensor) -> tuple[list[Any], dict[str, str]]:
    """(`outs`, [M, N] and alike, as a kernel takes them, its constant); None where one is empty."""
    if mapped and order(outs[0]) == "rows":
        block = config.block_m, min(config.block_n, WIDEST.value)
        return [tile_map(t, *block) if t.numel() else None for t in outs], {"OUT_ORDER": "map"}
    found = "rows" if whole_order(outs[0]) == "rows" else "any"
    return [t if t.numel() else None for t in outs], {"OUT_ORDER": found}


@triton.jit
def settled(acc):
    """acc, finished: the wgmma that adds to it is waited for here, at the cost of no instruction.

    Triton lets a wgmma of one step run on into the next. That is wrong where threads make its left
    operand, in registers which the next step writes, and where they read a tile themselves: it then
    keeps one tile fewer of it, and copies the next over what the wgmma still reads.
    """
    return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=acc.dtype, is_pure=True, pack=1)
