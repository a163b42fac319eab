"""Calls torch.ops.pyfast.* with hostile arguments; a script, so that a crash is seen as one.

Takes a real call of each operation, forward and backward, and replaces one argument at a time. A
call may raise or answer; it may not crash. Each is named before it is made.

    python -m tests.hostile_calls [--device cpu|cuda|emulator] [OP ...]

On `emulator` the CUDA C++ kernels take the calls: one that reads or writes what is not its own
raises a Violation, which ends the script.
"""

import argparse
import contextlib
import faulthandler
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import pyfast
from pyfast import backend, testing
from tests.run_case import recorded

HUGE = 2**40


def bad_tensors(t: Tensor) -> Iterator[tuple[str, Any]]:
    """(description, replacement) for one tensor argument."""
    yield "no dimensions", t.new_zeros(())
    yield "empty", t.new_zeros(0)
    yield "rank up", t.unsqueeze(0)
    yield "rank down", t.flatten()
    for dim in range(t.dim()):
        yield f"dim {dim} of size 0", t.narrow(dim, 0, 0)
        if t.shape[dim] > 1:
            yield f"dim {dim} one short", t.narrow(dim, 0, t.shape[dim] - 1)
            yield f"dim {dim} of size 1", t.narrow(dim, 0, 1)
        yield f"dim {dim} doubled", torch.cat((t, t), dim)
        yield (
            f"dim {dim} huge",
            t.new_zeros([1] * t.dim()).expand(
                [HUGE if d == dim else n for d, n in enumerate(t.shape)]
            ),
        )
    yield (
        "all dims huge",
        t.new_zeros([1] * t.dim()).expand([2 ** (60 // max(t.dim(), 1))] * t.dim()),
    )
    yield "stride 0", t.new_zeros([1] * t.dim()).expand(t.shape)
    yield "odd strides", torch.cat((t, t), -1)[..., ::2] if t.dim() else t
    yield "transposed", t.transpose(0, -1) if t.dim() else t
    if t.numel() > 1:
        yield "misaligned", torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)
    for dtype in (torch.int64, torch.int32, torch.bool, torch.float64, torch.float16, torch.cfloat):
        yield str(dtype), t.to(dtype)
    yield "meta", t.to("meta")
    yield "sparse", t.to_sparse()
    yield "nan", torch.full_like(t, math.nan if t.is_floating_point() else -(2**63))
    yield (
        "largest",
        torch.full_like(t, torch.finfo(t.dtype).max if t.is_floating_point() else 2**62),
    )
    yield "None", None


def replacements(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield from bad_tensors(value)
    elif isinstance(value, list):
        yield from (("empty list", []), ("one fewer", value[:-1]), ("doubled", value + value))
        for i, item in enumerate(value[:1]):
            for words, bad in bad_tensors(item):
                yield f"[{i}] {words}", [*value[:i], bad, *value[i + 1 :]]
    elif isinstance(value, bool) or value is None:
        yield from ((str(bad), bad) for bad in (not value, torch.zeros(3), 7))
    elif isinstance(value, str):
        yield from ((repr(bad), bad) for bad in ("", "nothing", "gelu", "mean", "sum", "x" * 99))
    else:
        numbers = (0, -1, 2**62, -(2**62), math.nan, math.inf, -math.inf, 1e308, None)
        yield from ((repr(bad), bad) for bad in numbers)


def calls(ops: Sequence[str]) -> Iterator[tuple[str, Any, tuple]]:
    """(name, operation, arguments) of every call to make."""
    for op in ops:
        for case in testing.cases(op)[:2]:
            for function, args in recorded(case):
                for i, argument in enumerate(function._schema.arguments):
                    for words, bad in replacements(args[i]):
                        name = f"{function}: {argument.name} {words}"
                        yield name, function, (*args[:i], bad, *args[i + 1 :])


def copied(value: Any, device: str = "cpu") -> Any:
    """Its own tensors for each call, since some calls write to them."""
    if isinstance(value, list):
        return [copied(v, device) for v in value]
    huge = isinstance(value, Tensor) and (value.numel() >= 2**32 or value.layout != torch.strided)
    if not isinstance(value, Tensor) or huge or value.device.type == "meta":
        return value
    fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return fresh.fill_(0).copy_(value) if 0 not in value.stride() else value


@contextlib.contextmanager
def kernels(device: str) -> Iterator[None]:
    """The kernels of a device take the calls in this block."""
    if device != "emulator":
        yield
        return
    from tests.emulator.cuda import emulated

    with emulated(), pyfast.using("cuda"):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile_calls")
    parser.add_argument("--device", choices=["cpu", "cuda", "emulator"], default="cpu")
    parser.add_argument("ops", nargs="*", metavar="OP")
    options = parser.parse_args()
    on = "cuda" if options.device == "cuda" else "cpu"
    faulthandler.enable()
    torch.set_num_threads(1)
    raised = answered = 0
    for name, function, args in calls(options.ops or backend.OPS):
        print(name, flush=True)
        try:
            with kernels(options.device):
                function(*[copied(a, on) for a in args])
            answered += 1
        except (RuntimeError, TypeError, ValueError, IndexError):
            raised += 1
        if on == "cuda":
            torch.cuda.synchronize()  # what a kernel broke is found by whoever comes next
    print(f"done: {raised} raised, {answered} answered")


if __name__ == "__main__":
    sys.exit(main())
