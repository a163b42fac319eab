"""What was measured to be the quickest way of a call on a GPU, kept in a file from run to run.

For every device, operation, dtypes and bucket of sizes the candidates (CUDA C++, Triton, and for
linear_act cuBLASLt) are timed once, at the first call; the winner is kept in a file in PYFAST_CACHE
that names the sources measured. `pyfast tune` asks ahead of time, and whether torch is quicker with
the whole operation.
Nothing is measured while a CUDA graph is captured, while torch.compile traces, under fake tensors,
or under `pyfast.deterministic(True)`: then an unknown call takes the first candidate.
"""

import contextlib
import functools
import json
import logging
import os
import statistics
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pyfast import build, triton_rooms

WARM_UP, ROUNDS = 2, 5
Run = Callable[[], Any]
_log = logging.getLogger("pyfast")


def bucket(size: int) -> int:
    """The power of two at or above a size: sizes of one bucket have one winner."""
    return 1 << max(0, size - 1).bit_length()


def describe(op: str, args: tuple) -> str:
    """What a winner is kept for: "rms_norm cuda:NVIDIA H100 bfloat16[2048,1024] None True"."""
    words, device = [op] if op else [], None
    for arg in args:
        if isinstance(arg, torch.Tensor):
            device = device or arg.device
            sizes = ",".join(str(bucket(n)) for n in arg.shape)
            words.append(f"{str(arg.dtype).removeprefix('torch.')}[{sizes}]")
        elif isinstance(arg, list | tuple):
            words.append(f"{bucket(len(arg))} of {describe('', tuple(arg[:1]))}")
        elif arg is None or isinstance(arg, bool | str):
            words.append(str(arg))
    if device is not None and op:
        words.insert(1, _device_name(device))
    return " ".join(words)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def may_measure(args: tuple) -> bool:
    """Whether this is a call whose candidates can be run several times, and timed."""
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(
        torch._C._TorchDispatchModeKey.FAKE
    ):
        return False
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if any(type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter for t in tensors):
        return False
    on_gpu = any(t.is_cuda for t in tensors)
    return not (on_gpu and torch.cuda.is_current_stream_capturing())


def seconds_on_gpu(run: Run) -> float:
    """The median of a few calls by events of the current stream, after some to warm up."""
    for _ in range(WARM_UP):
        run()
    samples = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples)


class Winners:
    """The winners of one set of sources, in a file; `clock` gives the seconds of a call."""

    def __init__(
        self,
        path: Path | None = None,
        archs: tuple[str, ...] = (),
        clock: Callable[[Run], float] = seconds_on_gpu,
    ) -> None:
        self.path = path or build.cache_dir() / "tuning.json"
        self.archs, self.clock = archs, clock
        self.asked = ""  # the last question about a whole operation
        self._known: dict[str, str] | None = None

    @functools.cached_property
    def version(self) -> str:
        """Identifies what was measured: the kernels of pyfast, and its Triton."""
        return f"{build.source_hash(self.archs)}-{triton_rooms.version()}"

    def of_a_whole(self, op: str, dtype: torch.dtype | None, work: int) -> str | None:
        """Who was quicker, forward and backward together: "pyfast", "torch"; None: unknown."""
        self.asked = f"{op} {_device_name(torch.device('cuda'))} {dtype} work {bucket(work)}"
        return self.known.get(self.asked)

    @property
    def known(self) -> dict[str, str]:
        """The winner of every call that was measured; read from the file once."""
        if self._known is None:
            self._known = self._read()
        return self._known

    def pick(self, key: str, candidates: Mapping[str, Run], measure: bool) -> str:
        """The name of the candidate to run: the winner, measured now where that is allowed."""
        found = self.known.get(key)
        if found in candidates:
            return found
        if not measure:
            return next(iter(candidates))
        times = self.measure(key, candidates)
        if not times:
            return next(iter(candidates))  # whose own error is the best explanation
        return self.keep(key, times)

    def measure(self, key: str, candidates: Mapping[str, Run]) -> dict[str, float]:
        """Seconds of each candidate that works."""
        times = {}
        for name, run in candidates.items():
            try:
                times[name] = self.clock(run)
            except (RuntimeError, ValueError, TypeError) as error:  # out of memory is the first
                _log.debug("%s: %s cannot run: %s", key, name, error)
        return times

    def keep(self, key: str, times: Mapping[str, float]) -> str:
        """Remember the quickest, here and in the file."""
        winner = min(times, key=times.__getitem__)
        told = ", ".join(f"{name} {1e6 * t:.1f} us" for name, t in times.items())
        _log.debug("%s: %s wins (%s)", key, winner, told)
        self.known[key] = winner
        self._write()
        return winner

    def _read(self) -> dict[str, str]:
        try:
            told = json.loads(self.path.read_text())
            if told["version"] != self.version:
                return {}
            return {str(key): str(name) for key, name in told["winners"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            words = f"{self.path} is no file of measured winners ({error}); they are measured anew"
            warnings.warn(f"pyfast: {words}", stacklevel=4)
            return {}

    def _write(self) -> None:
        """Whole or not at all; what other processes have measured meanwhile is kept."""
        fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings(action="ignore"):
                self._known = self._read() | self.known
            fresh.write_text(json.dumps({"version": self.version, "winners": self._known}))
            os.replace(fresh, self.path)
        except OSError as error:
            _log.debug("%s cannot be written: %s", self.path, error)
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink()
