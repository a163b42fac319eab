"""What a call allocates it gives back: the heap after many calls is that after a few."""

import ctypes

import pytest
import torch

import pyfast
from pyfast import backend, testing
from pyfast.testing import Case

pytestmark = pytest.mark.skipif(backend.extension() is None, reason="pyfast._C is not built")

FIRST = [next(case for case in testing.cases() if case.op == op) for op in backend.OPS]
FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
CALLS = 200
MOST = 16  # bytes a call: torch's own caches fill a little; one leaked string is 48


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


def heap_in_use() -> int:
    """Bytes of the C heap that are allocated."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("the C library has no mallinfo2")
    ask.restype = MallInfo
    info = ask()
    return info.uordblks + info.hblkhd


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_op_leaves_no_memory_behind(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    for name in case.grads:
        inputs[name].requires_grad_()
    leaves = [inputs[name] for name in case.grads]

    def step() -> None:
        out = getattr(pyfast, case.op)(**inputs)
        if leaves:
            outs = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(sum(o.sum() for o in outs), leaves)

    def growth() -> int:
        before = heap_in_use()
        for _ in range(CALLS):
            step()
        return heap_in_use() - before

    for _ in range(50):
        step()
    # What is left behind is so by every call; what somebody makes once, late, is by one round.
    assert min(growth() for _ in range(3)) < MOST * CALLS
