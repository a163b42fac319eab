"""The Triton kernels in torch's dispatcher: the CUDA key always, the CPU key while asked for.

A room is a function of kernels/triton/<op>.py, one for each schema of csrc/bindings.cpp and with
exactly its arguments and results: `<op>_triton`, `<op>_backward_triton`. Its module, and Triton
with it, is imported when it is first called.
"""

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pyfast import build

FILES = {"adamw_step_": "adamw"}  # where the file is not named as the operation
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"adamw_step_": (*FLOATS, torch.float64)}  # where a room takes other dtypes than FLOATS


def kernels_dir() -> Path:
    """The Triton kernels inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "kernels"
    return installed if installed.is_dir() else here.parent / "kernels" / "triton"


# Looked up once: torch.compile traces the questions below, and cannot look into files.
_INSTALLED = importlib.util.find_spec("triton") is not None
_VERSION = f"triton {importlib.metadata.version('triton')}" if _INSTALLED else "none"
_PRESENT = frozenset(path.stem for path in kernels_dir().glob("*.py"))


def blocker(op: str, dtype: torch.dtype | None = None) -> str | None:
    """Why no Triton kernel can run `op` on tensors of `dtype`, for people; None where one can."""
    if not _INSTALLED:
        return "triton is not installed"
    if FILES.get(op, op) not in _PRESENT:
        return f"no Triton kernel of {op} in this version"
    dtypes = DTYPES.get(op, FLOATS)
    if dtype is not None and dtype not in dtypes:
        return f"the Triton kernels take {', '.join(str(t)[6:] for t in dtypes)}, not {dtype}"
    return None


def version() -> str:
    """The version of Triton, for people."""
    return _VERSION


def no_driver(device_type: str) -> str | None:
    """Why Triton cannot launch on tensors of `device_type` here, for people; None where it can."""
    from triton.runtime import driver

    try:
        known = driver.active.get_active_torch_device().type
    except RuntimeError:  # "0 active drivers"
        return "Triton finds no GPU here"
    return None if known == device_type else f"Triton's driver takes {known} tensors"


def schemas() -> list[str]:
    """The schemas of all operations, as csrc/bindings.cpp has them."""
    text = (build.source_dir() / "bindings.cpp").read_text()
    definitions = re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\)", text)
    return ["".join(re.findall(r'"([^"]*)"', d)) for d in definitions]


def define_schemas() -> torch.library.Library:
    """Define what the extension would, where there is no extension. Keep the result alive."""
    library = torch.library.Library("pyfast", "DEF")
    for schema in schemas():
        library.define(schema)
    return library


def register(ops: tuple[str, ...], key: str) -> torch.library.Library:
    """Put the rooms of `ops` under a dispatch key until the result is destroyed."""
    library = torch.library.Library("pyfast", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, room in rooms(ops):
            library.impl(name, room, key)
    return library


def rooms(ops: tuple[str, ...]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """(schema, room) of the operations that Triton has kernels of, forward and backward."""
    for op in ops:
        if blocker(op) is None:
            for name in (op, f"{op}_backward"):
                if hasattr(torch.ops.pyfast, name):
                    yield name, _room(FILES.get(op, op), name)


def _room(file: str, name: str) -> Callable[..., Any]:
    """The room of schema `name`, imported when it is first called, run on its tensors' device."""
    found: list[Callable[..., Any]] = []
    schema = getattr(torch.ops.pyfast, name).default._schema
    tensors = [i for i, a in enumerate(schema.arguments) if isinstance(a.type, torch.TensorType)]

    def room(*args: Any) -> Any:
        if not found:
            found.append(getattr(_module(file), f"{name.rstrip('_')}_triton"))
        for i in tensors:
            if args[i] is None:  # torch.ops takes it for any tensor
                op, argument = name.removesuffix("_backward"), schema.arguments[i].name
                raise TypeError(f"{op}: {argument} must be a tensor; got None")
        device = _device(args)
        if device is None or device == torch.cuda.current_device():
            return found[0](*args)
        with torch.cuda.device(device):  # Triton launches on the current one
            return found[0](*args)

    return room


def _device(args: tuple) -> int | None:
    """The CUDA device of the first tensor on one."""
    for arg in args:
        for value in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(value, torch.Tensor) and value.is_cuda:
                return value.device.index
    return None


def _module(file: str) -> Any:
    """pyfast.kernels.<file>, also in a checkout, where the folder has another name."""
    if "pyfast.kernels" not in sys.modules:
        folder = kernels_dir()
        spec = importlib.util.spec_from_file_location(
            "pyfast.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        package = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules["pyfast.kernels"] = package
        spec.loader.exec_module(package)  # type: ignore[union-attr]
    return importlib.import_module(f"pyfast.kernels.{file}")
