"""The vector functions of csrc/cpu/metal on every instruction set: errors in ulp, conversions."""

import ctypes
import hashlib
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pyfast import backend, build

PROBE = Path(__file__).parent / "vecmath_probe.cpp"
CACHE = Path(__file__).parent.parent / "build" / "vecmath_probe"
ISAS = [isa for isa in build.isas() if isa not in build.BF16_LEVELS]  # their vectors: avx512's

# Truth in float64, the largest error allowed in ulp, and the arguments it holds for.
FUNCTIONS = {
    "exp": (np.exp, 2.0, (-87.3, math.inf)),
    "tanh": (np.tanh, 4.0, (-math.inf, math.inf)),
    "erf": (lambda x: torch.erf(torch.from_numpy(x)).numpy(), 4.0, (-math.inf, math.inf)),
    # Below, e^-x overflows and 1 / (1 + e^-x) is 0, as torch's is: the truth is a subnormal number.
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 4.0, (-88.5, math.inf)),
    "log1p_unit": (np.log1p, 4.0, (0.0, 1.0)),
    "log_from_one": (np.log, 3.0, (1.0, np.finfo(np.float32).max)),
    "sqrt": (np.sqrt, 0.5, (0.0, math.inf)),
}
AT_LIMITS = {  # f(-inf), f(inf)
    "exp": (0.0, math.inf),
    "tanh": (-1.0, 1.0),
    "erf": (-1.0, 1.0),
    "sigmoid": (0.0, 1.0),
}


@pytest.fixture(scope="module", params=ISAS)
def probe(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The probe compiled for one instruction set, kept from run to run."""
    isa = request.param
    extension = backend.extension()
    if extension is not None and isa not in extension.supported_isas():
        pytest.skip(f"this processor has no {isa}")
    return ctypes.CDLL(str(compile_probe(isa)))


def compile_probe(isa: str) -> Path:
    flags = [*build.CXX_FLAGS, *build.ISA_FLAGS[isa], f"-DPYFAST_ISA={isa}"]
    flags += ["-fvisibility=default", "-w"]  # GCC 12 warns of its own intrinsics
    sources = [PROBE, *sorted((build.source_dir() / "cpu").rglob("*.h"))]
    content = repr(flags).encode() + b"".join(path.read_bytes() for path in sources)
    library = CACHE / f"{isa}.{hashlib.sha256(content).hexdigest()[:16]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with build.locked(CACHE / f"{isa}.lock"):  # two processes of the tests may want it
        if not library.exists():
            for old in CACHE.glob(f"{isa}.*.so"):
                old.unlink(missing_ok=True)
            fresh = library.with_suffix(".tmp")
            include = f"-I{build.source_dir() / 'cpu'}"
            subprocess.run(
                ["c++", *flags, include, "-shared", str(PROBE), "-o", str(fresh)], check=True
            )
            fresh.replace(library)
    return library


def call(function: Callable, x: np.ndarray, out_dtype: type) -> np.ndarray:
    y = np.empty(x.shape, out_dtype)
    function(
        x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(x.size)
    )
    return y


def floats(low: float, high: float) -> np.ndarray:
    """Of every exponent and sign 4099 floats, subnormals included, in [low, high]."""
    mantissas = np.linspace(0, 2**23 - 1, 4099).astype(np.uint32)
    positive = (np.arange(255, dtype=np.uint32)[:, None] << 23 | mantissas).reshape(-1)
    x = np.concatenate([positive, positive | np.uint32(1 << 31)]).view(np.float32)
    return x[(x >= low) & (x <= high)]


def ulps(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|got - truth| in units of the spacing of float32 at the truth."""
    largest = np.finfo(np.float32).max
    rounded = truth.astype(np.float32)
    spacing = np.spacing(np.clip(np.abs(rounded), 0, largest)).astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64) - truth) / spacing
    overflow = np.isinf(rounded)
    return np.where(overflow, np.where(got == rounded, 0, np.inf), error)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vecmath_stays_within_its_error_bound(probe: ctypes.CDLL, name: str) -> None:
    truth_of, bound, (low, high) = FUNCTIONS[name]
    x = floats(low, high)
    got = call(getattr(probe, f"probe_{name}"), x, np.float32)
    with np.errstate(over="ignore", under="ignore"):
        truth = truth_of(x.astype(np.float64))
        error = ulps(got, truth)
    worst = int(np.argmax(error))
    assert error[worst] <= bound, f"{name}({x[worst]!r}) = {got[worst]!r}, not {truth[worst]!r}"


@pytest.mark.parametrize("name", AT_LIMITS)
def test_vecmath_is_right_at_infinity_and_nan(probe: ctypes.CDLL, name: str) -> None:
    x = np.array([-math.inf, math.inf, math.nan] * 7, np.float32)  # whole vectors and a tail
    got = call(getattr(probe, f"probe_{name}"), x, np.float32).reshape(7, 3)
    assert (got[:, :2] == AT_LIMITS[name]).all() and np.isnan(got[:, 2]).all()


@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_vecmath_keeps_odd_functions_odd(probe: ctypes.CDLL, name: str) -> None:
    x = floats(np.finfo(np.float32).smallest_subnormal, math.inf)
    function = getattr(probe, f"probe_{name}")
    got, mirrored = call(function, x, np.float32), call(function, -x, np.float32)
    assert (got.view(np.uint32) ^ mirrored.view(np.uint32) == 1 << 31).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_vec_widens_every_16_bit_number(probe: ctypes.CDLL, dtype: torch.dtype) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    got = call(getattr(probe, f"widen_{short(dtype)}"), bits, np.float32)
    truth = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    assert (
        (got.view(np.uint32) == truth.view(np.uint32)) | (np.isnan(got) & np.isnan(truth))
    ).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_vec_rounds_to_nearest_even(probe: ctypes.CDLL, dtype: torch.dtype) -> None:
    x = numbers_near_ties(dtype)
    got = call(getattr(probe, f"narrow_{short(dtype)}"), x, np.uint16)
    truth = torch.from_numpy(x).to(dtype)
    same = got == truth.view(torch.int16).numpy().view(np.uint16)
    nan = torch.from_numpy(got.view(np.int16)).view(dtype).isnan().numpy()
    assert (nan == np.isnan(x)).all()
    wrong = np.flatnonzero(~same & ~nan)
    assert not wrong.size, f"{x[wrong[0]]!r} became {int(got[wrong[0]]):#06x}"


def numbers_near_ties(dtype: torch.dtype) -> np.ndarray:
    """Each 16-bit number, the midpoint to the next one, their neighbours, and many others."""
    every = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype).float().numpy()
    finite = every[np.isfinite(every)].astype(np.float64)
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    points = np.concatenate([every, middle, floats(-math.inf, math.inf)[::7]])
    with np.errstate(over="ignore", invalid="ignore"):
        points = np.concatenate(
            [points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))]
        )
    return np.concatenate([points, -points]).astype(np.float32)


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]


def test_exp_to_one_loses_digits_only_as_it_falls(probe: ctypes.CDLL) -> None:
    x = floats(-87.3, 0.0)
    error = ulps(call(probe.probe_exp_to_one, x, np.float32), np.exp(x.astype(np.float64)))
    assert (error <= 2.5 + 1.2 * np.abs(x)).all()  # a fused multiply-add loses less
    ends = np.array([0.0, -math.inf, math.nan], np.float32)
    one, zero, nan = call(probe.probe_exp_to_one, ends, np.float32)
    assert one == 1 and zero == 0 and np.isnan(nan)


@pytest.mark.parametrize("name", ["exp", "exp_to_one"])
def test_exp_makes_no_subnormal_numbers(probe: ctypes.CDLL, name: str) -> None:
    """They cost the processor some 150 cycles each; masked scores and lost classes make many."""
    x = np.linspace(-110, -87.31, 999, dtype=np.float32)
    assert not call(getattr(probe, f"probe_{name}"), x, np.float32).any()
