"""Tensor arguments in memory of their own, so that an access past one reaches no other.

Tensors of torch lie side by side: what runs over the end of one may land in the next, where it is
within bounds. A launch therefore sees copies with unused memory around them.
"""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

GUARD = 1 << 20  # bytes on each side: reserved, never touched
LARGEST = 1 << 28  # bytes: larger ones, as those of strides of gigabytes, stay where they are
ALIGNMENT = 512  # bytes: where a copy lies within so many is where the tensor lay


def extent(t: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if not t.numel():
        return 0
    strides = zip(t.shape, t.stride(), strict=True)
    return (1 + sum((size - 1) * step for size, step in strides)) * t.element_size()


def _movable(tensors: Sequence[Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
    """Those of `tensors` that share no byte with another, nor with those that stay."""
    spans = [(t.data_ptr(), t.data_ptr() + extent(t), t) for t in (*tensors, *fixed)]
    found = []
    for begin, end, t in spans[: len(tensors)]:
        meets = sum(b < end and begin < e for b, e, _ in spans)
        if 0 < end - begin <= LARGEST and meets == 1:
            found.append(t)
    return found


def _copy(t: Tensor, size: int) -> Tensor:
    memory = torch.empty(size + 2 * GUARD + ALIGNMENT, dtype=torch.uint8)
    at = GUARD + (t.data_ptr() - memory.data_ptr() - GUARD) % ALIGNMENT
    return memory[at : at + size].view(t.dtype).as_strided(t.shape, t.stride())


@contextlib.contextmanager
def guarded(args: Sequence[Any], fixed: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
    """Copies of the tensors in `args` by their address; written back at the end, come what may.

    `fixed` are reached by addresses that lie in memory, and stay; so does what overlaps another.
    """
    tensors = {id(a): a for a in args if isinstance(a, Tensor) and a.device.type == "cpu"}
    homes = []
    for t in _movable(list(tensors.values()), fixed):
        size = extent(t)
        copy = _copy(t, size)
        ctypes.memmove(copy.data_ptr(), t.data_ptr(), size)
        homes.append((t, copy, size))
    try:
        yield {t.data_ptr(): copy for t, copy, _ in homes}
    finally:
        for t, copy, size in homes:
            ctypes.memmove(t.data_ptr(), copy.data_ptr(), size)
