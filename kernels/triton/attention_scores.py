"""What forward and backward of attention share: sizes of the tiles, the scores and their masks.

Scores are natural exponents, rounded once; they come to base 2 after the subtraction. A score that
is its row's peak, or all there is to its log-sum-exp, then leaves exactly 0, however large it is.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_LOG2E = tl.constexpr(math.log2(math.e))
WGMMA, TCGEN05 = 9, 10  # major capabilities of the GPUs that have them


@dataclass(frozen=True)
class AttentionConfig:
    """Queries and keys of a tile, and how many warps and stages work on it."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"  # of float32 products; others know only one
    spread: bool = False  # of the forward pass: rows' sums stay apart by columns until the end
    apart: bool = False  # of dK and dV: warps share the rows of scores, too

    def keywords(self) -> dict[str, int | str]:
        """As the kernels and the launch take it."""
        return {
            "BLOCK_M": self.block_queries,
            "BLOCK_N": self.block_keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "PRECISION": self.precision,
        }


def block_features(size: int) -> int:
    """A head size padded to what a tile can have."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def head_ptr(ptr, batch, head, batch_stride, head_stride):
    """Where a head begins; 64-bit."""
    return ptr + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def load_rows(
    ptr, row_offs, rows, row_stride, feature_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """[row_offs, BLOCK] of a head, zeros beyond `rows` and SIZE."""
    feature_offs = tl.arange(0, BLOCK)
    at = row_offs.to(tl.int64)[:, None] * row_stride + feature_offs[None, :] * feature_stride
    mask = row_offs[:, None] < rows
    if SIZE != BLOCK:
        mask = mask & (feature_offs[None, :] < SIZE)
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, value, row_offs, rows, row_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_rows`, features side by side."""
    feature_offs = tl.arange(0, BLOCK)
    at = row_offs.to(tl.int64)[:, None] * row_stride + feature_offs[None, :]
    mask = row_offs[:, None] < rows
    if SIZE != BLOCK:
        mask = mask & (feature_offs[None, :] < SIZE)
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def scaled(products, scale):
    """products * scale, rounded: an FMA would subtract from what has not been."""
    return tl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;",
        "=f,f,f",
        [products, scale],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def score_exp(difference):
    """e to the difference of two scores."""
    return tl.exp2(difference * _LOG2E)


@triton.jit
def mask_scores(
    s,
    mask_ptr, mask_query_stride, mask_key_stride,
    query_offs, key_offs,  # of one dimension each, side by side with `s`
    queries, keys,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """-inf where a key takes no part, the additive mask elsewhere."""
    if MASK != "none":
        at = query_offs.to(tl.int64) * mask_query_stride + key_offs.to(tl.int64) * mask_key_stride
        inside = (query_offs < queries) & (key_offs < keys)
        value = tl.load(mask_ptr + at, mask=inside, other=0.0)
        if MASK == "boolean":
            s = tl.where(value != 0, s, float("-inf"))
        else:
            s += value.to(tl.float32)
    if CAUSAL:
        s = tl.where(key_offs <= query_offs, s, float("-inf"))
    return s


def forward_config(
    capability: tuple[int, int], dtype: torch.dtype, queries: int, size: int, masked: bool
) -> AttentionConfig:
    """The tiles of the forward pass for heads of `size` features; pure.

    A program holds its queries and their output in registers, and streams keys, values and mask.
    Capabilities 8.6 to 8.9 and 12 have 99 KB of shared memory, 8.0 has 163 and 9.0 and 10 have 227.
    """
    features = block_features(size)
    few = 16 if queries <= 16 else 64  # a decoding step has one query
    if dtype == torch.float32:
        return _float32(min(few, 32), 32 if features <= 64 else 16, features, num_stages=3)
    if features > 128:
        rows = 128 if capability[0] == WGMMA and queries > 64 else few
        keys = 64 if capability == (8, 0) else 32  # of 32, eight warps multiply q k^T twice
        # there rows are divided among warps, which would hand one another sums at every step
        spread = keys == 64
        return AttentionConfig(rows, keys, num_warps=8, num_stages=2, spread=spread)
    if queries <= 64 or masked:
        return AttentionConfig(few, 64, num_warps=4, num_stages=2)
    stages = 3 if features <= 64 and capability[0] != TCGEN05 else 2  # a third would spill there
    return AttentionConfig(128, 64, num_warps=8, num_stages=stages)


def backward_config(
    capability: tuple[int, int], dtype: torch.dtype, size: int
) -> tuple[AttentionConfig, AttentionConfig]:
    """The tiles of the kernels of dQ and of dK and dV; pure.

    A wgmma is of 64 rows for each four warps: rows of queries for dQ, of keys for dK and dV. Fewer
    rows than that would be multiplied twice; of 256 features eight warps share 64 rows of keys.
    """
    features = block_features(size)
    if dtype == torch.float32:
        config = _float32(32 if features <= 64 else 16, 32, features, num_stages=2)
        return config, config
    if features <= 64:
        config = AttentionConfig(64, 64, num_warps=4, num_stages=2)
        return config, config
    wgmma = capability[0] == WGMMA
    if features <= 128 and wgmma:
        dq = AttentionConfig(64, 64, num_warps=4, num_stages=2)
        return dq, AttentionConfig(32, 128, num_warps=8, num_stages=2)
    if features <= 128:
        config = AttentionConfig(64, 64, num_warps=8, num_stages=2)
        return config, config
    if wgmma:
        dq = AttentionConfig(64, 32, num_warps=4, num_stages=2)
        return dq, AttentionConfig(32, 64, num_warps=8, num_stages=2, apart=True)
    config = AttentionConfig(32, 32, num_warps=4, num_stages=2)
    return config, config


def mask_gradient_config(
    capability: tuple[int, int], dtype: torch.dtype, size: int
) -> AttentionConfig:
    """The tiles of the gradient of a mask, which streams all four operands; pure."""
    features = block_features(size)
    if dtype == torch.float32 or features <= 64:
        return backward_config(capability, dtype, size)[0]
    return AttentionConfig(32 if features <= 128 else 16, 32, num_warps=8, num_stages=2)


def _float32(rows: int, keys: int, features: int, num_stages: int) -> AttentionConfig:
    """Three tf32 products on the tensor cores for small heads, plain ones for the others.

    The former keep two fragments of every operand in registers: beyond 64 features they spill.
    """
    if features <= 64:
        return AttentionConfig(rows, keys, num_warps=4, num_stages=num_stages, precision="tf32x3")
    return AttentionConfig(rows, keys, num_warps=8, num_stages=2, precision="ieee")
