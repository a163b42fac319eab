"""Scripts for a GPU where "cuda" is the CPU: their tensors, and what they ask torch."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class _Here(TorchFunctionMode):
    """Whatever is asked of torch for a CUDA device is done on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.device:  # a name until something is made there
            return func(*args, **(kwargs or {}))
        named = {name: _cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_cpu, args), **named)


def _cpu(value: Any) -> Any:
    is_cuda = isinstance(value, str | torch.device) and str(value).partition(":")[0] == "cuda"
    return torch.device("cpu") if is_cuda else value


@contextlib.contextmanager
def cuda_is_cpu(capability: int) -> Iterator[None]:
    """In this block a device "cuda" is the CPU, and torch.cuda tells of one GPU that is idle."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": divmod(capability, 10),
        "synchronize": None,
        "set_device": None,
        "empty_cache": None,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            patch = mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer)
            stack.enter_context(patch)
        stack.enter_context(_Here())
        yield
