"""The one place that selects a backend: what runs an operation on a device, and why.

The ladder for CPU tensors: the built extension, else one compiled on first use from the shipped
sources, else the plain-torch reference with one warning that says why. For CUDA tensors: the CUDA
C++ kernels where the extension was built with them, else the Triton kernels, else the reference
with one warning. `PYFAST_BACKEND=torch` asks for the reference; `PYFAST_REQUIRE=cpp|cuda|triton`
turns a fallback into an error; `PYFAST_JIT=0` declines compiling; `PYFAST_EXTENSION=FILE` loads
another build; `pyfast doctor` prints the outcome.

The switch is torch's dispatcher: the extension fills its CPU and CUDA keys, and what is registered
on top covers it until it is destroyed: triton_rooms.py under the CUDA key, or choosers.py where
`auto` measures, and under the CPU key "triton" or "cuda" while asked for by name.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from pyfast import choosers, cuda_rooms, extension_module, triton_rooms, tuning

BACKENDS = ("auto", "cpp", "cuda", "triton", "torch")
REQUIRABLE = ("", "cpp", "cuda", "triton")
# Multiply-adds (norm, cross_entropy: elements) up to which torch was quicker in float32 on the CPU,
# backward too, on one thread (linear_act: two): a gradient in Python costs more than such work.
LITTLE_WORK = {
    "linear_act": 2**21,
    "linear_glu": 2**23,  # without gradients an eighth of it
    "linear_cross_entropy": 2**24,
    "attention": 2**18,
    "cross_entropy": 2**15,
    "layer_norm": 2**18,
}
OPS = (
    "linear_act",
    "linear_glu",
    "cross_entropy",
    "linear_cross_entropy",
    "attention",
    "rope",
    "layer_norm",
    "rms_norm",
    "adamw_step_",
)


@dataclass(frozen=True)
class Choice:
    """What runs an operation: a backend ("cpp", "cuda", "triton", "torch"); `why` is for people.

    Calls of at most `little` work take torch's own operators all the same: see LITTLE_WORK.
    """

    backend: str
    why: str
    little: int = -1


_extension, _extension_why = extension_module.load()
_isa = _extension.isa() if _extension is not None else ""  # torch.compile cannot trace the question
_forced = os.environ.get("PYFAST_BACKEND", "auto")
_choices: dict[tuple, Choice] = {}  # (op, device, dtype); emptied when the selection changes
_warned: set[str] = set()  # device types
_deterministic = False
_log = logging.getLogger("pyfast")


def extension() -> object | None:
    """The module pyfast._C (build facts, instruction sets), or None where there is none."""
    return _extension


def has_schemas() -> bool:
    """Whether torch.ops.pyfast has the operations."""
    return _extension is not None or _schemas is not None


def choose(op: str, device_type: str, dtype: torch.dtype | None = None) -> Choice:
    """What runs `op` on tensors of `device_type` ("cpu", "cuda", ...) and `dtype`."""
    choice = _choices.get((op, device_type, dtype))
    if choice is None:
        choice = _choices[op, device_type, dtype] = _decide(op, device_type, dtype)
        if device_type == "cuda" and choice.backend == "triton" and op in _cuda:
            _register("CUDA", "triton", OPS)  # the extension's kernels do not run on this GPU
        _tell(op, device_type, dtype, choice)
    return choice


def uses_reference(
    op: str, device_type: str, dtype: torch.dtype | None = None, work: int = 0
) -> bool:
    """Whether the door of `op` must take the plain-torch reference for this device and dtype, or
    shall, since torch was measured to be quicker with so much work on the GPU.

    It must, too, in torch.func's transforms and in forward mode: kernels know no tangents.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if choose(op, device_type, dtype).backend == "torch":
        return True
    if not work or device_type != "cuda" or torch.compiler.is_compiling() or not measures():
        return False
    return measured.of_a_whole(op, dtype, work) == "torch"


def little_work(op: str) -> int:
    """Up to how much float32 work on the CPU `op` is left to torch; below 0: none is.

    For the first lines of a door: a tenth of a microsecond. None is while kernels are asked for, or
    while torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return -1
    choice = _choices.get((op, "cpu", torch.float32))
    return choose(op, "cpu", torch.float32).little if choice is None else choice.little


def _is_free() -> bool:
    return _forced == "auto" and not _deterministic and not os.environ.get("PYFAST_REQUIRE")


def _little(op: str, dtype: torch.dtype | None) -> int:
    return LITTLE_WORK.get(op, -1) if _is_free() and dtype == torch.float32 else -1


def _decide(op: str, device_type: str, dtype: torch.dtype | None = None) -> Choice:
    if _forced not in BACKENDS:
        raise ValueError(f"backend: name must be one of {', '.join(BACKENDS)}; got {_forced!r}")
    required = os.environ.get("PYFAST_REQUIRE", "")
    if required not in REQUIRABLE:
        known = ", ".join(REQUIRABLE[1:])
        raise ValueError(f"backend: PYFAST_REQUIRE must be one of {known}; got {required!r}")
    if _forced == "torch":
        return Choice("torch", 'asked for: backend "torch"')
    if device_type == "cpu" and _forced not in ("cuda", "triton"):
        if _extension is not None:
            why, little = f"{_extension_why}, {_isa} kernels", _little(op, dtype)
            return Choice("cpp", why + "; torch's for little float32 work" * (little > 0), little)
        why = _extension_why
    elif device_type not in ("cpu", "cuda") or _forced == "cpp":
        why = f"no C++ kernels for {device_type} tensors in this version"
    else:
        why = cuda_rooms.blocker(op, dtype, _cuda, _archs)
        if why is None and not _asks_for_triton():
            built = f"compiled for {', '.join(f'sm_{a}' for a in _archs)}"
            or_else = "; Triton's or torch's where measured to be quicker" * measures()
            return Choice("cuda", built + or_else)
        if "cuda" not in (_forced, required):
            why = _no_schemas or triton_rooms.blocker(op, dtype) or cuda_rooms.too_old()
            if why is None:
                return Choice("triton", triton_rooms.version())
    if _forced in ("cpp", "cuda") or required:
        asking = "PYFAST_REQUIRE" if required else f'backend "{_forced}"'
        raise RuntimeError(
            f"{op}: {asking} must find a kernel for {device_type} tensors; got none: {why}"
        )
    return Choice("torch", why)


def _tell(op: str, device_type: str, dtype: torch.dtype | None, choice: Choice) -> None:
    """A line in the log for every choice; one warning where a device has no kernels at all."""
    if not torch.compiler.is_compiling():
        _log.debug("%s, %s, %s: %s (%s)", op, device_type, dtype, choice.backend, choice.why)
    if choice.backend != "torch" or _forced == "torch" or device_type in _warned:
        return
    if device_type == "cpu" or triton_rooms.blocker(op) or cuda_rooms.too_old():
        _warned.add(device_type)
        message = f"pyfast: {device_type} tensors take the plain-torch reference: {choice.why}"
        warnings.warn(message, stacklevel=5)


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Run every operation on `backend`, one of BACKENDS, in the block.

    "cuda" and "triton" take CPU tensors, too, and refuse them unless something runs them there.
    """
    if backend not in BACKENDS:
        raise ValueError(f"using: backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    before = _forced
    _select(backend)
    try:
        yield
    finally:
        _select(before)


def _asks_for_triton() -> bool:
    return "triton" in (_forced, os.environ.get("PYFAST_REQUIRE"))


def measures(anywhere: bool = False) -> bool:
    """Whether `auto` times the kernels of a GPU and takes the quickest; PYFAST_TUNE=0 declines.

    `anywhere`: were there a GPU; asking for one starts CUDA, after which nobody may fork.
    """
    free = _is_free() and os.environ.get("PYFAST_TUNE") != "0"
    return free and (anywhere or torch.cuda.is_available())


def _select(backend: str) -> None:
    global _forced
    _forced = backend
    _choices.clear()
    if _cuda and measures(anywhere=True) and torch.backends.cuda.is_built():
        _register("CUDA", "measured", OPS)
    else:
        covered = () if _asks_for_triton() else _cuda
        _register("CUDA", "triton", tuple(op for op in OPS if op not in covered))
    _register("CPU", backend, OPS if backend in ("cuda", "triton") else ())


def _register(key: str, backend: str, ops: tuple[str, ...]) -> None:
    """Put the rooms of `ops` under a dispatch key, in the place of those put there before."""
    library, before = _rooms.pop(key, (None, ("", ())))
    if library is not None and before != (backend, ops):
        library._destroy()  # what it covered shows again
        library = None
    if library is None and ops and has_schemas():
        if backend == "cuda":
            library = cuda_rooms.register_for_cpu(_cuda)
        elif backend == "measured":
            library = choosers.for_gpus(key, ops, _cuda, measured, _extension)
        else:
            library = triton_rooms.register(ops, key)
    if library is not None:
        _rooms[key] = library, (backend, ops)


class deterministic:
    """`pyfast.deterministic(True)`: the same bits from run to run, for any number of threads.

    A switch, or a block: `with pyfast.deterministic(True):`. The kernels always add up in an order
    that sizes alone decide; the switch keeps `auto` from choosing by measured time.
    """

    def __init__(self, mode: bool) -> None:
        global _deterministic
        if not isinstance(mode, bool):
            raise TypeError(f"deterministic: mode must be a bool; got {mode!r}")
        self.before, _deterministic = _deterministic, mode
        _select(_forced)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _deterministic
        _deterministic = self.before
        _select(_forced)


def select_isa(name: str) -> None:
    """Use another instruction set of the CPU kernels, for tests and comparisons."""
    global _isa
    if _extension is None or not _extension.select_isa(name):
        known = [] if _extension is None else _extension.supported_isas()
        raise ValueError(f"select_isa: name must be one of {', '.join(known)}; got {name!r}")
    _isa = _extension.isa()
    _choices.clear()


def describe() -> list[tuple[str, str, Choice]]:
    """(op, device, choice) of every operation on every kind of device of this machine."""
    return [(op, device, _describe(op, device)) for op in OPS for device in ("cpu", "cuda")]


def _describe(op: str, device_type: str) -> Choice:
    """The choice, without warning or remembering it."""
    try:
        choice = _decide(op, device_type)
        if choice.backend != "triton" or not (why := triton_rooms.no_driver(device_type)):
            return choice
        return Choice("triton" if device_type == "cuda" else "none", f"{choice.why}; {why}")
    except (RuntimeError, ValueError) as error:
        return Choice("none", str(error))


def _find_schemas() -> tuple[torch.library.Library | None, str | None]:
    """The schemas where no extension brings them, and the reason if they cannot be had."""
    if _extension is not None:
        return None, None
    try:
        return triton_rooms.define_schemas(), None
    except OSError as error:
        return None, f"the schemas of the operations are missing: {error}"


_schemas, _no_schemas = _find_schemas()
_archs = tuple(getattr(_extension, "cuda_archs", ()))
_cuda = cuda_rooms.present(_extension, OPS)  # the operations with CUDA C++ kernels
measured = tuning.Winners(archs=_archs)  # which kernels were the quickest on GPUs
# Over the extension's rooms, by dispatch key: (library, (backend, operations)).
_rooms: dict[str, tuple[torch.library.Library, tuple[str, tuple[str, ...]]]] = {}
_select(_forced)
