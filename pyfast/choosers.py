"""The measured choice among the kernels of an operation, in torch's dispatcher.

Under a dispatch key stands, for each schema, a room that calls the candidate which tuning.py knows
or finds to be the quickest for such arguments: forward and backward each for themselves, since what
one saves the other's kernels read all alike.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyfast import triton_rooms, tuning

Room = Callable[..., Any]
REMEMBERED = 1024  # calls of one schema; a server meets ever new sizes
CUBLASLT = ("linear_act", "linear_act_backward")  # schemas whose rooms can ask it


def register(
    key: str, schemas: Mapping[str, Mapping[str, Room]], winners: tuning.Winners
) -> torch.library.Library:
    """Put a choosing room for every schema under a dispatch key until the result is destroyed."""
    library = torch.library.Library("pyfast", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, candidates in schemas.items():
            only = next(iter(candidates.values()))
            several = len(candidates) > 1
            library.impl(name, chooser(name, candidates, winners) if several else only, key)
    return library


def for_gpus(
    key: str,
    ops: tuple[str, ...],
    compiled: frozenset[str],
    winners: tuning.Winners,
    extension: Any = None,
) -> torch.library.Library:
    """`register` of the extension's CUDA kernels, of operations `compiled`, and of Triton's; of
    NVIDIA's cuBLASLt, too, where the extension finds it.
    """
    return register(key, gpu_candidates(ops, compiled, extension), winners)


def chooser(name: str, candidates: Mapping[str, Room], winners: tuning.Winners) -> Room:
    """A room of schema `name` that calls the best of `candidates`; the first stands by."""
    remembered: dict[tuple, Room] = {}

    def room(*args: Any) -> Any:
        exact = signature(args)
        found = remembered.get(exact)
        if found is None:
            measure = tuning.may_measure(args)
            key = tuning.describe(name, args)
            trials = {n: functools.partial(_try, name, f, args) for n, f in candidates.items()}
            found = candidates[winners.pick(key, trials, measure)]
            if measure:
                if len(remembered) >= REMEMBERED:
                    remembered.clear()  # what comes again is looked up again, and not measured
                remembered[exact] = found
        return found(*args)

    return room


def _try(name: str, run: Room, args: tuple) -> Any:
    """A call to be timed: what an operation would write, it writes to copies."""
    return run(*(_copied(args) if name.endswith("_") else args))


def _copied(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value.clone() if isinstance(value, torch.Tensor) else value


def signature(args: tuple) -> tuple:
    """What calls must agree in to take the same candidate without another look."""
    return tuple(
        (a.shape, a.dtype, a.device)
        if isinstance(a, torch.Tensor)
        else (len(a), a[0].dtype if a else None)
        if isinstance(a, list | tuple)
        else a
        if isinstance(a, bool | str)
        else None
        for a in args
    )


def by_cublaslt(extension: Any, run: Room) -> Room | None:
    """The extension's room with cuBLASLt's products; None where there is no such library."""
    if not hasattr(extension, "choose_cublaslt") or not extension.choose_cublaslt(True):
        return None
    extension.choose_cublaslt(False)

    def call(*args: Any) -> Any:
        before = extension.cublaslt_chosen()
        extension.choose_cublaslt(True)
        try:
            return run(*args)
        finally:
            extension.choose_cublaslt(before)

    return call


def gpu_candidates(
    ops: tuple[str, ...], compiled: frozenset[str], extension: Any = None
) -> dict[str, dict[str, Room]]:
    """By schema: the extension's CUDA kernel, where it has one, and Triton's, and cuBLASLt's."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    found: dict[str, dict[str, Room]] = {}
    for name, room in triton_rooms.rooms(ops):
        found[name] = {"triton": room}
        if name.removesuffix("_backward") in compiled:
            kernel = torch.library.get_kernel(f"pyfast::{name}", "CUDA")
            own = functools.partial(kernel.call_boxed, keys)
            found[name] = {"cuda": own, "triton": room}
            if name in CUBLASLT and (vendor := by_cublaslt(extension, own)):
                found[name]["cublaslt"] = vendor
    return found
