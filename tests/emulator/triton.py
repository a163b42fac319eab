"""Triton on the emulator: ordinary launches `kernel[grid](...)` on CPU tensors.

    with emulated(capability=90) as log:
        kernel[grid](x, out, n, BLOCK=128)
    log[0].stats.load_sectors

Triton compiles the kernel for the capability asked for, as it would on such a GPU, and keeps it in
its own cache; the PTX runs on the CPU. Whatever calls Triton can be run so, autograd included.
`compiled` only compiles: what it logs tells the registers and the binary of every launch.
"""

import contextlib
import functools
import re
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as active_driver
from triton.runtime.cache import get_cache_manager
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.emulator import Module, Stats
from tests.emulator.module import SHARED_LIMIT
from tests.emulator.tensormap import descriptor_arguments
from tests.emulator.torch_memory import unwritten, watched_memory


@dataclass(frozen=True)
class Binary:
    """What Triton made of a kernel for one capability and one set of constants."""

    name: str
    capability: int
    num_warps: int
    shared: int  # bytes
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)

    @functools.cached_property
    def module(self) -> Module:
        """The parsed PTX."""
        return Module(self.ptx)

    def resources(self) -> dict[str, int]:
        """REG, STACK and LOCAL of a thread and SHARED of a block, as cuobjdump tells them."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            command = [tool, "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}


@dataclass(frozen=True)
class Launch:
    """One launch: what ran, how large, and what it counted (None where it was only compiled)."""

    binary: Binary
    grid: tuple[int, int, int]
    stats: Stats | None

    @property
    def name(self) -> str:
        """The name of the kernel."""
        return self.binary.name


@dataclass
class _Session:
    """One `with emulated(...)`: what Triton's driver and its launchers ask for."""

    capability: int
    processors: int
    runs: bool
    options: dict[str, Any]
    log: list[Launch] = field(default_factory=list)
    asked: dict[int, weakref.ref] = field(default_factory=dict)  # tensors by address, as asked for
    blank: dict[int, weakref.ref] = field(default_factory=dict)  # allocated and not yet written


_sessions: list[_Session] = []


@contextlib.contextmanager
def emulated(
    capability: int = 80,
    order: str = "greedy",
    seed: int = 0,
    perturb: bool = False,
    processors: int = 4,
    cache_bytes: int = 0,
) -> Iterator[list[Launch]]:
    """Run Triton's launches in this block on the emulator; the log of them.

    A race, an access out of bounds, a read of what nothing has written and so on raise where they
    happen. `order` and `seed` choose the schedule, `perturb` shifts approximate results, and
    `processors` is what kernels see that ask how many there are. `cache_bytes` is the capacity of
    the model behind `dram_read` and `dram_written`; 0 evicts nothing.
    """
    options = {"order": order, "seed": seed, "perturb": perturb, "l2_bytes": cache_bytes}
    session = _Session(capability, processors, True, options)
    with _session(session) as log, watched_memory(session):
        yield log


@contextlib.contextmanager
def compiled(capability: int, processors: int = 132) -> Iterator[list[Launch]]:
    """Compile what is launched in this block, and run none of it."""
    with _session(_Session(capability, processors, False, {})) as log:
        yield log


@contextlib.contextmanager
def _session(session: _Session) -> Iterator[list[Launch]]:
    before = vars(active_driver).get("_active")
    _sessions.append(session)
    active_driver.set_active(_Driver(session))
    try:
        yield session.log
    finally:
        _sessions.pop()
        active_driver.set_active(before)


class _Driver:
    """What Triton asks a driver, answered for the GPU that the session stands for."""

    def __init__(self, session: _Session) -> None:
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (name, name, 0, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {
                "max_shared_mem": SHARED_LIMIT[session.capability],
                "multiprocessor_count": session.processors,
                "max_num_regs": 65536,
                "warpSize": 32,
            },
        )
        self._session = session

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return self._session.capability  # compiled kernels are kept by device

    def set_current_device(self, _: int) -> None:
        pass

    def get_current_stream(self, _: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._session.capability, 32)

    def get_device_capability(self, *_: int) -> tuple[int, int]:
        return divmod(self._session.capability, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """Of an autotuner the first configuration wins."""
        return lambda call, quantiles=None, **_: (call(), [1.0] * len(quantiles or [0]))[1]


class _Launcher:
    """What Triton calls to launch one compiled kernel, whatever the session."""

    def __init__(self, src: Any, metadata: Any) -> None:
        cache, stem = get_cache_manager(metadata.hash), src.name[:150]
        files = [Path(cache.get_file(f"{stem}.{kind}")) for kind in ("ptx", "cubin")]
        target = metadata.target.arch
        ptx, cubin = files[0].read_text(), files[1].read_bytes()
        self.binary = Binary(metadata.name, target, metadata.num_warps, metadata.shared, ptx, cubin)
        self.metadata = metadata
        self.parameters = list(src.signature.items())

    def __call__(
        self, x: int, y: int, z: int, stream: Any, function: Any, packed: Any, launch_metadata: Any,
        enter: Any, leave: Any, *args: Any,
    ) -> None:  # fmt: skip
        session, grid = _sessions[-1], (x, y, z)
        stats = None
        if session.runs and min(grid) > 0:
            stats = self._run(session, grid, args)
        session.log.append(Launch(self.binary, grid, stats))

    def _run(self, session: _Session, grid: tuple[int, int, int], given: tuple) -> Stats:
        names, args, described = [], [], []
        facts = iter(self.metadata.tensordesc_meta or ())
        for (name, kind), value in zip(self.parameters, given, strict=True):
            if isinstance(value, TensorDescriptor):
                described.append(value.base)
                value = tuple(descriptor_arguments(value, next(facts, None)))
            for item in _flat(value) if kind != "constexpr" else ():
                names.append(name)
                args.append(item)
        scratch = grid[0] * grid[1] * grid[2] * self.metadata.global_scratch_size
        names += ["scratch", "profile"]
        args += [_scratch(scratch, self.metadata.global_scratch_align), 0]
        tensors = [a for a in args if isinstance(a, Tensor)]
        blank = [t for t in tensors if unwritten(session.blank.pop(t.data_ptr(), None), t)]
        return self.binary.module.launch(
            self.binary.name,
            grid,
            (32 * self.binary.num_warps, 1, 1),
            args,
            names=names,
            shared_bytes=self.binary.shared,
            uninitialised=blank,
            reachable=[*described, *_pointed_to(session, tensors)],
            **session.options,
        )


def _flat(value: Any) -> Iterator[Any]:
    """The arguments a kernel sees of one of Python's."""
    if isinstance(value, tuple):
        for item in value:
            yield from _flat(item)
    elif value is not None:
        yield value


def _scratch(size: int, align: int) -> Tensor | int:
    """Memory that Triton's own code asks for, where it does."""
    if not size:
        return 0
    memory = torch.zeros(size + align, dtype=torch.uint8)
    return memory[-memory.data_ptr() % align :][:size]


def _pointed_to(session: _Session, tensors: list[Tensor]) -> list[Tensor]:
    """Tensors whose address stands in an int64 tensor: a table of pointers."""
    found = {}
    for table in tensors:
        if table.dtype == torch.int64:
            for address in table.flatten().tolist():
                t = session.asked.get(address, lambda: None)()
                if t is not None:
                    found[address] = t
    return list(found.values())
