"""Build pyfast: the packages and the extension; everything else is in pyproject.toml.

Where torch and a C++ compiler are at hand (`pip install --no-build-isolation .`) the extension is
compiled now. Elsewhere the wheel is pure Python, and the sources in it are compiled on first use.
PYFAST_BUILD_EXT=1 makes a missing piece an error; PYFAST_BUILD_EXT=0 asks for the pure wheel.
PYFAST_CUDA=1 adds the CUDA kernels, for the architectures of PYFAST_CUDA_ARCH ("80;90a").
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ("*.cpp", "*.h", "*.cu", "*.cuh")
# Folders outside pyfast/ that are installed inside it; without __init__.py: data.
MAPPED = {
    "pyfast.kernels": "kernels/triton",
    "pyfast.kernels.cuda": "kernels/cuda",
    "pyfast.csrc": "csrc",
}


def load_builder():
    """pyfast/build.py by its path: importing pyfast would need torch."""
    spec = importlib.util.spec_from_file_location("pyfast_build", ROOT / "pyfast" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_builder()


class BuildKernels(build_ext):
    """Hand the one extension to pyfast/build.py."""

    def build_extension(self, ext: Extension) -> None:
        in_place = self.inplace or self.editable_mode  # share the objects of python -m pyfast.build
        objects = ROOT / "build" / "objects" if in_place else Path(self.build_temp, "objects")
        try:
            library = Path(self.get_ext_fullpath(ext.name))
            builder.build(library, objects, cuda_part=builder.cuda.part())
        except RuntimeError as error:
            sys.exit(str(error))


def extensions() -> list[Extension]:
    """The extension, or nothing (and the reason on stderr) where it cannot be compiled."""
    wish = os.environ.get("PYFAST_BUILD_EXT", "auto")
    if wish not in {"auto", "0", "1"}:
        sys.exit(f"setup: PYFAST_BUILD_EXT must be auto, 0 or 1; got {wish!r}")
    reason = "PYFAST_BUILD_EXT=0" if wish == "0" else builder.blocker()
    if reason is None:
        return [Extension("pyfast._C", sources=[])]
    if wish == "1":
        sys.exit(f"setup: PYFAST_BUILD_EXT=1 must find all it needs; got: {reason}")
    print(
        f"pyfast: pure Python build ({reason}); the C++ kernels will be compiled on first use. "
        "To compile them now: pip install --no-build-isolation .",
        file=sys.stderr,
    )
    return []


def packages() -> list[str]:
    """Every package in pyfast/, and every mapped folder with its subfolders."""
    names = find_packages(include=["pyfast", "pyfast.*"])
    for name, folder in MAPPED.items():
        below = [p for p in sorted((ROOT / folder).rglob("*")) if p.is_dir()]
        parts = [p.relative_to(ROOT / folder).parts for p in below if p.name != "__pycache__"]
        names += [name, *(".".join((name, *p)) for p in parts)]
    return names


setup(
    packages=packages(),
    package_dir=MAPPED,
    package_data={"": SOURCES},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    zip_safe=False,
)
