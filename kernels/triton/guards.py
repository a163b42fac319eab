"""Memory-safety guards of the Triton rooms, as csrc/checks.h has them for the C++ ones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast import triton_rooms

ALIGNMENT = 16  # bytes; what the widest load of a GPU wants


def expect(condition: bool, op: str, argument: str, rule: str, got: Any) -> None:
    """Raise ValueError unless `condition`."""
    if not condition:
        raise ValueError(f"{op}: {argument} must {rule}; got {got}")


def expect_dtype(op: str, name: str, t: Tensor, *dtypes: torch.dtype) -> None:
    """Raise TypeError unless `t` is of one of `dtypes`."""
    if t.dtype not in dtypes:
        words = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be {words} on the triton backend; got {t.dtype}")


def expect_launchable(op: str, name: str, t: Tensor) -> None:
    """Raise RuntimeError unless Triton has a driver for the device of `t`."""
    if not t.is_cuda and (why := triton_rooms.no_driver(t.device.type)):
        rule = "be on a CUDA device for the triton backend"
        raise RuntimeError(f"{op}: {name} must {rule}; got {t.device}: {why}")


def first(op: str, name: str, t: Tensor, rank: int) -> Tensor:
    """The tensor that decides device and dtype: `rank` dimensions, float32, bfloat16 or float16."""
    expect_launchable(op, name, t)
    expect(t.dim() == rank, op, name, f"have {rank} dimensions", list(t.shape))
    expect_dtype(op, name, t, *triton_rooms.FLOATS)
    return t


def expect_like(
    op: str, name: str, t: Tensor, like: Tensor, shape: Sequence[int], *dtypes: torch.dtype
) -> None:
    """Raise unless `t` has `shape`, one of `dtypes` (those of `like` if none) and its device."""
    if t.device != like.device:
        raise RuntimeError(f"{op}: {name} must be on {like.device}; got {t.device}")
    expect(tuple(t.shape) == tuple(shape), op, name, f"be {list(shape)}", list(t.shape))
    expect_dtype(op, name, t, *(dtypes or (like.dtype,)))


def operand(
    op: str, name: str, t: Tensor | None, like: Tensor, shape: Sequence[int], *dtypes: torch.dtype
) -> Tensor | None:
    """`t` after `expect_like`, contiguous and aligned; None stays None."""
    if t is None:
        return None
    expect_like(op, name, t, like, shape, *dtypes)
    return packed(t)


def packed(t: Tensor) -> Tensor:
    """`t` itself where it is contiguous and aligned for the widest loads, else a copy."""
    t = t.contiguous()
    return t if t.data_ptr() % ALIGNMENT == 0 else t.clone()
