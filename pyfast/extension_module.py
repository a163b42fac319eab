"""Loading the C++ extension: the built one, else one compiled on first use from the sources."""

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401 - the extension's symbols resolve against libtorch, which this loads

from pyfast import build


def load() -> tuple[ModuleType | None, str]:
    """The extension module and where it comes from, or None and the reason."""
    if "pyfast.build" in sys.orig_argv:  # python -m pyfast.build imports this package on its way
        # and would warn that the package has imported build.py: run twice, it does no harm
        warnings.filterwarnings("ignore", "'pyfast.build' found in sys.modules", RuntimeWarning)
        return None, "it is being built"
    try:
        if other := os.environ.get("PYFAST_EXTENSION"):
            module, why = _load_file(Path(other)), f"PYFAST_EXTENSION={other}"
        else:
            module, why = importlib.import_module("pyfast._C"), "built extension"
    except ModuleNotFoundError:
        return _load_on_first_use()
    except ImportError as error:
        return None, f"pyfast._C does not load: {error}"
    if is_stale(module):
        stale = "stale: rebuild with `python -m pyfast.build`"
        warnings.warn(f"pyfast: the C++ extension is {stale}", stacklevel=2)
        why = f"{why} ({stale})"
    _check_isa(module)
    return module, why


def is_stale(module: ModuleType) -> bool:
    """Whether the sources are no longer those that the extension was built from."""
    archs = tuple(getattr(module, "cuda_archs", ()))  # an old one may not tell
    return module.source_hash != build.source_hash(archs)


def _check_isa(module: ModuleType) -> None:
    """Say so if PYFAST_CPU_ISA asks for what this processor cannot do; the extension ignores it."""
    wish, known = os.environ.get("PYFAST_CPU_ISA"), module.supported_isas()
    if wish and wish not in known:
        told = f"must be one of {', '.join(known)} on this processor; got {wish!r}"
        warnings.warn(f"PYFAST_CPU_ISA {told}; using {module.isa()}", stacklevel=3)


def _load_on_first_use() -> tuple[ModuleType | None, str]:
    """The extension compiled from the sources in this installation, or None and the reason."""
    declined = [s for s in ("PYFAST_JIT=0", "PYFAST_BACKEND=torch") if _is_set(s)]
    if reason := declined[0] if declined else build.blocker():
        return None, f"pyfast._C is not built ({reason})"
    try:
        return _load_file(build.compile_on_first_use()), "compiled on first use"
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"pyfast._C could not be compiled on first use ({error})"


def _load_file(path: Path) -> ModuleType:
    """The extension from any file, as pyfast._C."""
    spec = importlib.util.spec_from_file_location("pyfast._C", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["pyfast._C"] = module
    return module


def _is_set(setting: str) -> bool:
    name, value = setting.split("=")
    return os.environ.get(name) == value
