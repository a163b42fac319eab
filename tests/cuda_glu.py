"""Launches the kernels of tests/cuda/glu.cu on the emulator, as the launchers of linear_glu do."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import cuda_gemm
from tests.cuda_gemm import (
    ACTIVATIONS,
    LARGE,
    TMA,
    TMA_WIDE,
    Flag,
    Int,
    L,
    Operand,
    P,
    Store,
    find,
    operand,
    pointer,
    tensor_map,
)
from tests.emulator import Module, Stats, nvcc

SOURCE = Path(__file__).parent / "cuda/glu.cu"
STEP = 64  # what the second half of the gradients begins at a multiple of


class PairedRows(ctypes.Structure):
    _fields_ = [("first", P), ("second", P), ("first_stride", L), ("second_stride", L)]
    _fields_ += [("rows", Int), ("aligned", Flag)]


class PairedDepth(ctypes.Structure):
    _fields_ = [("first", P), ("second", P), ("first_stride", L), ("second_stride", L)]
    _fields_ += [("depth", Int), ("begin", Int), ("aligned", Flag)]


class Glu(ctypes.Structure):
    _fields_ = [(name, P) for name in ("out", "gate", "up", "gate_bias", "up_bias")]
    _fields_ += [("n", Int), ("act", Int), ("aligned", Flag)]


class GluBackward(ctypes.Structure):
    _fields_ = [(name, P) for name in ("dy", "gate", "up", "pair", "gate_partial", "up_partial")]
    _fields_ += [("m", L), ("n", Int), ("begin", Int), ("act", Int), ("aligned", Flag)]


@functools.cache
def module(arch: str, mutant: int = 0) -> Module:
    flags = ["--expt-relaxed-constexpr", *([f"-DPYFAST_MUTANT={mutant}"] if mutant else [])]
    return Module(nvcc.compile_ptx(SOURCE, arch, flags))


def _sizes(m: int, n: int, k: int, a: Tensor, right: ctypes.Structure | None) -> bytes:
    """GemmArgs of one slice; of kernels by tensor maps its right operand is empty."""
    right = Operand() if right is None else right
    fields = [("a", Operand), ("b", type(right)), ("m", Int), ("n", Int), ("k", Int)]
    fields += [("split_k", Int), ("sums", P), ("sums_stride", L)]
    fields += [("rows_there", P), ("depth_there", P)]
    args = type("Args", (ctypes.Structure,), {"_fields_": fields})
    return bytes(args(operand(a, "depth"), right, m, n, k, -(-k // STEP) * STEP))


def _product(
    kernels: Module, a: Tensor, pair: tuple[Tensor, Tensor], tile: tuple[int, int, int, int],
    right: ctypes.Structure, n: int, epilogue: ctypes.Structure, written: list[Tensor],
    reachable: list[Tensor], processors: int, **options: Any,
) -> Stats:  # fmt: skip
    """One product of `a` and both matrices, [rows, depth] in each."""
    (m, k), (rows, cols, depth, threads) = a.shape, tile
    by_rows = isinstance(right, PairedRows)
    tiles, shared = -(-m // rows) * -(-n // cols), 3 * (rows + cols) * depth * 2
    args, words = [_sizes(m, n, k, a, right)], [type(epilogue).__name__ + "Epi", f"Li{cols}E"]
    if threads == TMA[3]:
        stages = 1536 // (rows + cols)
        shared = stages * (rows + cols) * depth * 2 + 32 * 1024 + 16 * stages
        box = ("depth", cols // 2) if by_rows else ("rows", cols)
        maps = [tensor_map(a, "depth", rows), *(tensor_map(t, *box) for t in pair)]
        begin = 0 if by_rows else right.begin
        # PairedMaps: three maps, at multiples of 128 bytes, and a number
        args = [b"".join(maps) + begin.to_bytes(4, "little") + bytes(124), _sizes(m, n, k, a, None)]
        tiles = min(tiles, processors)
        words.append("pair_kernel")
    return kernels.launch(
        find(kernels, *words), (tiles, 1), threads, [*args, bytes(epilogue)], shared_bytes=shared,
        reachable=[a, *pair, *reachable, *written], uninitialised=written, **options,
    )  # fmt: skip


def forward(
    kernels: Module, x: Tensor, gate: Tensor, up: Tensor, biases: tuple[Tensor, Tensor] | None,
    act: str, tile: tuple[int, int, int, int], processors: int = 2, **options: Any,
) -> tuple[list[Tensor], Stats]:  # fmt: skip
    """(out, the gate before its activation, up), and the counters."""
    m, n = x.shape[0], gate.shape[0]
    made = [torch.empty(m, n, dtype=x.dtype) for _ in range(3)]
    right = PairedRows(gate.data_ptr(), up.data_ptr(), gate.stride(0), up.stride(0), n, True)
    pointers = map(pointer, (*made, *(biases or (None, None))))
    epilogue = Glu(*pointers, n, ACTIVATIONS.index(act), n % 4 == 0)
    wide = -(-n // 8) * 16
    rest = (made, list(biases or ()), processors)
    stats = _product(kernels, x, (gate, up), tile, right, wide, epilogue, *rest, **options)
    return made, stats


def split(kernels: Module, dy: Tensor, gate: Tensor, up: Tensor, act: str, **options: Any):
    """The gradients of gate and up side by side, the second at a multiple of STEP; the counters."""
    (m, n), begin = dy.shape, -(-dy.shape[1] // STEP) * STEP
    pair = torch.empty(m, 2 * begin, dtype=dy.dtype)
    pointers = map(pointer, (dy, gate, up, pair, None, None))
    args = GluBackward(*pointers, m, n, begin, ACTIVATIONS.index(act), n % 8 == 0)
    grid = (-(-begin // 256), -(-m // 32))
    stats = kernels.launch(
        find(kernels, "glu_backward"), grid, 256, [bytes(args)],
        reachable=[dy, gate, up, pair], uninitialised=[pair], **options,
    )  # fmt: skip
    return pair, grid, stats


def input_gradient(
    kernels: Module, pair: Tensor, gate: Tensor, up: Tensor, tile: tuple[int, int, int, int],
    processors: int = 2, **options: Any,
) -> tuple[Tensor, Stats]:  # fmt: skip
    """dx of what `split` has made."""
    (n, k), begin = gate.shape, pair.shape[1] // 2
    out = torch.empty(pair.shape[0], k, dtype=pair.dtype)
    pointers = gate.data_ptr(), up.data_ptr(), gate.stride(0), up.stride(0)
    right = PairedDepth(*pointers, n, begin, True)
    left, weights = pair[:, : begin + n], (gate.t(), up.t())
    epilogue = Store(pointer(out), None, k, 0, k % 4 == 0)
    rest = (k, epilogue, [out], [pair], processors)
    return out, _product(kernels, left, weights, tile, right, *rest, **options)


def tile_of(capability: int) -> tuple[int, int, int, int]:
    """What large matrices take."""
    return LARGE if capability == 80 else TMA_WIDE


def weight_gradient(
    kernels: Module, half: Tensor, x: Tensor, capability: int, **options: Any
) -> Stats:
    """dW of one of the weights, by a kernel of tests/cuda/gemm.cu."""
    out = torch.empty(half.shape[1], x.shape[1], dtype=x.dtype)
    epilogue = Store(pointer(out), None, x.shape[1], 0, True)
    rest = (("rows", "rows"), tile_of(capability), epilogue, [out])
    return cuda_gemm.gemm(kernels, half.t(), x.t(), *rest, **options)
