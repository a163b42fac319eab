"""Variants of instructions that the kernels of conformance/ leave out, as PTX, without nvcc."""

import numpy as np
import pytest
import torch

from tests.emulator import Module, library
from tests.test_emulator_instructions import (
    N,
    divided,
    f32,
    f64,
    field,
    i64,
    inputs,
    permuted,
    remainder,
    s32,
    s64,
    same,
    signed,
    u8,
    u16,
    u32,
    u64,
    wide,
)  # fmt: skip

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler")
HEADER = ".version 8.6\n.target sm_90a\n.address_size 64\n"
KINDS = {u16: "b16", u32: "b32", u64: "b64", f32: "f32", f64: "f64"}


def kernel(body: str, sources: list[type], result: type) -> str:
    """`body` with %0 for the result and %1 on for the sources, a thread for each element."""
    text, names = "", []
    for k, kind in enumerate([result, *sources]):
        register, size = KINDS[kind], np.dtype(kind).itemsize
        text += f".reg .{register} %v{k};\n.reg .b64 %at{k};\nld.param.u64 %at{k}, [p{k}];\n"
        text += f"mad.wide.u32 %at{k}, %t, {size}, %at{k};\n"
        text += f"ld.global.{register} %v{k}, [%at{k}];\n" if k else ""
        names.append((f"%{k}", f"%v{k}"))
    for name, register in names:
        body = body.replace(name + ";", register + ";").replace(name + ",", register + ",")
        body = body.replace("[" + name + "]", "[%at" + name[1:] + "]")
    params = ", ".join(f".param .u64 p{k}" for k in range(len(sources) + 1))
    return f"""{HEADER}.visible .entry k({params}) {{
.reg .b32 %t; .reg .b32 %c; .reg .b32 %n; .reg .pred %p;
mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x; mov.u32 %n, %ntid.x;
mad.lo.u32 %t, %c, %n, %t;
{text}{body}
st.global.{KINDS[result]} [%at0], %v0;
ret;
}}
"""


def run(body: str, arrays: list[np.ndarray], result: type) -> np.ndarray:
    out = torch.zeros(N * np.dtype(result).itemsize, dtype=torch.uint8)
    tensors = [torch.from_numpy(a.copy().view(u8)) for a in arrays]
    text = kernel(body, [a.dtype.type for a in arrays], result)
    Module(text).launch("k", N // 40, 40, [out, *tensors])
    return out.numpy().view(result)


def mask(pos: int, length: int) -> int:
    return (1 << length) - 1 << pos if pos < 32 else 0


def insert64(a: int, b: int, pos: int, length: int) -> int:
    cover = (1 << length) - 1 << pos
    return b & ~cover | a << pos & cover


FIELDS = "{{ .reg .u32 p, l; and.b32 p, {0}, 63; shr.u32 l, {0}, 8; and.b32 l, l, 63; {1} p, l; }}"
MODES = {  # of prmt, by the PTX ISA's table
    "f4e": [0x3210, 0x4321, 0x5432, 0x6543],
    "rc8": [0x0000, 0x1111, 0x2222, 0x3333],
    "ecl": [0x3210, 0x3211, 0x3222, 0x3333],
    "ecr": [0x0000, 0x1110, 0x2210, 0x3210],
    "rc16": [0x1010, 0x3232, 0x1010, 0x3232],
}
INTEGERS = {  # body: (types of the sources, type of the result, reference modulo its size)
    **{
        f"prmt.b32.{mode} %0, %1, %2, %3;": (
            [u32, u32, u32],
            u32,
            wide(lambda a, b, c, t=table: permuted(a, b, t[c & 3])),
        )
        for mode, table in MODES.items()
    },
    "bmsk.clamp.b32 %0, %1, %2;": ([u32, u32], u32, wide(lambda p, n: mask(p, min(n, 32)))),
    "bmsk.wrap.b32 %0, %1, %2;": ([u32, u32], u32, wide(lambda p, n: mask(p & 31, n & 31))),
    "brev.b64 %0, %1;": ([u64], u64, wide(lambda a: int(f"{a:064b}"[::-1], 2))),
    "clz.b64 %0, %1;": ([u64], u32, wide(lambda a: 64 - a.bit_length())),
    "popc.b32 %0, %1;": ([u32], u32, wide(lambda a: a.bit_count())),
    "bfind.u64 %0, %1;": ([u64], u32, wide(lambda a: a.bit_length() - 1)),
    "bfind.shiftamt.u32 %0, %1;": (
        [u32],
        u32,
        wide(lambda a: 32 - a.bit_length() if a else 0xFFFFFFFF),
    ),
    "not.b64 %0, %1;": ([u64], u64, wide(lambda a: ~a)),
    "cnot.b32 %0, %1;": ([u32], u32, wide(lambda a: a == 0)),
    "xor.b64 %0, %1, %2;": ([u64, u64], u64, wide(lambda a, b: a ^ b)),
    "or.b16 %0, %1, %2;": ([u16, u16], u16, wide(lambda a, b: a | b)),
    "shl.b64 %0, %1, %2;": ([u64, u32], u64, wide(lambda a, b: a << b if b < 64 else 0)),
    "shr.s64 %0, %1, %2;": ([u64, u32], u64, wide(lambda a, b: signed(a, 64) >> min(b, 63))),
    "shr.u16 %0, %1, %2;": ([u16, u32], u16, wide(lambda a, b: a >> min(b, 16))),
    "shf.l.clamp.b32 %0, %1, %2, %3;": (
        [u32, u32, u32],
        u32,
        wide(lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32),
    ),
    "shf.r.wrap.b32 %0, %1, %2, %3;": (
        [u32, u32, u32],
        u32,
        wide(lambda a, b, c: (b << 32 | a) >> (c & 31)),
    ),
    FIELDS.format("%2", "bfe.u32 %0, %1,"): (
        [u32, u32],
        u32,
        wide(lambda a, c: field(a, c & 63, c >> 8 & 63, 32, False)),
    ),
    FIELDS.format("%2", "bfe.s64 %0, %1,"): (
        [u64, u32],
        u64,
        wide(lambda a, c: field(a, c & 63, c >> 8 & 63, 64, True)),
    ),
    FIELDS.format("%3", "bfi.b64 %0, %1, %2,"): (
        [u64, u64, u32],
        u64,
        wide(lambda a, b, c: insert64(a, b, c & 63, c >> 8 & 63)),
    ),
    "mul.wide.u16 %0, %1, %2;": ([u16, u16], u32, wide(lambda a, b: a * b)),
    "mul.hi.u64 %0, %1, %2;": ([u64, u64], u64, wide(lambda a, b: a * b >> 64)),
    "sad.u32 %0, %1, %2, %3;": ([u32] * 3, u32, wide(lambda a, b, c: c + abs(a - b))),
    "div.u32 %0, %1, %2;": ([u32, u32], u32, wide(lambda a, b: divided(a, b, 32))),
    "rem.u32 %0, %1, %2;": ([u32, u32], u32, wide(lambda a, b: remainder(a, b, 32))),
    "div.s64 %0, %1, %2;": ([u64, u64], u64, s64(lambda a, b: divided(a, b, 64))),
    "min.s64 %0, %1, %2;": ([u64, u64], u64, s64(min)),
    "max.u64 %0, %1, %2;": ([u64, u64], u64, wide(max)),
    "min.u16 %0, %1, %2;": ([u16, u16], u16, wide(min)),
    "abs.s64 %0, %1;": ([u64], u64, s64(abs)),
    "neg.s32 %0, %1;": ([u32], u32, s32(lambda a: -a)),
    "cvt.sat.s8.s32 %0, %1;": ([u32], u32, s32(lambda a: max(-128, min(127, a)))),
    "cvt.u16.u32 %0, %1;": ([u32], u16, wide(lambda a: a)),
    "cvt.s64.s32 %0, %1;": ([u32], u64, s32(lambda a: a)),
    # each element by itself: what memory holds afterwards
    **{
        f"st.global.b{bits} [%0], %1; atom.global.{op}.{kind}{bits} %1, [%0], %2;"
        f" ld.global.b{bits} %0, [%0];": ([size] * 2, size, function)
        for bits, size, over in ((32, u32, s32), (64, u64, s64))
        for op, kind, function in (
            ("add", "u", wide(lambda a, b: a + b)),
            ("min", "s", over(min)),
            ("max", "u", wide(max)),
            ("and", "b", wide(lambda a, b: a & b)),
            ("or", "b", wide(lambda a, b: a | b)),
            ("xor", "b", wide(lambda a, b: a ^ b)),
            ("exch", "b", wide(lambda a, b: b)),
        )
    },
}


@pytest.mark.parametrize("body", INTEGERS)
def test_integer_variant(body: str) -> None:
    sources, result, reference = INTEGERS[body]
    arrays = [inputs(dtype, seed) for seed, dtype in enumerate(sources)]
    bits = np.dtype(result).itemsize * 8
    wanted = np.array([int(x) % (1 << bits) for x in reference(*arrays)], dtype=result)
    np.testing.assert_array_equal(run(body, arrays, result), wanted)


def whole(x: np.ndarray, low: float, high: float, rounded: np.ufunc) -> np.ndarray:
    return np.clip(np.nan_to_num(rounded(x.astype(f64)), nan=0.0), low, high)


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "nan": lambda a, b: (a != a) | (b != b),
}
FLOATS = {  # body: (sources, result, reference)
    **{
        f"setp.{name}.f32 %p, %1, %2; selp.u32 %0, 1, 0, %p;": ([f32, f32], u32, function)
        for name, function in COMPARISONS.items()
    },
    "sub.rn.f64 %0, %1, %2;": ([f64, f64], f64, np.subtract),
    "rcp.rn.f64 %0, %1;": ([f64], f64, lambda a: 1 / a),
    "sqrt.rn.f64 %0, %1;": ([f64], f64, np.sqrt),
    "cos.approx.f32 %0, %1;": ([f32], f32, lambda a: np.cos(a.astype(f64)).astype(f32)),
    "neg.f32 %0, %1;": ([f32], f32, np.negative),
    "abs.f64 %0, %1;": ([f64], f64, np.abs),
    "cvt.rn.f32.s32 %0, %1;": ([u32], f32, lambda a: a.view(np.int32).astype(f32)),
    "cvt.rn.f64.u64 %0, %1;": ([u64], f64, lambda a: a.astype(f64)),
    "cvt.rn.f32.s64 %0, %1;": ([u64], f32, lambda a: a.view(i64).astype(f32)),
    "cvt.f64.f32 %0, %1;": ([f32], f64, lambda a: a.astype(f64)),
    "cvt.rpi.f32.f32 %0, %1;": ([f32], f32, np.ceil),
    "cvt.rpi.s32.f32 %0, %1;": ([f32], u32, lambda a: whole(a, -(2**31), 2**31 - 1, np.ceil)),
    "cvt.rzi.u32.f32 %0, %1;": ([f32], u32, lambda a: whole(a, 0, 2**32 - 1, np.trunc)),
    "cvt.rni.u32.f64 %0, %1;": ([f64], u32, lambda a: whole(a, 0, 2**32 - 1, np.rint)),
}


@pytest.mark.parametrize("body", FLOATS)
def test_float_variant(body: str) -> None:
    sources, result, reference = FLOATS[body]
    arrays = [inputs(dtype, seed) for seed, dtype in enumerate(sources)]
    with np.errstate(all="ignore"):
        wanted = np.asarray(reference(*arrays))
        if result == u32:
            wanted = wanted.astype(i64)
    got = run(body, arrays, result)
    if body.startswith("cvt.rni.u32.f64"):  # nan of a wide type: PTX sets the highest bit
        got = np.where(np.isnan(arrays[0]), 0, got)
    same(got, wanted.astype(result))


REDUX = {"and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "min.u32": np.minimum}
REDUX |= {"max.s32": np.maximum}


@pytest.mark.parametrize("op", REDUX)
def test_redux(op: str) -> None:
    a = torch.randint(-(2**31), 2**31 - 1, (32,), dtype=torch.int32)
    text = kernel(f"redux.sync.{op} %0, %1, 0xffffffff;", [u32], u32)
    out = torch.zeros(32, dtype=torch.int32)
    Module(text).launch("k", 1, 32, [out, a])
    values = a.numpy() if op == "max.s32" else a.numpy().view(u32)
    assert (out.numpy().view(values.dtype) == REDUX[op].reduce(values)).all()


@pytest.mark.parametrize("different", [0, 1])
def test_lanes_agree(different: int) -> None:
    """match.all and vote.uni."""
    a, o = torch.full((32,), 7, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    a[5] += different
    body = "match.all.sync.b32 %0|%p, %1, 0xffffffff; @!%p add.u32 %0, %0, 5;"
    Module(kernel(body.replace("%0|", "%v0|"), [u32], u32)).launch("k", 1, 32, [o, a])
    assert o.tolist() == [5 if different else -1] * 32
    body = "setp.eq.u32 %p, %1, 7; vote.sync.uni.pred %p, %p, 0xffffffff; selp.u32 %0, 1, 0, %p;"
    Module(kernel(body, [u32], u32)).launch("k", 1, 32, [o, a])
    assert o.tolist() == [1 - different] * 32


REDUCE = (
    HEADER
    + """.visible .entry reduce(.param .u64 x, .param .u64 o) {
  .reg .pred %p; .reg .b32 %t; .reg .b32 %s; .reg .b32 %v; .reg .b64 %a; .reg .b64 %o;
  .shared .align 128 .b8 tile[128];
  mov.u32 %t, %tid.x; ld.param.u64 %a, [x]; ld.param.u64 %o, [o];
  mad.wide.u32 %a, %t, 4, %a;
  ld.global.b32 %v, [%a];
  mov.u32 %s, tile; mad.lo.u32 %s, %t, 4, %s;
  st.shared.b32 [%s], %v;
  fence.proxy.async.shared::cta;
  bar.sync 0;
  setp.eq.u32 %p, %t, 0;
  mov.u32 %s, tile;
  @%p cp.reduce.async.bulk.global.shared::cta.bulk_group.OP [%o], [%s], 128;
  @%p cp.async.bulk.commit_group;
  @%p cp.async.bulk.wait_group 0;
  ret;
}
"""
)


@pytest.mark.parametrize(
    ("op", "dtype", "function"),
    [
        ("add.u32", torch.int32, torch.add),
        ("min.s32", torch.int32, torch.minimum),
        ("and.b32", torch.int32, torch.bitwise_and),
        ("or.b32", torch.int32, torch.bitwise_or),
        ("xor.b32", torch.int32, torch.bitwise_xor),
        ("add.u64", torch.int64, torch.add),
        ("max.s64", torch.int64, torch.maximum),
        ("add.f32", torch.float32, torch.add),
        ("add.noftz.f16", torch.float16, torch.add),
        ("max.bf16", torch.bfloat16, torch.maximum),
    ],
)
def test_bulk_reduction(op: str, dtype: torch.dtype, function) -> None:
    n = 128 // dtype.itemsize
    if dtype.is_floating_point:
        x, o = torch.randn(2, n).to(dtype)
    else:
        x, o = torch.randint(-(2**30), 2**30, (2, n), dtype=dtype)
    wanted = function(x, o)
    Module(REDUCE.replace("OP", op)).launch("reduce", 1, 32, [x, o])
    assert torch.equal(o, wanted)
