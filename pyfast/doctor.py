"""`pyfast doctor`: what is installed here, and which backend runs each operation, and why."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import pyfast
from pyfast import backend, build, extension_module

# The features that decide which kernels can run, in the words of /proc/cpuinfo.
_CPU_FLAGS = re.compile(
    r"sse4_2|avx|avx2|fma|f16c|avx512(f|bw|dq|vl|_bf16|_fp16)|amx_\w+|asimd|sve"
)
_PACKAGES = (
    "numpy",
    "triton",
    "tokenizers",
    "safetensors",
    "jsonargparse",
    "tqdm",
    "matplotlib",
    "scikit-learn",
    "transformers",
)


def examine() -> dict[str, Any]:
    """The facts as JSON values; `problems` is empty on a healthy installation."""
    facts = {
        "versions": _versions(),
        "cpu": _cpu(),
        "extension": _extension(),
        "gpu": _gpu(),
        "directories": _directories(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("PYFAST_")},
        "operations": [
            {
                "operation": op,
                "device": device,
                "backend": choice.backend,
                "why": _once(op, choice.why),
            }
            for op, device, choice in backend.describe()
        ],
    }
    facts["problems"] = _problems(facts)
    return facts


def _once(op: str, why: str) -> str:
    """An error names its operation; without it, one reason serves all of them."""
    return why.removeprefix(f"{op}: ")


def main(as_json: bool = False) -> int:
    """Print the facts; 0 if all is well, 1 if something needs the user's attention."""
    facts = examine()
    print(json.dumps(facts, indent=2) if as_json else _text(facts))
    return 1 if facts["problems"] else 0


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "pyfast": pyfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpu() -> dict[str, Any]:
    name, flags = platform.processor(), []
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            map(str.strip, line.split(":", 1))
            for line in info.read_text().split("\n\n")[0].splitlines()
            if ":" in line
        )
        name = fields.get("model name", name)
        flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "name": name or platform.machine(),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [flag for flag in flags if _CPU_FLAGS.fullmatch(flag)],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _extension() -> dict[str, Any]:
    module = backend.extension()
    if module is None:
        return {"built": False}
    return {
        "built": True,
        "file": module.__file__,
        "compiler": module.compiler,
        "isas_compiled": build.isas(),
        "isas_usable": list(module.supported_isas()),
        "isa": module.isa(),
        "cuda_archs": list(module.cuda_archs),
        "nvcc": module.nvcc,
        "stale": build.source_dir().is_dir() and extension_module.is_stale(module),
    }


def _gpu() -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "torch_cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(count)],
        "triton": importlib.util.find_spec("triton") is not None,
        "measures": backend.measures(),
        "measured": len(backend.measured.known),
    }


def _directories() -> dict[str, str]:
    return {"package": str(Path(pyfast.__file__).parent), "cache": str(build.cache_dir())}


def _problems(facts: dict[str, Any]) -> list[str]:
    """What the user should know. The reference is no problem where it was asked for, nor for CUDA
    tensors on a machine that has none."""
    found = []
    if facts["extension"].get("stale"):
        found.append("the extension is stale: rebuild with: python -m pyfast.build")
    asked = facts["environment"].get("PYFAST_BACKEND") == "torch"
    kernels = {"cpu": "C++"} | ({"cuda": "Triton"} if facts["gpu"]["devices"] else {})
    reasons = {
        (row["device"], row["why"]): None
        for row in facts["operations"]
        if row["device"] in kernels and row["backend"] in ("torch", "none") and not asked
    }
    words = "{} tensors do not take the {} kernels: {}"
    return found + [words.format(device.upper(), kernels[device], why) for device, why in reasons]


def _text(facts: dict[str, Any]) -> str:
    extension, cpu, gpu = facts["extension"], facts["cpu"], facts["gpu"]
    versions = facts["versions"]
    absent = [name for name, version in versions.items() if version is None]
    lines = ["Versions"]
    lines += [f"  {name:<14}{version}" for name, version in versions.items() if version]
    lines += [f"  not installed: {', '.join(absent)}"] if absent else []
    lines += [
        "",
        "CPU",
        f"  {cpu['name']}, {cpu['logical_cpus']} logical CPUs, {cpu['threads']} threads in use",
        f"  features      {' '.join(cpu['features']) or 'unknown'}",
    ]
    if extension["built"]:
        lines += [
            f"  kernels       compiled for {', '.join(extension['isas_compiled'])}; "
            f"this CPU runs {', '.join(extension['isas_usable'])}; in use: {extension['isa']}",
            f"  compiler      {extension['compiler']}",
            f"  extension     {extension['file']}",
            f"  CUDA kernels  {_cuda_kernels(extension)}",
        ]
    else:
        lines.append("  kernels       the extension is not built")
    torch_cuda = gpu["torch_cuda"] or "none: a CPU-only torch"
    lines += [
        "",
        "GPU",
        f"  devices       {', '.join(gpu['devices']) or 'none'}",
        f"  torch's CUDA  {torch_cuda}",
        f"  triton        {'installed' if gpu['triton'] else 'not installed'}",
        f"  measured      {gpu['measured']} calls; {'on' if gpu['measures'] else 'off'} in `auto`",
        "",
        "Directories",
    ]
    lines += [f"  {name:<14}{path}" for name, path in facts["directories"].items()]
    if facts["environment"]:
        lines += ["", "Environment"]
        lines += [f"  {name}={value}" for name, value in facts["environment"].items()]
    lines += ["", "Operations", *_table(facts["operations"])]
    lines += ["", *(f"Problem: {problem}" for problem in facts["problems"])]
    return "\n".join(lines if facts["problems"] else [*lines, "Everything is in order."])


def _cuda_kernels(extension: dict[str, Any]) -> str:
    if not extension["cuda_archs"]:
        return "not built (PYFAST_CUDA=1 builds them, with nvcc)"
    archs = ", ".join(f"sm_{arch}" for arch in extension["cuda_archs"])
    return f"for {archs}, by nvcc {extension['nvcc']}"


def _table(operations: list[dict[str, str]]) -> list[str]:
    """One row per operation, one column per device, and below it each reason once."""
    devices = list(dict.fromkeys(row["device"] for row in operations))
    chosen = {(row["operation"], row["device"]): row["backend"] for row in operations}
    lines = ["  " + "".join(f"{word:<22}" for word in ("", *devices)).rstrip()]
    for op in dict.fromkeys(row["operation"] for row in operations):
        cells = [op, *(chosen.get((op, device), "none") for device in devices)]
        lines.append("  " + "".join(f"{cell:<22}" for cell in cells).rstrip())
    reasons = {(row["device"], row["backend"], row["why"]): None for row in operations}
    lines += [f"  {device}, {name}: {why}" for device, name, why in reasons]
    return lines
