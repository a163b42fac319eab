"""What this machine does at best, measured in the same run: a copy, matmuls, multiply-add loops.

A row's least time is the larger of its bytes at the copy's bandwidth and its FLOPs at the matmul's
rate; the larger one binds. Rates are the best of the samples: a ceiling is a maximum.
"""

import ctypes
import hashlib
import shutil
import subprocess
import threading
import time
from pathlib import Path

import torch

from bench.devices import Cpu
from bench.timing import interleave, once
from pyfast import build

SOURCE = Path(__file__).with_name("peak.cpp")
FLAGS = ("-O2", "-shared", "-fPIC", "-std=c++20")
PEAKS = ("fma_avx2", "fma_avx512", "avx512_bf16", "amx_bf16")  # functions of peak.cpp
COPY, MATMUL = "copy", "matmul"
_COPY_BYTES = 2**28  # far past the last cache
_MATMUL_SIZE, _SLOW_MATMUL_SIZE = 2048, 512
_SLOW = 5e-3  # seconds of the small matmul from which the large one would take minutes


def measure_ceilings(dtypes: list[str], threads: int, isa: str | None = None) -> dict[str, object]:
    """GB/s of a large copy, GFLOP/s of a large matmul per dtype, GFLOP/s of each peak loop.

    `threads`: as torch is set to now. A peak that cannot run here is None, with its reason in
    `skipped`; with `isa` "avx2" the wider ones are left out.
    """
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.empty_like(source)
    calls = {COPY: lambda: target.copy_(source)}
    sizes = {}
    for name in dtypes:
        a = torch.ones(_SLOW_MATMUL_SIZE, _SLOW_MATMUL_SIZE, dtype=getattr(torch, name))
        slow = min(once(lambda a=a: a @ a) for _ in range(3)) > _SLOW
        sizes[name] = _SLOW_MATMUL_SIZE if slow else _MATMUL_SIZE
        a = torch.ones(sizes[name], sizes[name], dtype=getattr(torch, name))
        calls[name] = lambda a=a: a @ a
    times = interleave(calls, rounds=7, warmup=1, repeat=False, budget=4.0)
    best = {name: min(timing.samples) for name, timing in times.items()}
    peaks, skipped = peak_rates(threads, isa)
    return {
        "threads": threads,
        "copy_gb_per_s": round(2 * _COPY_BYTES / best[COPY] / 1e9, 2),
        "matmul_gflops": {n: round(2 * sizes[n] ** 3 / best[n] / 1e9, 1) for n in dtypes},
        "peak_gflops": peaks,
        "skipped": skipped,
    }


def gpu_ceilings(dtypes: list[str], threads: int, device: Cpu) -> dict[str, object]:
    """The same of a GPU, which has no loops of ours: a copy and matmuls."""
    dry = device.type == "cpu"
    count, size = (2**18, 64) if dry else (_COPY_BYTES, 8192)
    source = device.put(torch.ones(count // 4))
    target = torch.empty_like(source)
    calls = {COPY: lambda: target.copy_(source)}
    for name in dtypes:
        a = device.put(torch.ones(size, size, dtype=getattr(torch, name)))
        calls[name] = lambda a=a: a @ a
    times = interleave(calls, rounds=9, warmup=3, repeat=False, budget=8.0, device=device)
    best = {name: min(timing.samples) for name, timing in times.items()}
    return {
        "threads": threads,
        "copy_gb_per_s": round(2 * count / best[COPY] / 1e9, 3),
        "matmul_gflops": {n: round(2 * size**3 / best[n] / 1e9, 3) for n in dtypes},
        "peak_gflops": {},
        "skipped": {},
    }


def peak_rates(
    threads: int, isa: str | None = None
) -> tuple[dict[str, float | None], dict[str, str]]:
    """GFLOP/s of the loops of peak.cpp on that many threads, and why some have none."""
    rates: dict[str, float | None] = dict.fromkeys(PEAKS)
    try:
        library = ctypes.CDLL(str(peak_library()))
    except (OSError, RuntimeError) as error:
        return rates, dict.fromkeys(PEAKS, str(error))
    skipped = {}
    for name in PEAKS:
        if isa is not None and not name.endswith(isa):
            skipped[name] = f"the run is held to {isa}"
            continue
        loop = getattr(library, f"pyfast_peak_{name}")
        loop.argtypes, loop.restype = [ctypes.c_long], ctypes.c_double
        rates[name] = _rate(loop, threads)
        if rates[name] is None:
            skipped[name] = "this processor does not have the instructions"
    return rates, skipped


def peak_library() -> Path:
    """peak.cpp compiled into the cache.

    Raises:
        RuntimeError: no compiler, or it does not compile here.
        OSError: the cache cannot be written.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("there is no C++ compiler (g++)")
    digest = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS)).encode()).hexdigest()
    library = build.cache_dir() / "bench" / f"peak-{digest[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        fresh = library.with_suffix(f".{threading.get_native_id()}")
        done = subprocess.run([compiler, *FLAGS, SOURCE, "-o", fresh], capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile with {compiler}")
        fresh.replace(library)
    return library


def _rate(loop: ctypes._CFuncPtr, threads: int, seconds: float = 0.1) -> float | None:
    """GFLOP/s of all threads together, the best of three; None where the loop cannot run."""
    turns = 100_000
    if loop(turns) < 0:
        return None
    start = time.perf_counter()
    loop(turns)
    turns = int(turns * seconds / (time.perf_counter() - start))
    return round(max(_together(loop, threads, turns) for _ in range(3)) / 1e9, 1)


def _together(loop: ctypes._CFuncPtr, threads: int, turns: int) -> float:
    """FLOP/s of one round; a call through ctypes lets the other threads run."""
    done: list[float] = []
    workers = [threading.Thread(target=lambda: done.append(loop(turns))) for _ in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - start)


def sentence(ceiling: dict) -> str:
    """The ceilings of one thread count, for people."""
    matmuls = [f"{name} matmul {rate:g}" for name, rate in ceiling["matmul_gflops"].items()]
    loops = [f"{name} loop {rate:g}" for name, rate in ceiling["peak_gflops"].items() if rate]
    reasons: dict[str, list[str]] = {}
    for name, why in ceiling["skipped"].items():
        reasons.setdefault(why, []).append(name)
    without = [f"no {', '.join(names)}: {why}" for why, names in reasons.items()]
    return (
        f"ceilings, {ceiling['threads']} threads: copy {ceiling['copy_gb_per_s']:g} GB/s; GFLOP/s: "
        + "; ".join([", ".join(matmuls + loops), *without])
    )


def matmul_rate(ceiling: dict, dtype: str) -> float:
    """GFLOP/s of the quickest matmul that serves `dtype`: a 16-bit one may compute in float32."""
    rates = ceiling["matmul_gflops"]
    return max(rates[dtype], rates.get("float32", 0.0))


def binding(moved: int, flops: int, dtype: str, ceiling: dict) -> tuple[str, float]:
    """Which ceiling binds, and the least seconds it allows, for so many bytes and FLOPs."""
    by_copy = moved / (1e9 * ceiling["copy_gb_per_s"])
    by_matmul = flops / (1e9 * matmul_rate(ceiling, dtype))
    return (COPY, by_copy) if by_copy >= by_matmul else (MATMUL, by_matmul)


def peak_rate(ceiling: dict, dtype: str) -> tuple[str, float] | None:
    """The quickest peak loop that serves `dtype`, and its GFLOP/s."""
    rates = ceiling["peak_gflops"]
    narrow = dtype == "bfloat16"  # what the loops named after it multiply
    found = {n: r for n, r in rates.items() if r and (narrow or not n.endswith("bf16"))}
    if not found:
        return None
    name = max(found, key=lambda n: found[n])
    return name, found[name]
