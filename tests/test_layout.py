"""The tree keeps its shape: each operation has its rooms, files stay short, imports go downward."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pyfast
from pyfast import backend, reference

ROOT = Path(__file__).resolve().parent.parent
CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}
FILE_STEM = {"adamw_step_": "adamw"}  # where the file is not named as the operation

# GPU rooms by backend; those that do not exist yet stand in PENDING, and their tensors take the
# reference. Strike a backend out when its rooms open.
GPU_ROOMS = {
    "cuda": ("kernels/cuda/{}.cuh", "csrc/cuda/{}.cu", "csrc/cuda/{}.cpp"),
    "triton": ("kernels/triton/{}.py",),
}
PENDING: dict[str, tuple[str, ...]] = {}

# Imports go downward only: a module may import what stands on its own floor or below.
FLOORS = (
    {"build", "build_cuda", "reference", "data"},
    {"cuda_rooms", "extension_module", "triton_rooms", "tuning"},
    {"choosers"},
    {"backend"},
    {"ops"},
    {"pyfast", "testing", "tolerance"},
    {"nn", "optim", "optim_amp", "optim_plan", "recompute"},
    {"models"},
    {"train"},
    {"doctor", "options", "tune", "usage", "verbs", "cli", "__main__"},
)
RANK = {name: rank for rank, floor in enumerate(FLOORS) for name in floor}


def tracked() -> list[str]:
    """Files git knows of, as posix paths relative to the root."""
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("needs git and a checkout")
    command = ["git", "ls-files"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listing.stdout.splitlines() if (ROOT / name).exists()]


def code_files() -> list[Path]:
    return [ROOT / name for name in tracked() if Path(name).suffix in CODE]


def forward_ops() -> list[str]:
    schemas = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/bindings.cpp").read_text())
    return [name for name in schemas if not name.endswith("_backward")]


def stem(op: str) -> str:
    return FILE_STEM.get(op, op)


def test_backend_lists_the_schemas() -> None:
    assert set(backend.OPS) == set(forward_ops())


@pytest.mark.parametrize("op", forward_ops())
def test_op_has_its_cpu_rooms(op: str) -> None:
    rooms = ("csrc/cpu/{}.cpp", "csrc/cpu/metal/{}.cpp", "csrc/cpu/metal/{}.h", "pyfast/ops/{}.py")
    missing = [r for r in (room.format(stem(op)) for room in rooms) if not (ROOT / r).exists()]
    assert not missing
    assert callable(getattr(pyfast, op)) and callable(getattr(reference, op))
    assert op in pyfast.__all__


@pytest.mark.parametrize("gpu_backend", GPU_ROOMS)
@pytest.mark.parametrize("op", forward_ops())
def test_op_has_its_gpu_rooms_or_they_are_pending(op: str, gpu_backend: str) -> None:
    pending = gpu_backend in PENDING.get(stem(op), ())
    for room in GPU_ROOMS[gpu_backend]:
        path = room.format(stem(op))
        assert (ROOT / path).exists() != pending, f"{path} must either exist or be pending"


def test_pending_rooms_belong_to_ops() -> None:
    assert set(PENDING) <= {stem(op) for op in forward_ops()}


def test_no_file_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "common", "helpers", "helper", "base", "core", "misc"}
    assert not [name for name in tracked() if {Path(p).stem for p in Path(name).parts} & empty]


def test_kernels_has_no_init_of_its_own() -> None:
    # a top-level package named kernels would shadow the one of that name on PyPI
    assert not (ROOT / "kernels/__init__.py").exists()


def test_every_package_is_one() -> None:
    # setup.py ships folders with an __init__.py
    folders = {path.parent for path in code_files() if path.suffix == ".py"}
    inside = [f for f in folders if f.is_relative_to(ROOT / "pyfast")]
    assert not [f for f in inside if not (f / "__init__.py").exists()]


def test_files_stay_under_300_lines() -> None:
    sizes = {p: len(p.read_text().splitlines()) for p in code_files()}
    assert not {str(p.relative_to(ROOT)): n for p, n in sizes.items() if n > 300}


def test_functions_stay_short() -> None:
    """About 40 lines, docstring not counted; the limit leaves some air."""
    long = []
    for path in code_files():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body
                lines = (node.end_lineno or 0) - body[0].lineno + 1
                if lines > 45:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines}")
    assert not long


def test_lines_stay_short() -> None:
    limit = {".py": 100}  # as ruff has it; C++ may run to 120 where a signature reads better so
    long = []
    for path in code_files():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > limit.get(path.suffix, 120):
                long.append(f"{path.relative_to(ROOT)}:{number}: {len(line)}")
    assert not long


def _floor(parts: tuple[str, ...]) -> str:
    """pyfast/ops/rope.py -> ops; pyfast/__init__.py -> pyfast."""
    first = Path(parts[1]).stem
    return "pyfast" if first == "__init__" else first


def _imported(tree: ast.AST) -> set[str]:
    """Floors of pyfast that a module imports."""
    floors = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            from_root = node.module == "pyfast"
            names = [f"pyfast.{a.name}" for a in node.names] if from_root else [node.module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "pyfast":
                known = len(parts) > 1 and parts[1] in RANK
                floors.add(parts[1] if known else "pyfast")
    return floors


def test_imports_go_downward() -> None:
    upward = []
    for path in code_files():
        parts = path.relative_to(ROOT).parts
        if parts[0] != "pyfast" or path.suffix != ".py":
            continue
        own = RANK[_floor(parts)]
        for floor in _imported(ast.parse(path.read_text())):
            if RANK[floor] > own:
                upward.append(f"{'/'.join(parts)} imports {floor}")
    assert not upward


def test_metal_knows_no_torch() -> None:
    metal = [p for p in code_files() if "metal" in p.parts]
    assert metal
    assert not [
        p.name for p in metal if re.search(r"#include <(torch|pybind11|c10|ATen)", p.read_text())
    ]


def test_metal_objects_have_no_weak_symbols() -> None:
    """The linker keeps one of several weak definitions; an AVX-512 one would crash older CPUs."""
    plain = {"generic", "room", "cuda"}  # objects that hold no instructions of one processor
    objects = (ROOT / "build/objects").glob("*.*.o")
    objects = [path for path in objects if not plain & {*path.name.split(".")}]
    if not objects:
        pytest.skip("needs the objects of a build in this checkout")
    weak = []
    for path in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        for line in symbols.stdout.splitlines():
            kind = line[17:18]
            # g++'s pointer to its exception handler is data, the same in every object
            if kind and kind in "WVu" and "DW.ref.__gxx_personality_v0" not in line:
                weak.append(f"{path.name}: {line[17:]}")
    assert not weak


def test_no_notes_to_self_in_the_tree() -> None:
    own = Path(__file__).relative_to(ROOT).as_posix()
    words = re.compile(r"/work/|\bTODO\b|\bFIXME\b|\bXXX\b|<<<<<<< |>>>>>>> ")
    found = []
    for name in tracked():
        text = (ROOT / name).read_bytes()
        if name != own and b"\0" not in text and words.search(text.decode(errors="replace")):
            found.append(name)
    assert not found


def readme_tree() -> list[str]:
    """Paths of the README's tree: indented names under folders that end in a slash."""
    block = re.search(r"## The tree\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block, "README.md must have the section 'The tree' with a code block"
    paths, folders = [], []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            paths.append("".join([*folders, name]))
        if paths[-1].endswith("/"):
            folders.append(paths[-1].removeprefix("".join(folders)))
    return paths


def test_readme_example_runs() -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example
    names: dict[str, object] = {}
    exec(compile(example[1], "README.md", "exec"), names)
    assert names["loss"] < 2.3  # ten classes start at log(10) = 2.303


def test_readme_tree_is_the_real_one() -> None:
    listed, files = readme_tree(), tracked()
    real = set(files) | {f"{parent}/" for f in files for parent in Path(f).parents} - {"./"}
    assert not [p for p in listed if p not in real], "in the README, not in the tree"
    opened = {p.rpartition("/")[0] for p in (q.rstrip("/") for q in listed)}  # folders with entries
    expected = {p for p in real if p.rstrip("/").rpartition("/")[0] in opened}
    hidden = {p for p in expected if p.startswith(".")}
    assert not sorted(expected - set(listed) - hidden), "in the tree, not in the README"
