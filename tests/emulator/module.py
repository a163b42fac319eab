"""PTX modules that run on CPU tensors."""

from __future__ import annotations

import ctypes
import dataclasses
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import library
from .guarded import extent, guarded
from .stats import Stats

ORDERS = {"fixed": 0, "random": 1, "greedy": 2}
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
BUDGET = 400_000_000


class Violation(AssertionError):
    """A kernel broke a rule of the machine; the message names kernel, line, thread and address."""


class Unsupported(RuntimeError):
    """The PTX holds what the emulator does not model."""


@dataclasses.dataclass
class Kernel:
    """The signature of an entry: byte offset and size of each parameter, and launch bounds."""

    name: str
    params: list[tuple[int, int]]
    threads: int  # .reqntid, or 0
    cluster: tuple[int, int, int]


def _three(value: int | Sequence[int]) -> tuple[int, int, int]:
    values = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    return (*values, 1, 1)[:3]


class Module:
    """Kernels of one PTX text.

    Args:
        ptx: the text, or the path of a file that holds it.
        arch: compute capability as a number, 80 or 90; by default what `.target` says.

    Raises:
        Unsupported: the text cannot be parsed.
    """

    def __init__(self, ptx: str | Path, arch: int | None = None) -> None:
        text = Path(ptx).read_text() if isinstance(ptx, Path) or "\n" not in ptx else ptx
        self._engine = library.load()
        message = ctypes.c_char_p()
        self._handle = self._engine.emulator_load(text.encode(), ctypes.byref(message))
        if not self._handle:
            raise Unsupported((message.value or b"").decode())
        weakref.finalize(self, self._engine.emulator_free, self._handle)
        lines = self._engine.emulator_describe(self._handle).decode().splitlines()
        self.arch = arch or int(lines[0])
        # Triton 3 fences no mbarrier that it has initialised, on hardware to no harm
        self._strict = "LLVM NVPTX" not in text[:300]
        self.kernels = {kernel.name: kernel for kernel in map(self._kernel, lines[1:])}

    @staticmethod
    def _kernel(line: str) -> Kernel:
        name, threads, x, y, z, *params = line.split()
        pairs = [tuple(map(int, param.split(":"))) for param in params]
        return Kernel(name, pairs, int(threads), (int(x), int(y), int(z)))

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        *,
        shared_bytes: int = 0,
        order: str = "fixed",
        seed: int = 0,
        perturb: bool = False,
        check: bool = True,
        budget: int = BUDGET,
        cluster: int | Sequence[int] | None = None,
        l2_bytes: int = 0,
        names: Sequence[str] | None = None,
        reachable: Iterable[torch.Tensor] = (),
        uninitialised: Iterable[torch.Tensor] = (),
    ) -> Stats:
        """Run a kernel to its end; tensors change in place.

        Args:
            kernel: name of the entry.
            grid, block: up to three sizes.
            args: CPU tensors, ints, floats, bools, or bytes for a struct, in the order of the
                parameters; missing ones at the end are zero. A tensor may be touched between its
                first and its last element; a plain int is no pointer to anything.
            shared_bytes: dynamic shared memory.
            order: "fixed", "random" or "greedy" (each warp as far as it can go), of `seed`.
            perturb: move .approx results by up to 2 ulp, cut off sums of tensor cores.
            check: look for races and uninitialised reads; bounds are always checked.
            budget: most warp instructions.
            cluster: blocks of a cluster; by default what the kernel says.
            l2_bytes: capacity of the L2 model; 0: nothing is ever evicted.
            names: names of `args` for messages, by default arg0, arg1, ...
            reachable: tensors the kernel reaches through pointers stored elsewhere.
            uninitialised: tensors among those above whose content must not be read before the
                kernel has written it.

        Raises:
            Violation: the kernel broke a rule.
            Unsupported: it holds what is not modelled.
            ValueError: the launch is impossible.
        """
        entry = self.kernels.get(kernel)
        if entry is None:
            raise ValueError(f"launch: kernel must be one of {sorted(self.kernels)}; got {kernel}")
        names = [f"arg{i}" for i in range(len(args))] if names is None else list(names)
        reached = list(reachable)
        launch = library.Launch(
            grid=_three(grid),
            block=_three(block),
            cluster=self._cluster(entry, cluster),
            order=ORDERS[order],
            seed=seed,
            perturb=perturb,
            check=check and 1 + self._strict,
            dynamic_shared=shared_bytes,
            budget=budget,
            l2_bytes=l2_bytes,
        )
        self._check_sizes(entry, launch)
        with guarded(args, reached) as copies:

            def moved(value: Any) -> Any:
                tensor = isinstance(value, torch.Tensor)
                return copies.get(value.data_ptr(), value) if tensor else value

            args = [moved(a) for a in args]
            named = zip(names, args, strict=True)
            tensors = [(name, a) for name, a in named if isinstance(a, torch.Tensor)]
            tensors += [(f"reachable{i}", tensor) for i, tensor in enumerate(reached)]
            params = self._params(entry, args)
            launch.params, launch.param_bytes = params, len(params)
            maps = [(moved(tensor), bytearray(extent(tensor))) for tensor in uninitialised]
            table, _keep = self._table(tensors, maps)
            launch.tensors, launch.tensor_count = table, len(table)
            return self._run(kernel, launch)

    def _run(self, kernel: str, launch: library.Launch) -> Stats:
        counters = [field.name for field in dataclasses.fields(Stats) if field.type == "int"][:-1]
        values = (ctypes.c_uint64 * len(counters))()
        message = ctypes.c_char_p()
        result = self._engine.emulator_launch(
            self._handle, kernel.encode(), ctypes.byref(launch), values, ctypes.byref(message)
        )
        if result:
            raise (Violation if result == 1 else Unsupported)((message.value or b"").decode())
        return Stats(**dict(zip(counters, values, strict=True)), launches=1, kernel=kernel)

    @staticmethod
    def _cluster(entry: Kernel, cluster: int | Sequence[int] | None) -> tuple[int, int, int]:
        if cluster is not None:
            return _three(cluster)
        return entry.cluster if entry.cluster[0] else (1, 1, 1)

    def _check_sizes(self, entry: Kernel, launch: library.Launch) -> None:
        x, y, z = launch.grid
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        if not (0 < x < 2**31 and 0 < y < 65536 and 0 < z < 65536):
            raise ValueError(f"launch: grid must be within the limits of CUDA; got {[x, y, z]}")
        if not 0 < threads <= 1024:
            raise ValueError(f"launch: block must have 1 to 1024 threads; got {threads}")
        if entry.threads and entry.threads != threads:
            raise ValueError(f"launch: block must have {entry.threads} threads; got {threads}")
        if any(size % part for size, part in zip(launch.grid, launch.cluster, strict=True)):
            raise ValueError("launch: grid must be a multiple of the cluster")
        limit = SHARED_LIMIT.get(self.arch, 101376)
        if launch.dynamic_shared > limit:
            got = launch.dynamic_shared
            raise ValueError(f"launch: shared_bytes must be at most {limit}; got {got}")

    @staticmethod
    def _params(entry: Kernel, args: Sequence[Any]) -> bytes:
        if len(args) > len(entry.params):
            wanted, got = len(entry.params), len(args)
            raise ValueError(f"launch: args must be at most {wanted} for {entry.name}; got {got}")
        buffer = bytearray(sum(entry.params[-1]) if entry.params else 0)
        for value, (offset, size) in zip(args, entry.params, strict=False):
            buffer[offset : offset + size] = _param_bytes(value, size)
        return bytes(buffer)

    @staticmethod
    def _table(
        tensors: list[tuple[str, torch.Tensor]], maps: list[tuple[torch.Tensor, bytearray]]
    ) -> tuple[ctypes.Array[library.Tensor], list[Any]]:
        table = (library.Tensor * len(tensors))()
        keep: list[Any] = []
        for row, (name, tensor) in zip(table, tensors, strict=True):
            if tensor.device.type != "cpu":
                raise ValueError(f"launch: {name} must be on the CPU; got {tensor.device}")
            row.name, row.address = name.encode(), tensor.data_ptr()
            row.bytes, row.element = extent(tensor), tensor.element_size()
            for other, initialised in maps:
                if other.data_ptr() == tensor.data_ptr() and initialised:
                    view = (ctypes.c_char * len(initialised)).from_buffer(initialised)
                    row.initialised = ctypes.addressof(view)
                    keep.append(view)
        return table, keep

    def profile(self, kernel: str) -> list[tuple[str, int]]:
        """Warp instructions by source line of the last launch, most first."""
        text = self._engine.emulator_profile(self._handle, kernel.encode()).decode()
        rows = [line.rsplit("\t", 1) for line in text.splitlines()[1:]]  # code may hold tabs
        return sorted(((line, int(times)) for line, times in rows), key=lambda row: -row[1])


def _param_bytes(value: Any, size: int) -> bytes:
    """One argument as the `size` bytes of its parameter."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr().to_bytes(8, "little")
    if isinstance(value, (bytes, bytearray)):
        if len(value) != size:
            raise ValueError(f"launch: a struct must have {size} bytes; got {len(value)}")
        return bytes(value)
    if isinstance(value, float):
        kinds = {2: torch.float16, 4: torch.float32, 8: torch.float64}
        return torch.tensor([value], dtype=kinds[size]).view(torch.uint8).numpy().tobytes()
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")
