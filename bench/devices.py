"""Where a bench runs, and how a call is timed there: the CPU, a GPU, or a GPU's stand-in.

On a GPU events on its stream take the time of each call, with level 2 emptied before it and nothing
waited for in between: what the host does in the meantime hides behind the emptying, as behind other
kernels in training. `emulator` is the dry run of the same: CPU tensors, the GPU kernels on
tests/emulator, and the host's clock in the place of events, so its times say nothing.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import pyfast
from bench import memory

OURS = "pyfast"
Run = Callable[[], Any]


@dataclass(frozen=True)
class Within:
    """A call that belongs inside a context, which is entered once for many calls, untimed."""

    context: Callable[[], contextlib.AbstractContextManager]
    run: Run

    def __call__(self) -> Any:
        with self.context():
            return self.run()


def apart(call: Run) -> tuple[contextlib.AbstractContextManager, Run]:
    """The context of a call, to be entered, and what to time inside it."""
    if isinstance(call, Within):
        return call.context(), call.run
    return contextlib.nullcontext(), call


class Cpu:
    """The host's clock around all calls of a sample."""

    name = type = "cpu"

    def seconds(self, call: Run, calls: int) -> float:
        """Of `calls` calls together."""
        context, run = apart(call)
        with context:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return time.perf_counter() - start

    def ways(self) -> dict[str, Callable[[], contextlib.AbstractContextManager] | None]:
        """Ours by name, and the context that chooses its backend; None: `auto` does."""
        return {OURS: None}

    def put(self, value: Any) -> Any:
        """The tensors of a value (also in lists and dictionaries), on this device."""
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(self.type), value)

    def extra_peak(self, call: Run) -> int | None:
        """Bytes that a call takes at most beyond what was there before it."""
        return memory.extra_peak(call)

    def facts(self) -> dict[str, Any] | None:
        """Of the GPU, as JSON values; None for none."""
        return None


class Cuda(Cpu):
    """A GPU, its own events as the clock."""

    name = type = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("bench: --device cuda must find a GPU; torch sees none")
        told = torch.cuda.get_device_properties(0)
        self.level2 = max(told.L2_cache_size, 2**25)
        self._spill = torch.empty(2 * self.level2, dtype=torch.uint8, device=self.type)

    def seconds(self, call: Run, calls: int) -> float:
        context, run = apart(call)
        with context:
            pairs = [(self._event(), self._event()) for _ in range(calls)]
            self._wait()
            for start, end in pairs:
                self._spill.zero_()
                start.record()
                run()
                end.record()
            self._wait()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3

    def _event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def _wait(self) -> None:
        torch.cuda.synchronize()

    def ways(self) -> dict[str, Callable[[], contextlib.AbstractContextManager] | None]:
        named = ("cuda", "triton")
        return {OURS: None} | {f"{OURS} {b}": lambda b=b: pyfast.using(b) for b in named}

    def extra_peak(self, call: Run) -> int | None:
        self._wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        self._wait()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak

    def facts(self) -> dict[str, Any]:
        told = torch.cuda.get_device_properties(0)
        return {
            "name": told.name,
            "capability": f"{told.major}.{told.minor}",
            "processors": told.multi_processor_count,
            "memory_gb": round(told.total_memory / 1e9, 1),
            "level2_mb": round(self.level2 / 1e6, 1),
            "torch_cuda": torch.version.cuda,
        }


class _HostEvent:
    """Stands in for an event of CUDA."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "_HostEvent") -> float:
        return 1e3 * (end.at - self.at)


class Emulator(Cuda):
    """The dry run of a GPU."""

    name, type = "emulator", "cpu"

    def __init__(self) -> None:
        self.level2 = 2**16
        self._spill = torch.empty(2 * self.level2, dtype=torch.uint8)

    def _event(self) -> Any:
        return _HostEvent()

    def _wait(self) -> None:
        pass

    def ways(self) -> dict[str, Callable[[], contextlib.AbstractContextManager] | None]:
        found = emulated_backends()
        if not found:
            raise RuntimeError(
                "bench: --device emulator must have kernels to run; needs PYFAST_CUDA=1 or triton"
            )
        first, *rest = found
        named = {OURS: first} | {f"{OURS} {b}": b for b in rest}
        return {name: lambda b=b: emulated(b) for name, b in named.items()}

    def extra_peak(self, call: Run) -> int | None:
        return memory.extra_peak(call)

    def facts(self) -> dict[str, Any]:
        return {"name": "emulator", "capability": "8.0", "processors": 4}


def emulated_backends() -> list[str]:
    """The backends whose GPU kernels the emulator can run here."""
    from tests.emulator import cuda

    found = [] if cuda.missing() else ["cuda"]
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401

        found.append("triton")
    return found


@contextlib.contextmanager
def emulated(backend: str, **options: Any) -> Iterator[list]:
    """Run `backend` in this block, its GPU kernels on the emulator; the log of their launches."""
    if backend == "cuda":
        from tests.emulator.cuda import emulated as machine
    else:
        from tests.emulator.triton import emulated as machine
    with machine(**options) as log, pyfast.using(backend):
        yield log


CPU = Cpu()
DEVICES = {"cpu": Cpu, "cuda": Cuda, "emulator": Emulator}


def is_ours(name: str) -> bool:
    """Whether a contestant is pyfast, by whatever backend."""
    return name.split()[0] == OURS
