"""The words of the doors: `<op>: <argument> must <rule>; got <value>[; <what to do>]`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def expect(condition: bool, op: str, argument: str, rule: str, got: Any, remedy: str = "") -> None:
    """Raise ValueError unless `condition`: a shape or a value is wrong."""
    if not condition:
        raise ValueError(_sentence(op, argument, rule, got, remedy))


def expect_type(
    condition: bool, op: str, argument: str, rule: str, got: Any, remedy: str = ""
) -> None:
    """Raise TypeError unless `condition`: a dtype or a kind of object is wrong."""
    if not condition:
        raise TypeError(_sentence(op, argument, rule, got, remedy))


def expect_float(op: str, argument: str, tensor: Any) -> None:
    """A dense tensor of one of the four dtypes the kernels take."""
    expect_type(isinstance(tensor, Tensor), op, argument, "be a tensor", type(tensor).__name__)
    expect_type(tensor.layout == torch.strided, op, argument, "be dense", tensor.layout)
    if tensor.dtype not in FLOATS:
        rule = "be float32, bfloat16, float16 or float64"
        raise TypeError(_sentence(op, argument, rule, tensor.dtype))


def expect_like(op: str, argument: str, tensor: Any, like: Tensor, like_name: str) -> None:
    """A dense tensor of the dtype and on the device of `like`."""
    expect_type(isinstance(tensor, Tensor), op, argument, "be a tensor", type(tensor).__name__)
    expect_type(tensor.layout == torch.strided, op, argument, "be dense", tensor.layout)
    if tensor.dtype != like.dtype:
        rule = f"have the dtype of {like_name}, {like.dtype}"
        raise TypeError(_sentence(op, argument, rule, tensor.dtype))
    expect_device(op, argument, tensor, like, like_name)


def expect_device(op: str, argument: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """A tensor on the device of `like`."""
    if tensor.device != like.device:
        rule = f"be on the device of {like_name}, {like.device}"
        raise RuntimeError(_sentence(op, argument, rule, tensor.device))


def expect_shape(op: str, argument: str, tensor: Tensor, shape: Sequence[int], names: str) -> None:
    """A tensor of exactly `shape`; `names` spells it with its letters, as in "[N=768]"."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(_sentence(op, argument, f"be {names}", list(tensor.shape)))


def to_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as torch.autocast wants the arguments of a matrix product: in its dtype."""
    first = tensors[0]
    known = isinstance(first, Tensor) and not first.is_meta  # what is not, the door's checks refuse
    if not known or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in narrow else t for t in tensors)


def _sentence(op: str, argument: str, rule: str, got: Any, remedy: str = "") -> str:
    return f"{op}: {argument} must {rule}; got {got}" + (f"; {remedy}" if remedy else "")
