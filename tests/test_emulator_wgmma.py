"""wgmma of every type, its left operand in registers, as PTX: no nvcc is needed."""

import pytest
import torch

from tests.emulator import Module, library

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler")

# D [64, 8] += A B^T once; rows of A [64, ..] and of B [8, ..] are 32 bytes, whatever the type. The
# places of a lane's registers are those of the PTX ISA's tables; B lies in columns of 16 bytes.
TEXT = """.version 8.6
.target sm_90a
.address_size 64
.visible .entry product(.param .u64 a, .param .u64 b, .param .u64 o) {
  .reg .pred %p; .reg .b32 %t; .reg .b32 %r<12>; .reg .b32 %a<4>; .reg .b32 %d<4>;
  .reg .b64 %rd<6>; .reg .b64 %desc;
  .shared .align 128 .b8 tile[256];
  mov.u32 %t, %tid.x;
  ld.param.u64 %rd0, [a]; ld.param.u64 %rd1, [b]; ld.param.u64 %rd2, [o];
  setp.lt.u32 %p, %t, 64;                              // word t % 8 of row t / 8 of B
  shr.u32 %r0, %t, 3; and.b32 %r1, %t, 7;
  mov.u32 %r2, tile;
  shr.u32 %r3, %r1, 2; mad.lo.u32 %r2, %r3, 128, %r2;
  mad.lo.u32 %r2, %r0, 16, %r2;
  and.b32 %r3, %r1, 3; mad.lo.u32 %r2, %r3, 4, %r2;
  mad.wide.u32 %rd3, %t, 4, %rd1;
  @%p ld.global.b32 %r4, [%rd3];
  @%p st.shared.b32 [%r2], %r4;
  fence.proxy.async.shared::cta;
  bar.sync 0;
  shr.u32 %r0, %t, 5; shl.b32 %r0, %r0, 4;             // first row of the warp
  and.b32 %r1, %t, 31; shr.u32 %r2, %r1, 2; add.u32 %r0, %r0, %r2;
  and.b32 %r1, %r1, 3;
  mad.lo.u32 %r3, %r0, 32, 0; mad.lo.u32 %r3, %r1, 4, %r3;
  mad.wide.u32 %rd3, %r3, 1, %rd0;
  ld.global.b32 %a0, [%rd3]; ld.global.b32 %a1, [%rd3+256];
  ld.global.b32 %a2, [%rd3+16]; ld.global.b32 %a3, [%rd3+272];
  mov.b32 %d0, ONE; mov.b32 %d1, ONE; mov.b32 %d2, ONE; mov.b32 %d3, ONE;
  mov.u32 %r4, tile; shr.u32 %r4, %r4, 4; cvt.u64.u32 %desc, %r4;
  or.b64 %desc, %desc, 0x0000000800080000;             // 128 bytes from one column to the next
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.INSTRUCTION;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  mad.lo.u32 %r3, %r0, ROW, 0; mad.lo.u32 %r3, %r1, PAIR, %r3;
  mad.wide.u32 %rd3, %r3, 1, %rd2;
  STORE
  ret;
}
"""
WIDE = "st.global.v2.b32 [%rd3], {%d0, %d1}; st.global.v2.b32 [%rd3+256], {%d2, %d3};"
NARROW = "st.global.b32 [%rd3], %d0; st.global.b32 [%rd3+128], %d1;"
FOUR, TWO, A = "{%d0, %d1, %d2, %d3}", "{%d0, %d1}", "{%a0, %a1, %a2, %a3}"
FLOAT, HALF = "0x3f800000", "0x3c003c00"  # one, or two
TYPES = {  # what is multiplied: (instruction, one, elements of A and B, of D)
    "bf16": (f"m64n8k16.f32.bf16.bf16 {FOUR}, {A}, %desc, 1, 1, 1, 0", FLOAT, torch.bfloat16),
    "f16": (f"m64n8k16.f32.f16.f16 {FOUR}, {A}, %desc, 1, 1, 1, 0", FLOAT, torch.float16),
    "f16 in f16": (f"m64n8k16.f16.f16.f16 {TWO}, {A}, %desc, 1, 1, 1, 0", HALF, torch.float16),
    "minus f16": (f"m64n8k16.f32.f16.f16 {FOUR}, {A}, %desc, 1, -1, 1, 0", FLOAT, torch.float16),
    "tf32": (f"m64n8k8.f32.tf32.tf32 {FOUR}, {A}, %desc, 1, 1, 1", FLOAT, torch.float32),
    "e4m3": (f"m64n8k32.f32.e4m3.e4m3 {FOUR}, {A}, %desc, 1, 1, 1", FLOAT, torch.float8_e4m3fn),
    "e5m2": (f"m64n8k32.f32.e5m2.e5m2 {FOUR}, {A}, %desc, 1, 1, 1", FLOAT, torch.float8_e5m2),
    "s8": (f"m64n8k32.s32.s8.s8 {FOUR}, {A}, %desc, 1", "1", torch.int8),
    "u8": (f"m64n8k32.s32.u8.u8 {FOUR}, {A}, %desc, 1", "1", torch.uint8),
    "replaced": (f"m64n8k32.s32.s8.s8 {FOUR}, {A}, %desc, 0", "1", torch.int8),
}


@pytest.mark.parametrize("name", TYPES)
def test_wgmma_with_a_in_registers(name: str) -> None:
    instruction, one, dtype = TYPES[name]
    columns, half = 32 // dtype.itemsize, one == HALF
    if dtype.is_floating_point:
        a, b = (torch.randn(n, columns).to(dtype) for n in (64, 8))
    else:
        low = torch.iinfo(dtype).min
        a, b = (torch.randint(low, low + 256, (n, columns), dtype=dtype) for n in (64, 8))
    if name == "tf32":  # the lower bits do not count
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    out = torch.zeros(64, 8, dtype=torch.float16 if half else torch.float32)
    out = out if dtype.is_floating_point else out.int()
    text = TEXT.replace("INSTRUCTION", instruction).replace("ONE", one)
    text = text.replace("STORE", NARROW if half else WIDE)
    text = text.replace("ROW", str(8 * out.itemsize)).replace("PAIR", str(2 * out.itemsize))
    stats = Module(text).launch("product", 1, 128, [a.view(torch.uint8), b.view(torch.uint8), out])
    exact = (a.double() @ b.double().T) * (-1 if "minus" in name else 1) + (name != "replaced")
    bound = 2.0 ** (-10 if half else -22) if dtype.is_floating_point else 0
    assert (out.double() - exact).abs().max() <= bound * exact.abs().max()
    assert stats.mma_flops == 2 * 64 * 8 * columns
