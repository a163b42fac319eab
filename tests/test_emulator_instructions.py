"""The emulator's arithmetic, one kernel an instruction, against numpy and the PTX ISA's tables."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulator import Module, library, nvcc

pytestmark = [
    pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not nvcc.available(), reason="needs nvcc"),
]
SOURCE = Path(__file__).parent / "emulator/conformance/kernels.cu"
N = 200
u32, i32, u64, i64 = np.uint32, np.int32, np.uint64, np.int64
f32, f64, f16, u16, u8, i8 = np.float32, np.float64, np.float16, np.uint16, np.uint8, np.int8
EDGES = [0, 1, 2, 5, 31, 32, 33, 63, 64, 255, 0x7FFF, 0x7FFFFFFF, 0x80000000, 2**32 - 2, 2**32 - 1]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.5, 1e-40, -1e-42, 1e38, -3e38, np.inf, -np.inf, np.nan]


@pytest.fixture(scope="module")
def module() -> Module:
    return Module(nvcc.compile_ptx(SOURCE))


def inputs(dtype: type, seed: int) -> np.ndarray:
    """Random numbers of all sizes, and the awkward ones."""
    rng = np.random.default_rng(seed)
    if dtype in (f32, f64):
        x = rng.standard_normal(N) * 10.0 ** rng.integers(-6, 7, N)
        x[: len(FLOATS)] = FLOATS
        return rng.permutation(x.astype(dtype))
    bits = np.dtype(dtype).itemsize * 8
    x = rng.integers(0, 1 << 64, N, dtype=u64) >> rng.integers(64 - bits, 64, N).astype(u64)
    x[: len(EDGES)] = EDGES
    x[20] = (1 << bits) - 1
    x[21] = 1 << (bits - 1)
    return rng.permutation(x.astype(dtype))


def run(module: Module, name: str, arrays: list[np.ndarray], result: type) -> np.ndarray:
    out = torch.zeros(N * np.dtype(result).itemsize, dtype=torch.uint8)
    tensors = [torch.from_numpy(a.copy().view(u8)) for a in arrays]
    module.launch(name, 7, 32, [*tensors, out, N])
    return out.numpy().view(result)


def same(got: np.ndarray, wanted: np.ndarray) -> None:
    """Equal bits; any nan is as good as another."""
    if got.dtype.kind == "f":
        np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
        number = ~np.isnan(wanted)
        got, wanted = got[number], wanted[number]
        np.testing.assert_array_equal(np.signbit(got), np.signbit(wanted))
    np.testing.assert_array_equal(got, wanted)


def wide(function: Callable) -> Callable:
    """Element by element in Python's unbounded integers."""
    return lambda *arrays: [function(*map(int, row)) for row in zip(*arrays, strict=True)]


def signed(x: int, bits: int = 32) -> int:
    return (x + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))


def divided(a: int, b: int, bits: int) -> int:
    """Towards zero; by zero gives all ones."""
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a: int, b: int, bits: int) -> int:
    return a if b == 0 else a - divided(a, b, bits) * b


def funnel(hi: int, lo: int) -> int:
    return hi << 32 | lo


def field(x: int, pos: int, length: int, bits: int, sign: bool) -> int:
    """bfe: beyond the top come copies of the sign bit, or zeros."""
    if length == 0:
        return 0
    top = x >> min(pos + length - 1, bits - 1) & 1 if sign else 0
    got = [(x >> k & 1) if k < bits and k < pos + length else top for k in range(pos, pos + bits)]
    return sum(bit << k for k, bit in enumerate(got))


def insert(a: int, b: int, pos: int, length: int) -> int:
    mask = ((1 << length) - 1) << pos & 0xFFFFFFFF if pos < 32 else 0
    return b & ~mask | a << pos & mask


def permuted(a: int, b: int, control: int) -> int:
    both, out = b << 32 | a, 0
    for k in range(4):
        pick = control >> 4 * k & 15
        byte = both >> 8 * (pick & 7) & 255
        out |= ((255 if byte & 128 else 0) if pick & 8 else byte) << 8 * k
    return out


def dot4(a: int, b: int, c: int) -> int:
    return c + sum(signed(a >> 8 * k, 8) * signed(b >> 8 * k, 8) for k in range(4))


def s32(function: Callable) -> Callable:
    return wide(lambda *row: function(*(signed(x) for x in row)))


def s64(function: Callable) -> Callable:
    return wide(lambda *row: function(*(signed(x, 64) for x in row)))


INTEGERS = {  # name: (types of the sources, type of the result, reference modulo its size)
    "add_u32": ([u32, u32], u32, wide(lambda a, b: a + b)),
    "sub_s32": ([u32, u32], u32, wide(lambda a, b: a - b)),
    "mul_lo_s32": ([u32, u32], u32, wide(lambda a, b: a * b)),
    "mul_hi_u32": ([u32, u32], u32, wide(lambda a, b: a * b >> 32)),
    "mul_hi_s32": ([u32, u32], u32, s32(lambda a, b: a * b >> 32)),
    "mul_hi_s64": ([u64, u64], u64, s64(lambda a, b: a * b >> 64)),
    "mul_lo_u64": ([u64, u64], u64, wide(lambda a, b: a * b)),
    "mul_wide_s32": ([u32, u32], u64, s32(lambda a, b: a * b)),
    "mad_lo_u32": ([u32, u32, u32], u32, wide(lambda a, b, c: a * b + c)),
    "mad_hi_s32": ([u32, u32, u32], u32, s32(lambda a, b, c: (a * b >> 32) + c)),
    "mad_wide_u32": ([u32, u32, u64], u64, wide(lambda a, b, c: a * b + c)),
    "div_s32": ([u32, u32], u32, s32(lambda a, b: divided(a, b, 32))),
    "rem_s32": ([u32, u32], u32, s32(lambda a, b: remainder(a, b, 32))),
    "div_u64": ([u64, u64], u64, wide(lambda a, b: divided(a, b, 64))),
    "rem_s64": ([u64, u64], u64, s64(lambda a, b: remainder(a, b, 64))),
    "min_s32": ([u32, u32], u32, s32(min)),
    "max_u32": ([u32, u32], u32, wide(max)),
    "add_sat_s32": ([u32, u32], u32, s32(lambda a, b: max(-(2**31), min(2**31 - 1, a + b)))),
    "sad_s32": ([u32, u32, u32], u32, s32(lambda a, b, c: c + abs(a - b))),
    "dp4a_s32": ([u32, u32, u32], u32, wide(dot4)),
    "abs_s32": ([u32], u32, s32(abs)),
    "neg_s64": ([u64], u64, wide(lambda a: -a)),
    "add_with_carry": ([u64, u64], u64, wide(lambda a, b: a + b)),
    "sub_with_borrow": ([u64, u64], u64, wide(lambda a, b: a - b)),
    "shl_b32": ([u32, u32], u32, wide(lambda a, b: a << b if b < 32 else 0)),
    "shr_s32": ([u32, u32], u32, wide(lambda a, b: signed(a) >> min(b, 31))),
    "shr_u64": ([u64, u64, u32], u64, wide(lambda a, b, c: a >> c if c < 64 else 0)),
    "shf_l_wrap": (
        [u32, u32, u32],
        u32,
        wide(lambda a, b, c: (funnel(b, a) << (c & 31)) >> 32),
    ),
    "shf_r_clamp": ([u32, u32, u32], u32, wide(lambda a, b, c: funnel(b, a) >> min(c, 32))),
    "lop3_majority": ([u32, u32, u32], u32, wide(lambda a, b, c: a & b | a & c | b & c)),
    "prmt_b32": ([u32, u32, u32], u32, wide(permuted)),
    "prmt_b4e": (
        [u32, u32, u32],
        u32,
        wide(lambda a, b, c: permuted(a, b, [0x5670, 0x6701, 0x7012, 0x0123][c & 3])),
    ),
    "bfe_s32": ([u32, u32, u32], u32, wide(lambda a, p, n: field(a, p & 63, n & 63, 32, True))),
    "bfe_u64": (
        [u64, u64, u32],
        u64,
        wide(lambda a, b, c: field(a, c & 63, c >> 8 & 63, 64, False)),
    ),
    "bfi_b32": ([u32, u32, u32], u32, wide(lambda a, b, c: insert(a, b, c & 63, c >> 8 & 63))),
    "popc_b64": ([u64], u32, wide(lambda a: a.bit_count())),
    "clz_b32": ([u32], u32, wide(lambda a: 32 - a.bit_length())),
    "brev_b32": ([u32], u32, wide(lambda a: int(f"{a:032b}"[::-1], 2))),
    "bfind_s32": ([u32], u32, s32(lambda a: (a if a >= 0 else ~a).bit_length() - 1)),
    "cvt_s8_s32": ([u32], u32, wide(lambda a: signed(a, 8))),
    "cvt_sat_u8_s32": ([u32], u32, s32(lambda a: max(0, min(255, a)))),
    "setp_hi_u32": ([u32, u32], u32, wide(lambda a, b: a > b)),
    "setp_and": (
        [u32, u32],
        u32,
        s32(lambda a, b: 2 * (a < b and b != 0) + (a >= b and b != 0)),
    ),
    "slct_s32": ([u32, u32, u32], u32, wide(lambda a, b, c: a if signed(c) >= 0 else b)),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_instruction(module: Module, name: str) -> None:
    sources, result, reference = INTEGERS[name]
    arrays = [inputs(dtype, seed) for seed, dtype in enumerate(sources)]
    bits = np.dtype(result).itemsize * 8
    wanted = np.array([int(x) % (1 << bits) for x in reference(*arrays)], dtype=result)
    np.testing.assert_array_equal(run(module, name, arrays, result), wanted)
