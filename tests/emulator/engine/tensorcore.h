// What mma and wgmma share: element types and the rounding of sums.
#pragma once
#include "lanewise.h"
#include "rounding.h"

namespace ptx {

double fp8_value(bool e5m2, u8 bits);

// Element `index` of a register or memory word that holds several.
inline double element(Type type, u32 bits, int index) {
    switch (type) {
    case Type::tf32: return bits_as<float>(bits & 0xffffe000u);
    case Type::bf16: return bfloat_to_float(u16(bits >> 16 * index));
    case Type::f16: return half_to_float(u16(bits >> 16 * index));
    case Type::e4m3: return fp8_value(false, u8(bits >> 8 * index));
    case Type::e5m2: return fp8_value(true, u8(bits >> 8 * index));
    case Type::s8: return i8(bits >> 8 * index);
    default: return u8(bits >> 8 * index);
    }
}

// The sum is exact but for double's own rounding, then rounded once; with `perturb` it is cut off, as
// tensor cores do with what falls below their accumulator.
inline float accumulated(double sum, bool perturb) {
    float f = float(sum);
    if (perturb && std::fabs(double(f)) > std::fabs(sum)) f = bits_as<float>(bits_as<u32>(f) - 1);
    return f;
}

enum Accumulator : u8 { kFloat, kHalf, kInteger };

inline Accumulator accumulator(Type type) {
    return type == Type::f32 ? kFloat : type == Type::f16 ? kHalf : kInteger;
}

inline u32 integer_sum(double sum, bool saturate) {
    const i64 whole = i64(sum);  // exact: sums stay far below 2^53
    if (!saturate) return u32(whole);
    return u32(i32(std::min<i64>(std::max<i64>(whole, INT32_MIN), INT32_MAX)));
}

}  // namespace ptx
