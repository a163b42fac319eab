"""Tensor maps for kernels that take them as parameters, in the layout of engine/tensormap.h."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch

# The numbering of tensormap.replace .elemtype, which is not cuTensorMapEncodeTiled's.
ELEMENTS = {
    torch.uint8: 0,
    torch.int8: 0,
    torch.bool: 0,
    torch.int16: 1,
    torch.int32: 3,
    torch.int64: 5,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 9,
    torch.bfloat16: 10,
}
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes -> .swizzle_mode


def encode_tensor_map(
    address: int,
    shape: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    dtype: torch.dtype,
    swizzle: int = 0,
    fill_nan: bool = False,
) -> bytes:
    """The 128 bytes of a tiled tensor map.

    Args:
        address: of the first element.
        shape: sizes as torch has them, outermost first.
        strides: in elements, the last one 1.
        box: sizes of a tile, outermost first.
        dtype: of the elements.
        swizzle: 0, 32, 64 or 128 bytes.
        fill_nan: elements outside are nan instead of zero.

    Raises:
        ValueError: the last stride is not 1, or there are more than five dimensions.
    """
    rank = len(shape)
    if not 1 <= rank <= 5 or len(box) != rank or len(strides) != rank or strides[-1] != 1:
        raise ValueError(
            "encode_tensor_map: shape, strides and box must have 1 to 5 entries, the last stride "
            f"1; got {list(shape)}, {list(strides)}, {list(box)}"
        )
    sizes = [*reversed(shape), *[1] * (5 - rank)]
    boxes = [*reversed(box), *[1] * (5 - rank)]
    steps = [step * dtype.itemsize for step in reversed(strides[:-1])]
    steps += [0] * (4 - len(steps))
    facts = (rank - 1, ELEMENTS[dtype], 0, SWIZZLES[swizzle], int(fill_nan))
    return struct.pack("<Q4Q5I5I5I5B23x", address, *steps, *sizes, *boxes, *[1] * 5, *facts)


def descriptor_arguments(descriptor: Any, facts: dict[str, Any] | None) -> list[Any]:
    """What a kernel takes for one of Triton's TensorDescriptors.

    Args:
        descriptor: with base, shape, strides and padding.
        facts: the entry of the kernel's `tensordesc_meta`; None where it reads through pointers.
    """
    shape, strides = list(descriptor.shape), list(descriptor.strides)
    nan = descriptor.padding == "nan"
    if facts is None:
        tf32 = getattr(descriptor, "round_f32_to_tf32", False)
        return [descriptor.base, *shape, *strides, nan, tf32, *shape, *strides]
    encoded = encode_tensor_map(
        descriptor.base.data_ptr(),
        shape,
        strides,
        facts["block_size"],
        descriptor.base.dtype,
        {mode: width for width, mode in SWIZZLES.items()}[facts["swizzle"]],
        nan,
    )
    return [encoded, *shape, *strides]
