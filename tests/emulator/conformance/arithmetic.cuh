// One kernel an instruction: o[i] = instruction(a[i], b[i], c[i]).
#pragma once
#include <cstdint>

#define INDEX                                        \
    const int i = blockIdx.x * blockDim.x + threadIdx.x; \
    if (i >= n) return

#define UNARY(NAME, TO, CO, FROM, CF, PTX)                                  \
    extern "C" __global__ void NAME(const FROM* a, TO* o, int n) {          \
        INDEX;                                                              \
        TO r;                                                               \
        asm volatile(PTX : "=" CO(r) : CF(a[i]));                           \
        o[i] = r;                                                           \
    }

#define BINARY(NAME, TO, CO, FROM, CF, PTX)                                 \
    extern "C" __global__ void NAME(const FROM* a, const FROM* b, TO* o, int n) { \
        INDEX;                                                              \
        TO r;                                                               \
        asm volatile(PTX : "=" CO(r) : CF(a[i]), CF(b[i]));                 \
        o[i] = r;                                                           \
    }

#define TERNARY(NAME, TO, CO, FROM, CF, LAST, CL, PTX)                      \
    extern "C" __global__ void NAME(const FROM* a, const FROM* b, const LAST* c, TO* o, int n) { \
        INDEX;                                                              \
        TO r;                                                               \
        asm volatile(PTX : "=" CO(r) : CF(a[i]), CF(b[i]), CL(c[i]));       \
        o[i] = r;                                                           \
    }

#define U32_2(NAME, PTX) BINARY(NAME, uint32_t, "r", uint32_t, "r", PTX)
#define U64_2(NAME, PTX) BINARY(NAME, uint64_t, "l", uint64_t, "l", PTX)
#define U32_3(NAME, PTX) TERNARY(NAME, uint32_t, "r", uint32_t, "r", uint32_t, "r", PTX)
#define F32_1(NAME, PTX) UNARY(NAME, float, "f", float, "f", PTX)
#define F32_2(NAME, PTX) BINARY(NAME, float, "f", float, "f", PTX)
#define F32_3(NAME, PTX) TERNARY(NAME, float, "f", float, "f", float, "f", PTX)

// integers
U32_2(add_u32, "add.u32 %0, %1, %2;")
U32_2(sub_s32, "sub.s32 %0, %1, %2;")
U32_2(mul_lo_s32, "mul.lo.s32 %0, %1, %2;")
U32_2(mul_hi_u32, "mul.hi.u32 %0, %1, %2;")
U32_2(mul_hi_s32, "mul.hi.s32 %0, %1, %2;")
U64_2(mul_hi_s64, "mul.hi.s64 %0, %1, %2;")
U64_2(mul_lo_u64, "mul.lo.u64 %0, %1, %2;")
BINARY(mul_wide_s32, uint64_t, "l", uint32_t, "r", "mul.wide.s32 %0, %1, %2;")
U32_3(mad_lo_u32, "mad.lo.u32 %0, %1, %2, %3;")
U32_3(mad_hi_s32, "mad.hi.s32 %0, %1, %2, %3;")
TERNARY(mad_wide_u32, uint64_t, "l", uint32_t, "r", uint64_t, "l", "mad.wide.u32 %0, %1, %2, %3;")
U32_2(div_s32, "div.s32 %0, %1, %2;")
U32_2(rem_s32, "rem.s32 %0, %1, %2;")
U64_2(div_u64, "div.u64 %0, %1, %2;")
U64_2(rem_s64, "rem.s64 %0, %1, %2;")
U32_2(min_s32, "min.s32 %0, %1, %2;")
U32_2(max_u32, "max.u32 %0, %1, %2;")
U32_2(add_sat_s32, "add.sat.s32 %0, %1, %2;")
U32_3(sad_s32, "sad.s32 %0, %1, %2, %3;")
U32_3(dp4a_s32, "dp4a.s32.s32 %0, %1, %2, %3;")
UNARY(abs_s32, uint32_t, "r", uint32_t, "r", "abs.s32 %0, %1;")
UNARY(neg_s64, uint64_t, "l", uint64_t, "l", "neg.s64 %0, %1;")
U64_2(add_with_carry, "{ .reg .u32 a, b, c, d, e, f; mov.b64 {a, b}, %1; mov.b64 {c, d}, %2;"
      " add.cc.u32 e, a, c; addc.u32 f, b, d; mov.b64 %0, {e, f}; }")
U64_2(sub_with_borrow, "{ .reg .u32 a, b, c, d, e, f; mov.b64 {a, b}, %1; mov.b64 {c, d}, %2;"
      " sub.cc.u32 e, a, c; subc.u32 f, b, d; mov.b64 %0, {e, f}; }")

// bits
U32_2(shl_b32, "shl.b32 %0, %1, %2;")
U32_2(shr_s32, "shr.s32 %0, %1, %2;")
TERNARY(shr_u64, uint64_t, "l", uint64_t, "l", uint32_t, "r", "shr.u64 %0, %1, %3;")
U32_3(shf_l_wrap, "shf.l.wrap.b32 %0, %1, %2, %3;")
U32_3(shf_r_clamp, "shf.r.clamp.b32 %0, %1, %2, %3;")
U32_3(lop3_majority, "lop3.b32 %0, %1, %2, %3, 0xE8;")
U32_3(prmt_b32, "prmt.b32 %0, %1, %2, %3;")
U32_3(prmt_b4e, "prmt.b32.b4e %0, %1, %2, %3;")
U32_3(bfe_s32, "{ .reg .u32 p, l; and.b32 p, %2, 63; and.b32 l, %3, 63; bfe.s32 %0, %1, p, l; }")
TERNARY(bfe_u64, uint64_t, "l", uint64_t, "l", uint32_t, "r",
        "{ .reg .u32 p, l; and.b32 p, %3, 63; shr.u32 l, %3, 8; and.b32 l, l, 63; bfe.u64 %0, %1, p, l; }")
U32_3(bfi_b32, "{ .reg .u32 p, l; and.b32 p, %3, 63; shr.u32 l, %3, 8; and.b32 l, l, 63;"
      " bfi.b32 %0, %1, %2, p, l; }")
UNARY(popc_b64, uint32_t, "r", uint64_t, "l", "popc.b64 %0, %1;")
UNARY(clz_b32, uint32_t, "r", uint32_t, "r", "clz.b32 %0, %1;")
UNARY(brev_b32, uint32_t, "r", uint32_t, "r", "brev.b32 %0, %1;")
UNARY(bfind_s32, uint32_t, "r", uint32_t, "r", "bfind.s32 %0, %1;")

// floats
F32_2(add_f32, "add.rn.f32 %0, %1, %2;")
F32_2(add_rz_f32, "add.rz.f32 %0, %1, %2;")
F32_2(sub_rp_f32, "sub.rp.f32 %0, %1, %2;")
F32_2(mul_rm_f32, "mul.rm.f32 %0, %1, %2;")
F32_2(mul_ftz_f32, "mul.ftz.f32 %0, %1, %2;")
F32_2(mul_sat_f32, "mul.sat.f32 %0, %1, %2;")
F32_3(fma_f32, "fma.rn.f32 %0, %1, %2, %3;")
F32_2(div_f32, "div.rn.f32 %0, %1, %2;")
F32_2(div_full_f32, "div.full.f32 %0, %1, %2;")
F32_2(min_f32, "min.f32 %0, %1, %2;")
F32_2(max_nan_f32, "max.NaN.f32 %0, %1, %2;")
F32_2(copysign_f32, "copysign.f32 %0, %1, %2;")
F32_1(sqrt_f32, "sqrt.rn.f32 %0, %1;")
F32_1(rcp_f32, "rcp.rn.f32 %0, %1;")
F32_1(rsqrt_f32, "rsqrt.approx.f32 %0, %1;")
F32_1(ex2_f32, "ex2.approx.f32 %0, %1;")
F32_1(lg2_f32, "lg2.approx.f32 %0, %1;")
F32_1(sin_f32, "sin.approx.f32 %0, %1;")
F32_1(tanh_f32, "tanh.approx.f32 %0, %1;")
TERNARY(fma_f64, double, "d", double, "d", double, "d", "fma.rn.f64 %0, %1, %2, %3;")
BINARY(div_f64, double, "d", double, "d", "div.rn.f64 %0, %1, %2;")
U32_2(add_f16x2, "add.rn.f16x2 %0, %1, %2;")
U32_3(fma_bf16x2, "fma.rn.bf16x2 %0, %1, %2, %3;")
U32_2(mul_bf16x2, "mul.rn.bf16x2 %0, %1, %2;")
U32_2(max_bf16x2, "max.bf16x2 %0, %1, %2;")
U32_3(fma_relu_f16x2, "fma.rn.relu.f16x2 %0, %1, %2, %3;")

// conversions
UNARY(cvt_bf16_f32, uint16_t, "h", float, "f", "cvt.rn.bf16.f32 %0, %1;")
UNARY(cvt_rz_f16_f32, uint16_t, "h", float, "f", "cvt.rz.f16.f32 %0, %1;")
UNARY(cvt_f32_f16, float, "f", uint16_t, "h", "cvt.f32.f16 %0, %1;")
UNARY(cvt_rzi_s32_f32, uint32_t, "r", float, "f", "cvt.rzi.s32.f32 %0, %1;")
UNARY(cvt_rni_f32, float, "f", float, "f", "cvt.rni.f32.f32 %0, %1;")
UNARY(cvt_rmi_s64_f64, uint64_t, "l", double, "d", "cvt.rmi.s64.f64 %0, %1;")
UNARY(cvt_u64_f32, float, "f", uint64_t, "l", "cvt.rn.f32.u64 %0, %1;")
UNARY(cvt_rm_f32_f64, float, "f", double, "d", "cvt.rm.f32.f64 %0, %1;")
UNARY(cvt_tf32_f32, uint32_t, "r", float, "f", "cvt.rna.tf32.f32 %0, %1;")
UNARY(cvt_s8_s32, uint32_t, "r", uint32_t, "r", "cvt.s32.s8 %0, %1;")
UNARY(cvt_sat_u8_s32, uint32_t, "r", uint32_t, "r", "cvt.sat.u8.s32 %0, %1;")
BINARY(cvt_bf16x2, uint32_t, "r", float, "f", "cvt.rn.bf16x2.f32 %0, %1, %2;")
BINARY(cvt_relu_f16x2, uint32_t, "r", float, "f", "cvt.rn.relu.f16x2.f32 %0, %1, %2;")
BINARY(cvt_e4m3x2, uint16_t, "h", float, "f", "cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;")
UNARY(cvt_f16x2_e4m3x2, uint32_t, "r", uint16_t, "h", "cvt.rn.f16x2.e4m3x2 %0, %1;")

// comparison and selection
#define COMPARE(NAME, CMP)                                                                        \
    BINARY(NAME, uint32_t, "r", float, "f",                                                       \
           "{ .reg .pred p; setp." CMP ".f32 p, %1, %2; selp.u32 %0, 1, 0, p; }")
COMPARE(setp_lt, "lt")
COMPARE(setp_ne, "ne")
COMPARE(setp_neu, "neu")
COMPARE(setp_geu, "geu")
COMPARE(setp_num, "num")
U32_2(setp_hi_u32, "{ .reg .pred p; setp.hi.u32 p, %1, %2; selp.u32 %0, 1, 0, p; }")
U32_2(setp_and, "{ .reg .pred p, q, r; setp.ne.u32 r, %2, 0; setp.lt.and.s32 p|q, %1, %2, r;"
      " selp.u32 %0, 2, 0, p; @q add.u32 %0, %0, 1; }")
BINARY(set_gt, uint32_t, "r", float, "f", "set.gt.u32.f32 %0, %1, %2;")
TERNARY(slct_s32, uint32_t, "r", uint32_t, "r", uint32_t, "r", "slct.u32.s32 %0, %1, %2, %3;")
UNARY(testp_normal, uint32_t, "r", float, "f", "{ .reg .pred p; testp.normal.f32 p, %1; selp.u32 %0, 1, 0, p; }")
