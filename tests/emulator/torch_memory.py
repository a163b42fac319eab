"""What torch allocates while kernels are emulated, and which addresses it is asked for."""

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def poison(t: Tensor) -> float | int:
    """What memory of this dtype holds until something is written."""
    return float("nan") if t.is_floating_point() else 1 if t.dtype == torch.bool else 0x5A


def unwritten(entry: weakref.ref | None, t: Tensor) -> bool:
    """Whether torch has not written to `t` since it was allocated."""
    if entry is None or entry() is not t:
        return False
    return bool((t.isnan() if t.is_floating_point() else t == poison(t)).all())


@contextlib.contextmanager
def watched_memory(session: Any) -> Iterator[None]:
    """Know what is allocated and not yet written, and what addresses were asked for: into the
    session's `blank` and `asked`, by address.

    Memory that nothing has written holds nan, so that a read in a later launch is seen too.
    """

    def poisoned(allocate: Any) -> Any:
        @functools.wraps(allocate)
        def call(*args: Any, **kwargs: Any) -> Tensor:
            t = allocate(*args, **kwargs)
            if type(t) is Tensor and t.numel() and t.device.type == "cpu" and not t.is_inference():
                t.fill_(poison(t))
                session.blank[address(t)] = weakref.ref(t)
            return t

        return call

    address = Tensor.data_ptr

    def recorded(t: Tensor) -> int:
        session.asked[address(t)] = weakref.ref(t)
        return address(t)

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        stack.enter_context(mock.patch.object(Tensor, "data_ptr", recorded))
        yield
