"""rope in Triton: one read and one write; the angles of a position are read once for all heads."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfast.kernels import guards
from pyfast.kernels.norm_tiles import SECTOR
from pyfast.kernels.processors import processors

OP = "rope"
TILE = 2048  # elements of each half that a program handles at once: 16 a thread


class Config(NamedTuple):
    """A program takes one position and every `splits`-th sequence of the batch."""

    splits: int
    block_heads: int
    block_half: int
    group: int  # elements; divides every offset a half can begin at
    num_warps: int


def launch_config(
    shape: tuple[int, int, int, int],
    strides: tuple[int, ...],
    itemsize: int,
    address: int,
    processors: int,
) -> Config:
    """The launch for x [B, H, T, D] of `strides` (the last is 1) from `address` on.

    The batch is split only where there are too few positions to fill the processors.
    """
    batch, heads, length, size = shape
    half = size // 2
    block_half = triton.next_power_of_2(half)
    block_heads = max(1, min(triton.next_power_of_2(heads), TILE // block_half))
    num_warps = min(4, max(1, block_heads * block_half // 512))
    splits = max(1, min(batch, processors * 16 // (length * num_warps)))
    group = math.gcd(half, *strides[:3], 16 // itemsize) if address % guards.ALIGNMENT == 0 else 1
    return Config(splits, block_heads, block_half, group, num_warps)


@triton.jit
def _parted(pairs):
    """The halves of heads [heads, 2, D/2], in float32 once they have parted."""
    first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "n_batch", "n_heads", "n_length", "half_groups", "batch_groups", "head_groups",
        "time_groups", "cos_groups", "sin_groups",
    ]
)  # fmt: skip
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr,
    n_batch, n_heads, n_length, half_groups,
    batch_groups, head_groups, time_groups, cos_groups, sin_groups,
    INTERLEAVED: tl.constexpr, JOINED: tl.constexpr, INVERSE: tl.constexpr, GROUP: tl.constexpr,
    ANGLES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), all heads of one position [BLOCK_HEADS, D/2].

    x1, x2 are the halves of a head, or its even and odd elements; out is [B, T, H, D], contiguous.
    JOINED: halves that share a sector are loaded and stored at once, and part in between.
    """
    time = tl.program_id(0).to(tl.int64)
    half = half_groups * GROUP
    half_offs = tl.arange(0, BLOCK_HALF)
    half_mask = half_offs < half
    cos_ptrs = cos_ptr + time * cos_groups * ANGLES + half_offs
    sin_ptrs = sin_ptr + time * sin_groups * ANGLES + half_offs
    cos = tl.load(cos_ptrs, mask=half_mask, other=0.0)[None, :]
    sin = tl.load(sin_ptrs, mask=half_mask, other=0.0)[None, :]
    if INVERSE:
        sin = -sin
    for batch in range(tl.program_id(1), n_batch, tl.num_programs(1)):
        x_start = batch.to(tl.int64) * batch_groups * GROUP + time * time_groups * GROUP
        out_start = (batch.to(tl.int64) * n_length + time) * n_heads * 2 * half
        for first_head in range(0, n_heads, BLOCK_HEADS):
            head_offs = first_head + tl.arange(0, BLOCK_HEADS)
            x_offs = x_start + head_offs.to(tl.int64)[:, None] * head_groups * GROUP
            out_offs = out_start + head_offs[:, None] * 2 * half
            head_mask = (head_offs < n_heads)[:, None]
            if JOINED:
                offs = tl.arange(0, 2)[None, :, None] * half + half_offs[None, None, :]
                mask = head_mask[:, :, None] & half_mask[None, None, :]
                pairs = tl.load(x_ptr + x_offs[:, :, None] + offs, mask=mask, other=0.0)
                first, second = _parted(pairs)
                turned = tl.join(first * cos - second * sin, second * cos + first * sin)
                turned = tl.permute(turned.to(out_ptr.dtype.element_ty), (0, 2, 1))
                tl.store(out_ptr + out_offs[:, :, None] + offs, turned, mask=mask)
            elif INTERLEAVED:
                pair_offs = tl.arange(0, 2 * BLOCK_HALF)[None, :]
                mask = head_mask & (pair_offs < 2 * half)
                pairs = tl.load(x_ptr + x_offs + pair_offs, mask=mask, other=0.0).to(tl.float32)
                first, second = tl.split(tl.reshape(pairs, (BLOCK_HEADS, BLOCK_HALF, 2)))
                turned = tl.join(first * cos - second * sin, second * cos + first * sin)
                turned = tl.reshape(turned, (BLOCK_HEADS, 2 * BLOCK_HALF))
                out_ptrs = out_ptr + out_offs + pair_offs
                tl.store(out_ptrs, turned.to(out_ptr.dtype.element_ty), mask=mask)
            else:
                mask = head_mask & half_mask[None, :]
                x_ptrs = x_ptr + x_offs + half_offs[None, :]
                first = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
                second = tl.load(x_ptrs + half, mask=mask, other=0.0).to(tl.float32)
                out_ptrs = out_ptr + out_offs + half_offs[None, :]
                turned = (first * cos - second * sin).to(out_ptr.dtype.element_ty)
                tl.store(out_ptrs, turned, mask=mask)
                turned = (second * cos + first * sin).to(out_ptr.dtype.element_ty)
                tl.store(out_ptrs + half, turned, mask=mask)


def rope_triton(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """x [B, H, T, D] turned by the angles of cos, sin [T, D/2], or back; stored as [B, T, H, D]."""
    guards.first(OP, "x", x, 4)
    batch, heads, length, size = x.shape
    guards.expect(size % 2 == 0, OP, "x", "end in an even head size", list(x.shape))
    guards.expect(size <= 2 * TILE, OP, "x", f"end in a head size up to {2 * TILE}", list(x.shape))
    cos, sin = (_table(name, t, x) for name, t in (("cos", cos), ("sin", sin)))
    if x.stride(3) != 1:
        x = x.contiguous()
    out = x.new_empty((batch, length, heads, size))
    if x.numel():
        config = launch_config(
            (batch, heads, length, size), x.stride(), x.itemsize, x.data_ptr(), processors(x)
        )
        group, angles = config.group, _angle_group(cos, sin)
        rope_kernel[(length, config.splits)](
            x, cos, sin, out,
            batch, heads, length, size // 2 // group,
            *(x.stride(d) // group for d in (0, 1, 2)),
            *(t.stride(0) // angles for t in (cos, sin)),
            INTERLEAVED=interleaved, JOINED=not interleaved and size // 2 * x.itemsize % SECTOR > 0,
            INVERSE=inverse, GROUP=group, ANGLES=angles,
            BLOCK_HEADS=config.block_heads, BLOCK_HALF=config.block_half,
            num_warps=config.num_warps,
        )  # fmt: skip
    return out.transpose(1, 2)  # [B, H, T, D]


def _angle_group(*tables: Tensor) -> int:
    """Angles, up to 16 bytes, that divide every offset a position can begin at."""
    if any(t.data_ptr() % guards.ALIGNMENT for t in tables):
        return 1
    return math.gcd(*(t.stride(0) for t in tables), guards.ALIGNMENT // tables[0].itemsize)


def _table(name: str, t: Tensor, x: Tensor) -> Tensor:
    """cos or sin after its checks, the entries of a position side by side."""
    guards.expect_like(OP, name, t, x, (x.shape[2], x.shape[3] // 2), torch.float32)
    return t if t.stride(1) == 1 else t.contiguous()
