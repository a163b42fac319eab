"""The CUDA C++ kernels of the extension: which there are, and how "cuda" asks for them by name.

They register themselves under torch's CUDA key. For CPU tensors they are called while "cuda" is
asked for by name, and refuse them in one sentence, unless a stand-in for the CUDA runtime runs
them there: the tests do that.
"""

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from pyfast import build

OLDEST = 8, 0  # compute capability
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"adamw_step_": (*FLOATS, torch.float64)}  # where a room takes other dtypes than FLOATS
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def present(extension: ModuleType | None, ops: tuple[str, ...]) -> frozenset[str]:
    """The operations that the extension has CUDA kernels of; ask before others register theirs."""
    if extension is None:
        return frozenset()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(op for op in ops if has(f"pyfast::{op}", "CUDA"))


_seen: list[frozenset[tuple[int, int]]] = []  # asked for once, when a CUDA tensor is there


def capabilities() -> frozenset[tuple[int, int]]:
    """The compute capabilities of the GPUs that torch sees."""
    if not _seen:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        _seen.append(frozenset(torch.cuda.get_device_capability(i) for i in range(count)))
    return _seen[0]


# As torch.compiler.assume_constant_result does, which imports torch._dynamo: a second and more.
capabilities._dynamo_marked_constant = True


def too_old() -> str | None:
    """Why neither these kernels nor Triton run on a GPU of this machine, for people."""
    old = [c for c in capabilities() if c < OLDEST]
    if not old:
        return None
    found, wanted = (".".join(map(str, c)) for c in (min(old), OLDEST))
    return f"a GPU here has compute capability {found}; Triton and the CUDA kernels need {wanted}"


def covers(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for `archs` ("80", "90a", "120+PTX") runs on a GPU.

    Machine code runs on GPUs of its major capability that are not older, with the suffix "a" on
    that one alone; PTX, which every architecture has unless some say "+PTX", on all newer ones.
    """
    ships = any(arch.endswith(build.cuda.PTX) for arch in archs)
    for arch in archs:
        name = arch.removesuffix(build.cuda.PTX)
        own = divmod(int(name.rstrip("af")), 10)
        if own == capability:
            return True
        has_ptx = arch != name or not ships
        if name.isdigit() and own < capability and (has_ptx or own[0] == capability[0]):
            return True
    return False


def blocker(
    op: str, dtype: torch.dtype | None, rooms: frozenset[str], archs: tuple[str, ...] = ()
) -> str | None:
    """Why none of `rooms` can run `op` on tensors of `dtype`, for people; None where one can.

    `archs`: what they are compiled for; every GPU here must be able to run that.
    """
    if not rooms:
        return "the extension is built without CUDA kernels (PYFAST_CUDA=1 builds them)"
    for capability in sorted(capabilities()):
        if archs and not covers(archs, capability):
            told = f"a GPU here has compute capability {'.'.join(map(str, capability))}"
            return f"{told}; the CUDA kernels are compiled for {', '.join(archs)}"
    if op not in rooms:
        return "no CUDA C++ kernel of it in this version"
    dtypes = DTYPES.get(op, FLOATS)
    if dtype is not None and dtype not in dtypes:
        return f"the CUDA kernels take {', '.join(str(t)[6:] for t in dtypes)}, not {dtype}"
    return None


def register_for_cpu(rooms: frozenset[str]) -> torch.library.Library:
    """Hand CPU tensors to `rooms` until the result is destroyed."""
    library = torch.library.Library("pyfast", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for op in sorted(rooms):
            for name in (op, f"{op}_backward"):
                if hasattr(torch.ops.pyfast, name):
                    library.impl(name, _room(name), "CPU")
    return library


def _room(name: str) -> Callable[..., Any]:
    function = getattr(torch.ops.pyfast, name).default
    return lambda *args: call(function, args)


def call(function: torch._ops.OpOverload, args: tuple) -> Any:
    """Run the CUDA room of an operation, whatever the device of its tensors."""
    return function.redispatch(_KEYS, *args)
