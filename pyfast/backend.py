"""The one place that selects a backend: which implementation runs an operation on a device, and why.

The ladder at import: the built extension, else (at first use) one compiled from the shipped sources, else
the plain-torch reference with one warning that says why. `PYFAST_BACKEND=torch` asks for the reference;
`PYFAST_REQUIRE=cpp` turns a fallback into an error; `pyfast doctor` prints the outcome.
"""

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

BACKENDS = ("auto", "cpp", "torch")
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
    """What runs an operation on a device: `backend` is "cpp" or "torch"; `why` is for people."""

    backend: str
    why: str


def _load() -> tuple[object | None, str]:
    """The extension module, or None and the reason."""
    try:
        return importlib.import_module("pyfast._C"), "built extension"
    except ImportError as error:
        return None, f"pyfast._C is not built ({error})"


_extension, _extension_why = _load()
_forced = os.environ.get("PYFAST_BACKEND", "auto")
_choices: dict[str, Choice] = {}  # device type -> choice; emptied when the selection changes


def extension() -> object | None:
    """The module pyfast._C (build facts, instruction sets), or None where it is not available."""
    return _extension


def choose(op: str, device_type: str) -> Choice:
    """What runs `op` on tensors of `device_type` ("cpu", "cuda", ...)."""
    choice = _choices.get(device_type)
    if choice is None:
        choice = _choices[device_type] = _decide(op, device_type)
    return choice


def uses_reference(op: str, device_type: str) -> bool:
    """Whether the door of `op` must take the plain-torch reference for this device."""
    return choose(op, device_type).backend == "torch"


def _decide(op: str, device_type: str) -> Choice:
    if _forced not in BACKENDS:
        raise ValueError(f"backend: name must be one of {', '.join(BACKENDS)}; got {_forced!r}")
    if _forced == "torch":
        return Choice("torch", 'asked for: backend "torch"')
    required = os.environ.get("PYFAST_REQUIRE", "")
    if device_type == "cpu" and _extension is not None:
        return Choice("cpp", f"{_extension_why}, {_extension.isa()} kernels")
    why = _extension_why if device_type == "cpu" else f"no {device_type} kernels in this version"
    if _forced == "cpp" or required:
        raise RuntimeError(
            f"{op}: a kernel must exist for {device_type} tensors, as {'PYFAST_REQUIRE' if required else 'PYFAST_BACKEND'}"
            f" asks; got none: {why}"
        )
    warnings.warn(f"pyfast: {device_type} tensors take the plain-torch reference: {why}", stacklevel=4)
    return Choice("torch", why)


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Run every operation on `backend` ("auto", "cpp", "torch") inside the `with` block."""
    global _forced
    if backend not in BACKENDS:
        raise ValueError(f"using: backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    before, _forced = _forced, backend
    _choices.clear()
    try:
        yield
    finally:
        _forced = before
        _choices.clear()


def select_isa(name: str) -> None:
    """Use another instruction set of the CPU kernels, for tests and comparisons."""
    if _extension is None or not _extension.select_isa(name):
        known = [] if _extension is None else _extension.supported_isas()
        raise ValueError(f"select_isa: name must be one of {', '.join(known)}; got {name!r}")
    _choices.clear()


def describe() -> list[tuple[str, str, Choice]]:
    """(op, device, choice) of every operation on every kind of device of this machine."""
    devices = ["cpu", "cuda"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [(op, device, choose(op, device)) for op in OPS for device in devices]


__all__ = ["Choice", "choose", "describe", "extension", "select_isa", "uses_reference", "using"]
_ = torch  # the extension's symbols resolve against libtorch, which importing torch has loaded
