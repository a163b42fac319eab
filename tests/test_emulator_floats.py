"""The emulator's floating-point instructions against numpy, to the last bit."""

import math
from collections.abc import Callable
from fractions import Fraction
from operator import add, mul

import numpy as np
import pytest
import torch

from tests.emulator import Module, library, nvcc
from tests.test_emulator_instructions import (
    SOURCE,
    f32,
    f64,
    inputs,
    run,
    same,
    u8,
    u16,
    u32,
    u64,
)  # fmt: skip

pytestmark = [
    pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not nvcc.available(), reason="needs nvcc"),
]


@pytest.fixture(scope="module")
def module() -> Module:
    return Module(nvcc.compile_ptx(SOURCE))


def directed(function: Callable, mode: str, *arrays: np.ndarray) -> np.ndarray:
    """`function` in exact rationals, rounded to float32 "down" or to "zero"."""

    def one(*row: float) -> np.float32:
        if not all(map(math.isfinite, row)):
            return f32(function(*map(f64, row)))
        exact = function(*map(Fraction, row))
        near = f32(float(exact))
        if not exact:
            return f32(function(*map(f64, row)))
        low = mode == "down" or exact > 0
        if Fraction(float(near)) > exact if math.isfinite(near) else near > 0:
            return np.nextafter(near, f32(-np.inf)) if low else near
        if Fraction(float(near)) < exact if math.isfinite(near) else near < 0:
            return near if low else np.nextafter(near, f32(np.inf))
        return near

    return np.array([one(*map(float, row)) for row in zip(*arrays, strict=True)])


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(f32).tiny, np.copysign(f32(0), x), x)


def tiny_zero(function: Callable) -> Callable:
    return lambda a, b: flushed(function(flushed(a), flushed(b)))


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """One rounding, by exact rational arithmetic."""

    def one(x: float, y: float, z: float) -> float:
        if not all(map(math.isfinite, (x, y, z))):
            return x * y + z
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        return float(exact) if exact else x * y + z

    return np.array([one(*map(float, row)) for row in zip(a, b, c, strict=True)])


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    product = a.astype(np.longdouble) * b.astype(np.longdouble)  # exact
    return (product + c.astype(np.longdouble)).astype(f32)


def lesser(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    zero = (a == 0) & (b == 0)
    return np.where(zero, np.where(np.signbit(a), a, b), np.fmin(a, b))


FLOATS = {  # name: (sources, result, reference)
    "add_f32": ([f32, f32], f32, np.add),
    "add_rz_f32": ([f32, f32], f32, lambda a, b: directed(add, "zero", a, b)),
    "mul_rm_f32": ([f32, f32], f32, lambda a, b: directed(mul, "down", a, b)),
    "mul_ftz_f32": ([f32, f32], f32, tiny_zero(np.multiply)),
    "mul_sat_f32": ([f32, f32], f32, lambda a, b: np.nan_to_num(np.clip(a * b, 0, 1)) + f32(0)),
    "fma_f32": ([f32, f32, f32], f32, fma32),
    "div_f32": ([f32, f32], f32, np.divide),
    "div_full_f32": ([f32, f32], f32, np.divide),
    "min_f32": ([f32, f32], f32, lesser),
    "max_nan_f32": ([f32, f32], f32, lambda a, b: np.maximum(a, b)),
    "copysign_f32": ([f32, f32], f32, lambda a, b: np.copysign(b, a)),
    "sqrt_f32": ([f32], f32, np.sqrt),
    "rcp_f32": ([f32], f32, lambda a: f32(1) / a),
    "rsqrt_f32": ([f32], f32, lambda a: (1 / np.sqrt(a.astype(f64))).astype(f32)),
    "ex2_f32": ([f32], f32, lambda a: np.exp2(a.astype(f64)).astype(f32)),
    "lg2_f32": ([f32], f32, lambda a: np.log2(a.astype(f64)).astype(f32)),
    "sin_f32": ([f32], f32, lambda a: np.sin(a.astype(f64)).astype(f32)),
    "tanh_f32": ([f32], f32, lambda a: np.tanh(a.astype(f64)).astype(f32)),
    "fma_f64": ([f64, f64, f64], f64, fma64),
    "div_f64": ([f64, f64], f64, np.divide),
    "cvt_rni_f32": ([f32], f32, np.rint),
    "cvt_u64_f32": ([u64], f32, lambda a: a.astype(f32)),
    "cvt_rm_f32_f64": ([f64], f32, lambda a: directed(lambda x: x, "down", a)),
    "set_gt": ([f32, f32], u32, lambda a, b: np.where(a > b, 0xFFFFFFFF, 0)),
    "setp_lt": ([f32, f32], u32, np.less),
    "setp_ne": ([f32, f32], u32, lambda a, b: (a < b) | (a > b)),
    "setp_neu": ([f32, f32], u32, np.not_equal),
    "setp_geu": ([f32, f32], u32, lambda a, b: ~(a < b)),
    "setp_num": ([f32, f32], u32, lambda a, b: (a == a) & (b == b)),
    "testp_normal": (
        [f32],
        u32,
        lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(f32).tiny),
    ),
}


@pytest.mark.parametrize("name", FLOATS)
def test_float_instruction(module: Module, name: str) -> None:
    sources, result, reference = FLOATS[name]
    arrays = [inputs(dtype, seed) for seed, dtype in enumerate(sources)]
    with np.errstate(all="ignore"):
        wanted = np.asarray(reference(*arrays)).astype(result)
    same(run(module, name, arrays, result), wanted)


def to_integer(x: float, bits: int, rounded: Callable) -> int:
    if math.isnan(x):
        return 0 if bits == 32 else 1 << 63
    edge = 1 << (bits - 1)
    return -edge if x < -edge else edge - 1 if x >= edge else rounded(x)


def test_floats_to_integers_saturate(module: Module) -> None:
    x = inputs(f32, 0)
    wanted = [to_integer(float(v), 32, math.trunc) % 2**32 for v in x]
    np.testing.assert_array_equal(run(module, "cvt_rzi_s32_f32", [x], u32), wanted)
    d = inputs(f64, 0) * 1e12
    wanted = np.array([to_integer(float(v), 64, math.floor) % 2**64 for v in d], dtype=u64)
    np.testing.assert_array_equal(run(module, "cvt_rmi_s64_f64", [d], u64), wanted)


def to_dtype(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Rounded by torch, as 16-bit integers; nan as the hardware writes it."""
    bits = torch.from_numpy(x.copy()).to(dtype).view(torch.int16).numpy().view(u16)
    return np.where(np.isnan(x), u16(0x7FFF), bits)


def from_bits(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(bits.copy().view(np.int16)).view(dtype).float().numpy()


def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (x & 0xFFFF).astype(u16), (x >> 16).astype(u16)


def test_floats_to_half_types(module: Module) -> None:
    x, y = inputs(f32, 0), inputs(f32, 1)
    bf16 = to_dtype(x, torch.bfloat16)
    np.testing.assert_array_equal(run(module, "cvt_bf16_f32", [x], u16), bf16)
    pair = bf16.astype(u32) << 16 | to_dtype(y, torch.bfloat16)
    np.testing.assert_array_equal(run(module, "cvt_bf16x2", [x, y], u32), pair)
    positive = [np.where(v > 0, v, np.where(v != v, v, f32(0))) for v in (x, y)]
    relu = to_dtype(positive[0], torch.float16).astype(u32) << 16
    relu |= to_dtype(positive[1], torch.float16)
    np.testing.assert_array_equal(run(module, "cvt_relu_f16x2", [x, y], u32), relu)
    cut = from_bits(run(module, "cvt_rz_f16_f32", [x], u16), torch.float16)
    finite = np.isfinite(x)
    assert (np.abs(cut[finite]) <= np.abs(x[finite])).all()
    near = from_bits(to_dtype(x, torch.float16), torch.float16)
    inside = finite & (np.abs(near) <= np.abs(x))
    np.testing.assert_array_equal(cut[inside], near[inside])
    h = inputs(u16, 0)
    same(run(module, "cvt_f32_f16", [h], f32), from_bits(h, torch.float16))


def test_tf32_rounds_to_ten_bits(module: Module) -> None:
    x = inputs(f32, 0)
    x = x[np.isfinite(x) & (np.abs(x) < 1e38)]
    x = np.resize(x, 200)
    x[::2] = (x[::2].view(u32) & 0xFFFFE000 | 0x1000).view(f32)  # halfway: away from zero
    bits = (x.view(u32) + 0x1000) & 0xFFFFE000
    np.testing.assert_array_equal(run(module, "cvt_tf32_f32", [x], u32), bits)


@pytest.mark.parametrize(
    ("name", "dtype", "reference"),
    [
        ("add_f16x2", torch.float16, lambda a, b: a + b),
        ("mul_bf16x2", torch.bfloat16, lambda a, b: a * b),
        ("fma_bf16x2", torch.bfloat16, lambda a, b, c: a * b + c),
        ("max_bf16x2", torch.bfloat16, lambda a, b: -lesser(-a, -b)),
        ("fma_relu_f16x2", torch.float16, lambda a, b, c: relu(a * b + c)),
    ],
)
def test_half_arithmetic(
    module: Module, name: str, dtype: torch.dtype, reference: Callable
) -> None:
    count = reference.__code__.co_argcount
    arrays = [inputs(u32, seed) * u32(2654435761) for seed in range(count)]
    got = halves(run(module, name, arrays, u32))
    for part in range(2):
        values = [from_bits(halves(a)[part], dtype).astype(f64) for a in arrays]
        with np.errstate(all="ignore"):
            exact = reference(*values)
        same(from_bits(got[part], dtype), rounded_once(np.asarray(exact), dtype))


def rounded_once(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 to a half type; torch goes by way of float32, which rounds twice."""
    info = torch.finfo(dtype)
    digits, lowest = round(-math.log2(info.eps)), round(math.log2(info.tiny))
    with np.errstate(all="ignore"):
        exponent = np.maximum(np.frexp(x)[1] - 1, lowest)
        step = np.exp2(exponent - digits)
        near = np.where(np.isfinite(x), np.rint(x / step) * step, x)
    return np.where(np.abs(near) > info.max, np.copysign(np.inf, x), near).astype(f32)


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.where(x != x, x, 0.0))


def test_fp8_conversions(module: Module) -> None:
    x, y = inputs(f32, 0), inputs(f32, 1)

    def encoded(v: np.ndarray) -> np.ndarray:
        t = torch.from_numpy(v.copy()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return np.where(np.isnan(v), 0x7F, t.view(torch.uint8).numpy()).astype(u16)

    got = run(module, "cvt_e4m3x2", [x, y], u16)
    np.testing.assert_array_equal(got, encoded(x) << 8 | encoded(y))
    h = np.arange(200, dtype=u16) | np.arange(200, dtype=u16) << 8
    got = from_bits(halves(run(module, "cvt_f16x2_e4m3x2", [h], u32))[0], torch.float16)
    byte = torch.from_numpy((h & 255).astype(u8)).view(torch.float8_e4m3fn)
    same(got, byte.float().numpy())


def test_perturbed_results_move_by_two_ulps_at_most(module: Module) -> None:
    x = torch.rand(200) + 0.5
    plain, moved = torch.zeros(200), torch.zeros(200)
    module.launch("ex2_f32", 7, 32, [x, plain, 200])
    module.launch("ex2_f32", 7, 32, [x, moved, 200], perturb=True, seed=3)
    steps = (plain.view(torch.int32) - moved.view(torch.int32)).abs()
    assert 0 < steps.max() <= 2


def test_perturbed_results_depend_on_the_operand_only(module: Module) -> None:
    """As on a GPU: lanes that compute the same may store it to the same place."""
    x, moved = torch.full((200,), 0.3), torch.zeros(200)
    module.launch("ex2_f32", 7, 32, [x, moved, 200], perturb=True, seed=3)
    assert len(moved.unique()) == 1
