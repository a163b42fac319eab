"""CUDA C++ on the emulator: our own launchers, called through torch.ops on CPU tensors.

    with emulated(capability=90) as log, pyfast.using("cuda"):
        pyfast.layer_norm(x, (768,), weight, bias).sum().backward()
    log[0].stats.load_sectors

The extension is the one nvcc built, but for the CUDA runtime, whose place runtime/ takes. While a
room of it runs, CPU tensors look like CUDA tensors; what it launches runs here as PTX. A kernel may
touch the tensors whose address the room has asked for, each within its own extent.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pyfast import cuda_rooms
from tests.emulator import Module, Stats, Violation, nvcc
from tests.emulator.fatbin import best_image, ptx_images
from tests.emulator.module import SHARED_LIMIT
from tests.emulator.stand_in import LAUNCH, MEMORY, THREADS, Request, missing, stand_in

ROOT = Path(__file__).resolve().parents[2]
FAILURE = 719  # cudaErrorLaunchFailure
NO_IMAGE = 209  # cudaErrorNoKernelImageForDevice


@dataclass(frozen=True)
class Binary:
    """What was launched: the kernel's own name, its mangled one, and the capability it ran for."""

    name: str
    mangled: str
    capability: int


@dataclass(frozen=True)
class Launch:
    """One launch: what ran, how large, and what it counted."""

    binary: Binary
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stats: Stats

    @property
    def name(self) -> str:
        """The name of the kernel, without namespaces and template arguments."""
        return self.binary.name


@dataclass
class _Session:
    """One `with emulated(...)`."""

    capability: int
    options: dict[str, Any]
    mutant: tuple[str, int] | None
    on_host: str
    log: list[Launch] = field(default_factory=list)
    memory: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # of the room that runs
    blank: dict[int, Tensor] = field(default_factory=dict)  # of these, not yet written
    failure: BaseException | None = None
    mutated: bool = False  # whether a launch took the mutant

    def finish(self) -> None:
        """Raise ValueError if a mutant was asked for and nothing of it has run."""
        if self.mutant and not self.mutated:
            ran = sorted({launch.name for launch in self.log})
            raise ValueError(f"emulated: mutant must be of what runs; got {self.mutant}, ran {ran}")

    def remember(self, told: Any) -> None:
        """A tensor whose address the room has asked for, or that it has allocated."""
        m = told.contents
        raw = (ctypes.c_char * m.bytes).from_address(m.address)
        dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[m.element]
        tensor = self.memory.setdefault((m.address, m.bytes), torch.frombuffer(raw, dtype=dtype))
        if m.blank:
            self.blank[m.address] = tensor

    def launch(self, told: Any) -> int:
        """Run what the room launches; an error is raised when the room has returned."""
        try:
            return self._run(told.contents)
        except BaseException as error:
            self.failure = error
            return FAILURE

    def _run(self, request: Request) -> int:
        name = request.kernel.decode()
        if request.broken:
            raise Violation(f"{_plain(name)}: {request.broken.decode()}")
        module = _module(request.fatbin, self.capability, self.mutant)
        if module is None:
            return NO_IMAGE
        self.mutated |= module is not _module(request.fatbin, self.capability, None)
        kernel = module.kernels[name]
        args = [ctypes.string_at(request.args[i], n) for i, (_, n) in enumerate(kernel.params)]
        blank = [
            t
            for t in self.blank.values()
            if bool((t == -1 if t.dtype != torch.uint8 else t == 255).all())
        ]
        self.blank.clear()
        stats = module.launch(
            name,
            tuple(request.grid),
            tuple(request.block),
            args,
            shared_bytes=request.shared_bytes,
            cluster=tuple(request.cluster) if request.cluster[0] else None,
            reachable=self.memory.values(),
            uninitialised=blank,
            **self.options,
        )
        binary = Binary(_plain(name), name, self.capability)
        sizes = tuple(request.grid), tuple(request.block), request.shared_bytes
        self.log.append(Launch(binary, *sizes, stats))
        return 0

    def threads(self, fatbin: int, kernel: bytes) -> int:
        """The most threads of a block of the kernel; 0 where no code is for this GPU."""
        module = _module(fatbin, self.capability, None)
        return module.most_threads.get(kernel.decode(), 1024) if module else 0

    def call(self, function: torch._ops.OpOverload, args: tuple, run: Any) -> Any:
        """A room, from its first check to its last launch."""
        state = stand_in()
        self.memory.clear()
        self.blank.clear()
        self.failure = None
        names = [argument.name for argument in function._schema.arguments]
        host = args[names.index(self.on_host)] if self.on_host in names else None
        host = host[0] if isinstance(host, list) and host else host
        state.host = host.data_ptr() if isinstance(host, Tensor) else 0
        state.in_room = 1
        try:
            return run(function, args)
        except RuntimeError:
            if self.failure is not None:
                raise self.failure from None
            raise
        finally:
            state.in_room = 0
            leaked, state.guards = state.guards, 0
            assert not leaked, f"{function}: a device guard outlives the room"


@contextlib.contextmanager
def emulated(
    capability: int = 80,
    order: str = "greedy",
    seed: int = 0,
    perturb: bool = False,
    processors: int = 4,
    cache_bytes: int = 0,
    mutant: tuple[str, int] | None = None,
    on_host: str = "hyper",
) -> Iterator[list[Launch]]:
    """Run the launches of CUDA rooms in this block on the emulator; the log of them.

    A race, an access out of bounds, a read of what nothing has written and so on raise out of the
    operation. `order` and `seed` choose the schedule, `perturb` shifts approximate results,
    `processors` is what launchers see, and `cache_bytes` is the capacity of the model behind
    `dram_read` and `dram_written`; 0 evicts nothing. `mutant` (file, n) takes the kernels of
    csrc/cuda/<file>.cu as compiled with -DPYFAST_MUTANT=n. The argument named `on_host` (of a list,
    the first) stays on the CPU; without a name adamw_step_ finds its numbers on the GPU.

    Raises:
        ValueError: there is no such mutant, or none of its kernels was launched.
    """
    expect_mutant(mutant)
    state = stand_in()
    if state is None:
        raise RuntimeError(f"emulated: the extension must run on the emulator; it {missing()}")
    options = {"order": order, "seed": seed, "perturb": perturb, "l2_bytes": cache_bytes}
    session = _Session(capability, options, mutant, on_host)
    hooks = LAUNCH(session.launch), MEMORY(session.remember), THREADS(session.threads)
    before = state.launch, state.memory, state.threads
    facts_before = state.capability, state.processors, state.shared_limit
    run = cuda_rooms.call

    def call(function: torch._ops.OpOverload, args: tuple) -> Any:
        return session.call(function, args, run)

    facts = capability, processors, SHARED_LIMIT[capability]
    state.launch, state.memory, state.threads = hooks
    state.capability, state.processors, state.shared_limit = facts
    try:
        with mock.patch.object(cuda_rooms, "call", call):
            yield session.log
        session.finish()
    finally:
        state.launch, state.memory, state.threads = before
        state.capability, state.processors, state.shared_limit = facts_before


def expect_mutant(mutant: tuple[str, int] | None) -> None:
    """Raise ValueError unless there are the file and, in some header, the defect."""
    if mutant is None:
        return
    file, number = mutant
    if not (ROOT / "csrc" / "cuda" / f"{file}.cu").exists():
        raise ValueError(f"emulated: mutant must name a file of csrc/cuda; got {file!r}")
    planted = f"mutant({number})"
    if not any(planted in h.read_text() for h in (ROOT / "kernels" / "cuda").glob("*.cuh")):
        raise ValueError(f"emulated: mutant must be a number planted in kernels/cuda; got {number}")


def _module(fatbin: int, capability: int, mutant: tuple[str, int] | None) -> Module | None:
    """What the GPU would take of an image, or the mutant in its place if it is of that file."""
    own = _image(fatbin, capability)
    if own is None or mutant is None:
        return own
    other = _mutant(*mutant, own.arch_name)
    return other if own.kernels.keys() == other.kernels.keys() else own


@functools.cache
def _image(fatbin: int, capability: int) -> Module | None:
    text = best_image(ptx_images(fatbin), capability)
    return _named(text) if text else None


@functools.cache
def _mutant(file: str, number: int, arch: str) -> Module:
    flags = [f"-DPYFAST_MUTANT={number}", "--expt-relaxed-constexpr", "-std=c++20"]
    return _named(nvcc.compile_ptx(ROOT / "csrc" / "cuda" / f"{file}.cu", arch, flags))


def _named(text: str) -> Module:
    module = Module(text)
    module.arch_name = re.search(r"^\.target\s+(\w+)", text, re.M)[1]
    bounds = re.findall(r"\.entry\s+(\w+)\([^)]*\)\s*\.maxntid\s+(\d+)", text)
    module.most_threads = {name: int(threads) for name, threads in bounds}
    return module


@functools.cache
def _plain(mangled: str) -> str:
    """norm_kernel of _ZN6pyfast11norm_kernelI...: the last name before the arguments."""
    names, rest = [], mangled.removeprefix("_ZN").removeprefix("_Z")
    while found := re.match(r"(\d+)", rest):
        begin, size = found.end(), int(found[1])
        names.append(rest[begin : begin + size])
        rest = rest[begin + size :]
    return names[-1] if names else mangled
