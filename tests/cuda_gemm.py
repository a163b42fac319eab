"""Launches the kernels of tests/cuda/gemm.cu on the emulator and holds them against float64."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfast import reference
from pyfast.tolerance import assert_as_good_as_torch
from tests.emulator import Module, Stats, nvcc
from tests.emulator.tensormap import encode_tensor_map

SOURCE = Path(__file__).parent / "cuda/gemm.cu"
B, H, F = torch.bfloat16, torch.float16, torch.float32
NAMES = {B: "__nv_bfloat16", H: "__half", F: "If"}
# Tile: its rows, columns and depth, and the threads of a block; three stages of shared memory.
LARGE, SMALL, FLOAT = (128, 128, 32, 128), (64, 64, 64, 128), (64, 64, 32, 64)
HOPPER = (128, 128, 64, 256)
TMA, TMA_WIDE = (128, 128, 64, 384), (128, 256, 64, 384)  # by tensor maps
ACTIVATIONS = list(reference.ACTIVATIONS)
ARCHS = ["sm_80", "sm_90a"]
P, Int, L, Flag = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_bool


class Operand(ctypes.Structure):
    _fields_ = [("data", P), ("stride", L), ("aligned", Flag)]


class Gemm(ctypes.Structure):
    _fields_ = [("a", Operand), ("b", Operand), ("m", Int), ("n", Int), ("k", Int)]
    _fields_ += [("split_k", Int), ("sums", P), ("sums_stride", L)]
    _fields_ += [("rows_there", P), ("depth_there", P)]  # null: the sizes are known


class Linear(ctypes.Structure):
    _fields_ = [
        ("out", P),
        ("preact", P),
        ("bias", P),
        ("stride", L),
        ("act", Int),
        ("aligned", Flag),
    ]


class Store(ctypes.Structure):
    _fields_ = [("out", P), ("partial", P), ("stride", L), ("slice", L), ("aligned", Flag)]


class ActBackward(ctypes.Structure):
    _fields_ = [("dy", P), ("saved", P), ("dpre", P), ("partial", P), ("m", L), ("n", Int)]
    _fields_ += [("act", Int), ("aligned", Flag)]


def module(arch: str, mutant: int = 0) -> Module:
    flags = [f"-DPYFAST_MUTANT={mutant}"] if mutant else []
    return Module(nvcc.compile_ptx(SOURCE, arch, flags))


def find(kernels: Module, *words: str) -> str:
    """The one kernel whose mangled name holds these words."""
    (name,) = [name for name in kernels.kernels if all(word in name for word in words)]
    return name


def operand(t: Tensor, major: str) -> Operand:
    """[rows, depth] with stride 1 along `major`."""
    stride = t.stride(0) if major == "depth" else t.stride(1)
    aligned = t.data_ptr() % 16 == 0 and stride * t.element_size() % 16 == 0
    return Operand(t.data_ptr(), stride, aligned)


def tensor_map(t: Tensor, major: str, rows: int) -> bytes:
    """Of [rows, depth], cut into boxes of `rows` or, where the rows have stride 1, of 64 rows."""
    by_depth = t if major == "depth" else t.t()
    box = (rows if major == "depth" else 64, 64)
    shape, strides = by_depth.shape, by_depth.stride()
    return encode_tensor_map(t.data_ptr(), shape, strides, box, t.dtype, 128)


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def gemm(
    kernels: Module,
    a: Tensor,
    b: Tensor,
    majors: tuple[str, str],
    tile: tuple[int, int, int, int],
    epilogue: ctypes.Structure,
    written: list[Tensor],
    slices: int = 1,
    sums: Tensor | None = None,
    processors: int = 2,
    **options: Any,
) -> Stats:
    """One launch; `written` and `sums` may not be read before they are written.

    `processors` are what blocks by tensor maps share: with fewer than tiles they take several.
    """
    (m, k), n = a.shape, b.shape[0]
    rows, cols, depth, threads = tile
    steps = -(-k // depth)
    split = -(-steps // slices) * depth
    stride = sums.stride(0) if sums is not None else 0
    operands = [operand(t, major) for t, major in zip((a, b), majors, strict=True)]
    args = Gemm(*operands, m, n, k, split, pointer(sums), stride)
    code = {"depth": "MajorE0", "rows": "MajorE1"}
    kind, shape = type(epilogue).__name__ + "Epi", f"ILi{rows}ELi{cols}ELi{depth}E"
    name, stages, maps = "gemm_kernel", 3, []
    tiles = -(-m // rows) * -(-n // cols)
    if threads == TMA[3]:
        name, shape, stages = "gemm_tma_kernel", f"TmaTileILi{cols}E", 1536 // (rows + cols)
        maps = [tensor_map(t, *x) for t, *x in ((a, majors[0], rows), (b, majors[1], cols))]
        tiles = min(tiles, processors)
    words = (name, NAMES[a.dtype], shape, code[majors[0]], kind)
    shared = stages * (rows + cols) * depth * a.element_size()
    shared += 32 * 1024 + 16 * stages if maps else 0  # for the epilogue, and barriers
    fresh = written if sums is None else [*written, sums]
    reachable = [a, b, *options.pop("reachable", ()), *fresh]
    return kernels.launch(
        find(kernels, *words), (tiles, slices), threads, [*maps, bytes(args), bytes(epilogue)],
        shared_bytes=shared, reachable=reachable, uninitialised=fresh, **options,
    )  # fmt: skip


def linear(
    kernels: Module,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    act: str = "none",
    majors: tuple[str, str] = ("depth", "depth"),
    tile: tuple[int, int, int, int] = SMALL,
    gap: int = 0,
    **options: Any,
) -> Stats:
    """act(x weight^T + bias) against float64; rows of x lie `gap` elements apart."""
    m, n, k = sizes
    torch.manual_seed(0)
    x = torch.randn(m, k + gap).to(dtype)[:, :k]
    weight = (torch.randn(n, k) * max(k, 1) ** -0.5).to(dtype)
    bias = torch.randn(n).to(dtype)
    w = weight if majors[1] == "depth" else weight.t().contiguous().t()
    out, preact = torch.empty(m, n, dtype=dtype), torch.empty(m, n, dtype=dtype)
    fields = (*map(pointer, (out, preact, bias)), n, ACTIVATIONS.index(act), n % 4 == 0)
    stats = gemm(
        kernels, x, w, majors, tile, Linear(*fields), [out, preact], reachable=[bias], **options
    )
    for name, ours, kind in (("preact", preact, "none"), ("out", out, act)):
        theirs = reference.linear_act(x, weight, bias, kind)
        truth = reference.linear_act(*(t.double() for t in (x, weight, bias)), kind)
        assert_as_good_as_torch(f"{sizes} {act} {name}", ours, theirs, truth)
    return stats


def weight_gradient(
    kernels: Module,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    slices: int = 1,
    tile: tuple[int, int, int, int] = LARGE,
    **options: Any,
) -> Stats:
    """dY^T X in slices, and the sums of dY's columns, against float64."""
    m, n, k = sizes
    torch.manual_seed(0)
    dy, x = torch.randn(k, m).to(dtype), torch.randn(k, n).to(dtype)
    size = -(-m * n // 4) * 4
    out, parts = torch.empty(m, n, dtype=dtype), torch.empty(slices, size)
    sums = torch.empty(slices, m)
    tile = FLOAT if dtype == F else tile
    partial = parts if slices > 1 else None
    epilogue = Store(pointer(out), pointer(partial), n, size, n % 4 == 0)
    written = [out] if partial is None else [parts]
    majors = ("rows", "rows")
    stats = gemm(kernels, dy.t(), x.t(), majors, tile, epilogue, written, slices, sums, **options)
    if slices > 1:
        out = parts[:, : m * n].sum(0).reshape(m, n).to(dtype)
    truth = dy.double().t() @ x.double()
    assert_as_good_as_torch("dW", out, dy.t() @ x, truth)
    assert_as_good_as_torch("db", sums.sum(0), dy.float().sum(0), dy.double().sum(0))
    return stats


def act_backward(kernels: Module, dtype: torch.dtype, m: int, n: int, act: str) -> Stats:
    """dpre and the sums of its columns, through both kernels, against float64."""
    torch.manual_seed(0)
    dy, saved = torch.randn(m, n).to(dtype), torch.randn(m, n).to(dtype)
    blocks, width = -(-m // 32), 32 * 16 // dtype.itemsize
    stride = -(-n // 4) * 4
    dpre, partial = torch.empty(m, n, dtype=dtype), torch.empty(blocks, stride)
    pointers = map(pointer, (dy, saved, dpre, partial))
    aligned = n * dtype.itemsize % 16 == 0
    args = ActBackward(*pointers, m, n, ACTIVATIONS.index(act), aligned)
    tensors = [dy, saved, dpre, partial]
    name = find(kernels, "act_backward", NAMES[dtype].replace("If", "kernelIf"))
    grid = (-(-n // width), blocks)
    stats = kernels.launch(
        name, grid, 256, [bytes(args)], reachable=tensors, uninitialised=tensors[2:]
    )
    z = saved.double().requires_grad_()
    reference.ACTIVATIONS[act](z).backward(dy.double())
    w = saved.detach().requires_grad_()
    reference.ACTIVATIONS[act](w).backward(dy)
    assert_as_good_as_torch(f"{act} dpre", dpre, w.grad, z.grad)
    if dtype == B:
        dbias = torch.empty(n, dtype=dtype)
        args = [dbias, partial, n, stride, blocks, n % 4 == 0]
        name, grid = find(kernels, "column_sums"), -(-n // 128)
        stats += kernels.launch(name, grid, 256, args, uninitialised=[dbias])
        assert_as_good_as_torch(f"{act} dbias", dbias, w.grad.sum(0), z.grad.sum(0))
    return stats
