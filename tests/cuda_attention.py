"""Launches the kernels of tests/cuda/attention.cu on the emulator, kernel by kernel."""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.emulator import Module, Stats, nvcc

SOURCE = Path(__file__).parent / "cuda/attention.cu"
B, H, F = torch.bfloat16, torch.float16, torch.float32
NAMES = {B: "__nv_bfloat16", H: "__half", F: "kernelIf"}
DTYPES = [F, B, H]  # as csrc/dispatch.h counts them
P, Int, L, Flag = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_bool


class Heads(ctypes.Structure):
    _fields_ = [("data", P), ("batch", L), ("head", L), ("time", L), ("aligned", Flag)]


class Mask(ctypes.Structure):
    _fields_ = [("kind", Int), ("data", P), ("batch", L), ("head", L), ("query", L), ("key", L)]


SIZES = ("batch", "heads", "kv_heads", "queries", "keys", "size", "value_size")


class Forward(ctypes.Structure):
    _fields_ = [
        ("dtype", Int),
        ("capability", Int),
        *((name, Int) for name in SIZES),
        ("causal", Flag),
    ]
    _fields_ += [("scale", ctypes.c_float), ("q", Heads), ("k", Heads), ("v", Heads)]
    _fields_ += [("mask", Mask), ("out", Heads), ("lse", P)]


def heads(t: Tensor) -> Heads:
    """[B, H, T, D] with stride 1 in D."""
    offsets = [t.data_ptr(), *(s * t.element_size() for s in t.stride()[:3])]
    return Heads(t.data_ptr(), *t.stride()[:3], all(offset % 16 == 0 for offset in offsets))


def score_mask(mask: Tensor | None, dtype: torch.dtype) -> Mask:
    if mask is None:
        return Mask()
    kind = {torch.bool: 1, torch.float32: 2}.get(mask.dtype, 3)
    strides = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    return Mask(kind, mask.data_ptr(), *strides)


@functools.cache
def module(arch: str, mutant: int = 0, source: Path = SOURCE) -> Module:
    """The kernels, with a defect or without."""
    flags = [f"-DPYFAST_MUTANT={mutant}"] if mutant else []
    return Module(nvcc.compile_ptx(source, arch, flags))


def empty_heads(batch: int, heads: int, time: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(batch, time, heads, size, dtype=dtype).transpose(1, 2)


def padded(size: int, groups: bool) -> int:
    """The head size of the kernel that takes it, in warpgroups or not."""
    sizes = (64, 80, 96, 128, 192, 256) if groups else (64, 128, 256)
    return next(kernel for kernel in sizes if size <= kernel)


@dataclass
class Call:
    """One attention: operands, and what is needed to launch its kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    causal: bool = False

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    def kernel_size(self, groups: bool) -> int:
        return padded(max(self.q.shape[3], self.v.shape[3]), groups)

    def args(self, out: Tensor, lse: Tensor) -> Forward:
        """What every kernel takes."""
        q, k, v = self.q, self.k, self.v
        (batch, count, queries, size), (kv_heads, keys) = q.shape, k.shape[1:3]
        sizes = (batch, count, kv_heads, queries, keys, size, v.shape[3])
        operands = (heads(q), heads(k), heads(v), score_mask(self.mask, q.dtype), heads(out))
        code = DTYPES.index(q.dtype)
        return Forward(code, 9, *sizes, self.causal, self.scale, *operands, lse.data_ptr())

    def inputs(self) -> list[Tensor]:
        return [t for t in (self.q, self.k, self.v, self.mask) if t is not None]

    def reference(self, cast: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(out, lse) by the formula, with the operands as `cast` makes them."""
        q, k, v = (cast(t) for t in (self.q, self.k, self.v))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        s = q @ k.mT * self.scale
        if self.mask is not None:
            hide = self.mask.dtype == torch.bool
            s = s.masked_fill(~self.mask, -torch.inf) if hide else s + self.mask.to(s.dtype)
        if self.causal:
            seen = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
            s = s.masked_fill(~seen, -torch.inf)
        lse = s.logsumexp(-1)
        p = (s - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
        return p @ v, lse.masked_fill(lse == -torch.inf, torch.inf)


def operands(
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int, int, int],
    mask: str | tuple[int, ...] = "",
    causal: bool = False,
    gap: int = 0,
) -> Call:
    """Of batch, heads, heads of keys, queries, keys, head size, value size; rows `gap` apart."""
    batch, heads, kv_heads, queries, keys, size, value_size = sizes
    torch.manual_seed(0)

    def make(heads: int, time: int, size: int) -> Tensor:
        t = torch.randn(batch, time, heads, size + gap).to(dtype)
        return t[..., :size].transpose(1, 2)

    tensor = None
    if mask == "boolean":
        tensor = torch.randint(4, (batch, 1, queries, keys)) > 0
        tensor[0, 0, queries // 2] = False  # a query that sees nothing
    elif mask == "same":
        tensor = torch.randn(1, heads, queries, keys).to(dtype)
    elif mask:
        tensor = torch.randn(*mask)
    q, k, v = (heads, queries, size), (kv_heads, keys, size), (kv_heads, keys, value_size)
    return Call(make(*q), make(*k), make(*v), tensor, causal)


def in_groups(kernels: Module, dtype: torch.dtype) -> bool:
    """Whether the kernels for warpgroups run: all of sm_90a, and those that stand in for them."""
    return dtype != F and kernels.arch == 90


def panels(size: int) -> int:
    """The features that a head of warpgroups has room for in shared memory."""
    return -(-size // 64) * 64


def forward_tile(dtype: torch.dtype, size: int, groups: bool) -> tuple[int, int, int]:
    """(queries, threads, bytes of shared memory) of a block, as ForwardTile has them."""
    if groups:
        return 128, 256, (128 + 4 * 64) * panels(size) * 2
    wide = dtype == F
    queries, threads = 64 if wide else 128, 256 if not wide and size > 128 else 128
    keys = (16 if size > 128 else 32) if wide else 32 if size > 64 else 64
    return queries, threads, (queries + 2 * keys) * size * dtype.itemsize


def forward(kernels: Module, call: Call, **options: Any) -> tuple[Tensor, Tensor, Stats]:
    """(out, lse, counters) of the forward kernel."""
    q = call.q
    batch, count, queries, _ = q.shape
    out = empty_heads(batch, count, queries, call.v.shape[3], q.dtype)
    lse = torch.empty(batch, count, queries)
    groups = in_groups(kernels, q.dtype)
    size = call.kernel_size(groups)
    rows, threads, shared = forward_tile(q.dtype, size, groups)
    name = find(kernels, "attention_forward", q.dtype, size, groups)
    stats = kernels.launch(
        name, -(-queries // rows) * batch * count, threads, [bytes(call.args(out, lse))],
        shared_bytes=shared, reachable=[*call.inputs(), out, lse],
        uninitialised=[out, lse], **options,
    )  # fmt: skip
    return out, lse, stats


def find(kernels: Module, name: str, dtype: torch.dtype, size: int, groups: bool = False) -> str:
    """The one kernel of this name for these elements and head size."""
    words = (name, NAMES[dtype], f"Li{size}E")
    rest = [kernel for kernel in kernels.kernels if all(word in kernel for word in words)]
    (found,) = [kernel for kernel in rest if ("Lb1E" in kernel) == groups]
    return found


class Backward(ctypes.Structure):
    _fields_ = [("forward", Forward), ("grad_out", Heads)]
    _fields_ += [("grad_q", Heads), ("grad_k", Heads), ("grad_v", Heads), ("delta", P)]
    _fields_ += [("grad_mask", P), *((f"mask_{name}", Int) for name in ("b", "h", "q", "k"))]


@dataclass(frozen=True)
class Tile:
    """Of a kernel: the rows of its blocks, their threads, their bytes of shared memory."""

    own: int
    threads: int
    shared: int


def streamed(dtype: torch.dtype, size: int) -> tuple[int, int]:
    """(rows of a stage, stages) that stream past a block, as BackwardTile has them."""
    wide = dtype == F
    rows = (16 if size > 128 else 32) if wide else 32 if size > 64 else 64
    return rows, 1 if size > (64 if wide else 128) else 2


def queries_tile(dtype: torch.dtype, size: int, groups: bool) -> Tile:
    """Of the kernel of dQ."""
    if groups:
        rows = 32 if size > 128 else 64
        return Tile(128, 256, (2 * 128 + 5 * rows) * panels(size) * 2)
    own = 32 if dtype == F and size > 128 else 64
    rows, stages = streamed(dtype, size)
    return Tile(own, 2 * own, 2 * (own + stages * rows) * size * dtype.itemsize)


def keys_tile(dtype: torch.dtype, size: int, groups: bool) -> Tile:
    """Of the kernel of dK and dV; of wide heads two warps or warpgroups have one each."""
    pair = size > 128
    if groups:
        own = 64 if pair else 128
        exchange = 64 * 64 * 4 if pair else 0
        return Tile(own, 256, (2 * own + 4 * 64) * panels(size) * 2 + 4 * 64 * 4 + exchange)
    own = 32 if pair else 64
    rows, stages = streamed(dtype, size)
    exchange = own * rows * 4 if pair else 0
    shared = 2 * (own + stages * rows) * size * dtype.itemsize + stages * rows * 8
    return Tile(own, 128, shared + exchange)


def backward(
    kernels: Module, call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, **options: Any
) -> tuple[dict[str, Tensor], Stats]:
    """Gradients by name, and the counters of all kernels; delta is among the results."""
    q, k, v = call.q, call.k, call.v
    grads = {name: empty_heads(*t.shape, t.dtype) for name, t in (("q", q), ("k", k), ("v", v))}
    delta = torch.empty_like(lse)
    args = Backward(call.args(out, lse), heads(grad_out), *map(heads, grads.values()))
    args.delta = delta.data_ptr()
    if call.mask is not None and call.mask.is_floating_point():
        grads["mask"] = torch.empty(call.mask.shape, dtype=call.mask.dtype)
        args.grad_mask = grads["mask"].data_ptr()
        for name, size in zip("bhqk", call.mask.shape, strict=True):
            setattr(args, f"mask_{name}", size)
    reachable = [*call.inputs(), grad_out, out, lse, delta, *grads.values()]
    total = Stats()
    for name, grid, threads, shared in _backward_launches(kernels, call, grads.get("mask")):
        made = delta if "dq" in name else None  # the others read it
        fresh = [t for t in (made, *grads.values()) if t is not None]
        total += kernels.launch(
            name, grid, threads, [bytes(args)], shared_bytes=shared, reachable=reachable,
            uninitialised=fresh, **options,
        )  # fmt: skip
    return grads | {"delta": delta}, total


def _backward_launches(
    kernels: Module, call: Call, grad_mask: Tensor | None
) -> list[tuple[str, int, int, int]]:
    """(kernel, blocks, threads, bytes of shared memory) in order."""
    dtype, groups = call.q.dtype, in_groups(kernels, call.q.dtype)
    size = call.kernel_size(groups)
    batch, count, queries, _ = call.q.shape
    kv_heads, keys = call.k.shape[1:3]
    launches = []
    for word, tile, rows, planes in (
        ("dq", queries_tile(dtype, size, groups), queries, batch * count),
        ("dkdv", keys_tile(dtype, size, groups), keys, batch * kv_heads),
    ):
        name = find(kernels, word, dtype, size, groups)
        launches.append((name, -(-rows // tile.own) * planes, tile.threads, tile.shared))
    if grad_mask is not None:
        size = call.kernel_size(False)
        own, stream = queries_tile(dtype, size, False).own, streamed(dtype, size)[0]
        one_query, one_key = grad_mask.shape[2] == 1, grad_mask.shape[3] == 1
        tiles = (1 if one_query else -(-queries // own)) * (1 if one_key else -(-keys // stream))
        name = find(kernels, "mask", dtype, size)
        planes = grad_mask.shape[0] * grad_mask.shape[1]
        launches.append((name, tiles * planes, 2 * own, 2 * (own + stream) * size * dtype.itemsize))
    return launches
