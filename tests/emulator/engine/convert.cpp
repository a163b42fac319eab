// cvt: between integers, floats, half types, tf32, fp8, with rounding and saturation.
#include <algorithm>

#include "lanewise.h"
#include "rounding.h"

namespace ptx {
namespace {

// ---- single lanes, by way of 64 bits ----

i64 integer_in(Type type, u64 bits) {
    switch (type) {
    case Type::s8: return i8(bits);
    case Type::s16: return i16(bits);
    case Type::s32: return i32(bits);
    case Type::u8: case Type::b8: return u8(bits);
    case Type::u16: case Type::b16: return u16(bits);
    case Type::u32: case Type::b32: return u32(bits);
    default: return i64(bits);
    }
}

double float_in(Type type, u64 bits) {
    switch (type) {
    case Type::f16: return half_to_float(u16(bits));
    case Type::bf16: return bfloat_to_float(u16(bits));
    case Type::f64: return bits_as<double>(bits);
    default: return bits_as<float>(u32(bits));
    }
}

// fp8 value of the low byte: e4m3 has no infinity, e5m2 is the top of a half.
double fp8_in(Type type, u64 bits) {
    u8 b = u8(bits);
    if (type == Type::e5m2 || type == Type::e5m2x2) return half_to_float(u16(b) << 8);
    int exponent = b >> 3 & 15, mantissa = b & 7;
    double x = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    if ((b & 127) == 127) x = std::nan("");
    return b & 128 ? -x : x;
}

u8 fp8_out(Type type, double x) {  // round to nearest even, saturate to the largest finite
    const bool wide = type == Type::e5m2x2 || type == Type::e5m2;
    const int bits = wide ? 2 : 3, lowest = wide ? -14 : -6;
    const u8 nan = 0x7f, most = wide ? 0x7b : 0x7e;
    u8 sign = std::signbit(x) ? 0x80 : 0;
    if (x != x) return nan;
    double a = std::fabs(x);
    int e = 0;
    std::frexp(a, &e);
    e = std::max(e - 1, lowest);
    double steps = std::nearbyint(std::ldexp(a, bits - e));  // in units of the last place
    if (steps >= 2 << bits) {
        steps /= 2;
        ++e;
    }
    double limit = wide ? 57344 : 448;
    if (std::ldexp(steps, e - bits) > limit) return sign | most;
    int whole = int(steps);
    if (whole < 1 << bits) return sign | u8(whole);  // subnormal
    return sign | u8((e - lowest + 1) << bits | (whole - (1 << bits)));
}

u64 integer_out(Type type, u64 bits) {
    switch (bytes_of(type)) {
    case 1: return is_signed(type) ? u64(i64(i8(bits))) : u8(bits);
    case 2: return is_signed(type) ? u64(i64(i16(bits))) : u16(bits);
    case 4: return is_signed(type) ? u64(i64(i32(bits))) : u32(bits);
    default: return bits;
    }
}

double rounded(double x, Round mode) {
    switch (mode) {
    case Round::zero: return std::trunc(x);
    case Round::down: return std::floor(x);
    case Round::up: return std::ceil(x);
    default: return std::nearbyint(x);
    }
}

// Out of range: the nearest. NaN: zero, or the highest bit if either type is wide.
u64 float_to_integer(Type to, Type from, double x) {
    const int bits = 8 * bytes_of(to);
    if (x != x) return bits == 64 || from == Type::f64 ? 1ull << (bits - 1) : 0;
    if (is_signed(to)) {
        double edge = std::ldexp(1.0, bits - 1);
        if (x >= edge) return (1ull << (bits - 1)) - 1;
        return x < -edge ? u64(1) << (bits - 1) | (bits < 64 ? ~0ull << (bits - 1) : 0) : u64(i64(x));
    }
    if (x <= 0) return 0;
    return x >= std::ldexp(1.0, bits) ? ~0ull >> (64 - bits) : u64(x);
}

u64 saturated_integer(const Instr& i, i64 x) {
    const int bits = 8 * bytes_of(i.type);
    if (is_signed(i.type)) {
        i64 high = i64((1ull << (bits - 1)) - 1);
        bool over = !is_signed(i.from) && x < 0;  // a u64 beyond the signed range
        return u64(over ? high : std::min(std::max(x, -high - 1), high));
    }
    if (x < 0 && is_signed(i.from)) return 0;
    return bits == 64 ? u64(x) : std::min<u64>(u64(x), (1ull << bits) - 1);
}

u32 to_tf32(u32 u, bool away) {
    if ((u & 0x7f800000) == 0x7f800000) return u & 0x7fffff ? 0x7fffffff : u;
    return (away ? u + 0x1000 : u + 0xfff + (u >> 13 & 1)) & 0xffffe000;
}

// Half types with another rounding than to nearest: the neighbour on the right side.
u16 directed_half(Type to, double x, Round mode) {
    auto value = [&](u16 h) { return to == Type::f16 ? half_to_float(h) : bfloat_to_float(h); };
    u16 h = to == Type::f16 ? double_to_half(x) : double_to_bfloat(x);
    double y = value(h);
    if (mode == Round::nearest || y == x || x != x) return h;
    bool want_smaller = mode == Round::down || (mode == Round::zero && x > 0);
    if (want_smaller == (y < x)) return h;
    bool towards_zero = want_smaller == (x > 0);
    if (towards_zero) return u16(h - 1);
    return h & 0x7fff ? u16(h + 1) : u16((x < 0 ? 0x8000 : 0) | 1);
}

u64 float_out(const Instr& i, double x) {
    if (i.sat) x = x > 0 ? std::min(x, 1.0) : 0;
    if (i.flag) x = x > 0 || x != x ? x : 0;  // .relu
    switch (i.type) {
    case Type::f16: case Type::bf16: return directed_half(i.type, x, i.round);
    case Type::f64: return bits_as<u64>(x);
    case Type::tf32: return to_tf32(bits_as<u32>(float(x)), i.op);
    default: break;
    }
    RoundingScope scope(i.round);
    volatile double hold = x;
    float f = float(hold);
    return bits_as<u32>(i.ftz ? flush(f) : f);
}

u64 convert(const Instr& i, u64 bits, bool to_whole) {
    if (is_float(i.from)) {
        double x = float_in(i.from, bits);
        if (i.ftz && i.from == Type::f32) x = flush(float(x));
        if (!is_float(i.type)) return integer_out(i.type, float_to_integer(i.type, i.from, rounded(x, i.round)));
        if (to_whole) {
            x = rounded(x, i.round);  // a whole number; what is left is exact or to nearest
            if (i.sat) x = x > 0 ? std::min(x, 1.0) : 0;
            if (bytes_of(i.type) == 2) return directed_half(i.type, x, Round::nearest);
            return i.type == Type::f64 ? bits_as<u64>(x) : bits_as<u32>(float(x));
        }
        return float_out(i, x);
    }
    i64 x = integer_in(i.from, bits);
    if (!is_float(i.type)) return i.sat ? saturated_integer(i, x) : integer_out(i.type, u64(x));
    const bool big = bytes_of(i.from) == 8;
    if (big && i.type == Type::f32) {  // not by way of double, which would round twice
        RoundingScope scope(i.round);
        return bits_as<u32>(is_signed(i.from) ? float(x) : float(u64(x)));
    }
    RoundingScope scope(i.type == Type::f64 ? i.round : Round::nearest);
    return float_out(i, is_signed(i.from) || !big ? double(x) : double(u64(x)));
}

template <bool to_whole>
void run_any(Warp& w, const Instr& i, u32 m) {
    u64 in[kLanes], out[kLanes] = {};
    lanes_any(w, i.src[0], in);
    each_lane(m, [&](int l) { out[l] = convert(i, in[l], to_whole); });
    lanes_any_out(w, i.dst, out, m);
}

// ---- frequent forms ----

template <class To, class From>
void run_plain(Warp& w, const Instr& i, u32 m) { unary<To, From>(w, i, m, [](From a) { return To(a); }); }

void bfloat_from_float(Warp& w, const Instr& i, u32 m) { unary<u16, float>(w, i, m, float_to_bfloat); }
void half_from_float(Warp& w, const Instr& i, u32 m) { unary<u16, float>(w, i, m, float_to_half); }
void float_from_bfloat(Warp& w, const Instr& i, u32 m) { unary<float, u16>(w, i, m, bfloat_to_float); }
void float_from_half(Warp& w, const Instr& i, u32 m) { unary<float, u16>(w, i, m, half_to_float); }

template <bool brain>
void run_pair(Warp& w, const Instr& i, u32 m) {  // the first source goes to the upper half
    const float *hi = lanes_in<float>(w, i.src[0]), *lo = lanes_in<float>(w, i.src[1]);
    alignas(64) u32 r[kLanes];
    Instr one = {};
    one.type = brain ? Type::bf16 : Type::f16;
    one.round = i.round;
    one.flag = i.flag;
    const bool simple = i.round == Round::nearest && !i.flag;
    for (int l = 0; l < kLanes; ++l) {
        if (simple) r[l] = brain ? u32(float_to_bfloat(hi[l])) << 16 | float_to_bfloat(lo[l])
                                 : u32(float_to_half(hi[l])) << 16 | float_to_half(lo[l]);
        else r[l] = u32(float_out(one, hi[l])) << 16 | u32(float_out(one, lo[l]));
    }
    lanes_out(w, i.dst, r, m);
}

void fp8_from_floats(Warp& w, const Instr& i, u32 m) {
    const float *hi = lanes_in<float>(w, i.src[0]), *lo = lanes_in<float>(w, i.src[1]);
    u16 r[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        float a = i.flag ? std::max(hi[l], 0.0f) : hi[l], b = i.flag ? std::max(lo[l], 0.0f) : lo[l];
        r[l] = u16(fp8_out(i.type, a) << 8 | fp8_out(i.type, b));
    }
    lanes_out(w, i.dst, r, m);
}

void fp8_from_halves(Warp& w, const Instr& i, u32 m) {
    unary<u16, u32>(w, i, m, [&](u32 a) {
        return u16(fp8_out(i.type, half_to_float(u16(a >> 16))) << 8 | fp8_out(i.type, half_to_float(u16(a))));
    });
}

void halves_from_fp8(Warp& w, const Instr& i, u32 m) {
    unary<u32, u16>(w, i, m, [&](u16 a) {
        return u32(float_to_half(float(fp8_in(i.from, a >> 8)))) << 16 | float_to_half(float(fp8_in(i.from, a)));
    });
}

RunFn quick(const Instr& i, bool plain) {
    const Type to = i.type, from = i.from;
    if (!plain || i.dst.width != bytes_of(to) || i.src[0].width != bytes_of(from)) return nullptr;
    if (from == Type::f32 && to == Type::bf16) return bfloat_from_float;
    if (from == Type::f32 && to == Type::f16) return half_from_float;
    if (from == Type::bf16 && to == Type::f32) return float_from_bfloat;
    if (from == Type::f16 && to == Type::f32) return float_from_half;
    if (from == Type::s32 && to == Type::f32) return run_plain<float, i32>;
    if (from == Type::u32 && to == Type::f32) return run_plain<float, u32>;
    if (from == Type::f32 && to == Type::f64) return run_plain<double, float>;
    if (from == Type::s32 && bytes_of(to) == 8 && !is_float(to)) return run_plain<i64, i32>;
    if ((from == Type::u32 || from == Type::b32) && bytes_of(to) == 8 && !is_float(to)) return run_plain<u64, u32>;
    if (bytes_of(from) == 8 && bytes_of(to) == 4 && !is_float(from) && !is_float(to)) return run_plain<u32, u64>;
    return nullptr;
}

}  // namespace

double fp8_value(bool e5m2, u8 bits) { return fp8_in(e5m2 ? Type::e5m2 : Type::e4m3, bits); }

bool decode_convert(Decoder& d, const Statement& st, Instr& i) {
    if (st.op[0] != "cvt") return false;
    need_args(st, 2);
    i.type = type_at(st, 1);
    i.from = type_at(st, 0);
    i.dst = d.result(st.args[0]);
    i.src[0] = d.value(st.args[1], i.from);
    i.ftz = has(st, "ftz");
    i.sat = has(st, "sat");
    i.flag = has(st, "relu");
    i.round = round_of(st);
    i.op = has(st, "rna");
    i.integer = !is_float(i.type) && !is_float(i.from);
    const bool pair_source = st.args.size() == 3;
    if (pair_source) i.src[1] = d.value(st.args[2], i.from);
    if (has(st, "rs")) throw Unsupported("stochastic rounding is not modelled: " + st.text);
    if (i.type == Type::e4m3x2 || i.type == Type::e5m2x2) {
        i.run = pair_source ? fp8_from_floats : i.from == Type::f16x2 ? fp8_from_halves : nullptr;
    } else if (i.from == Type::e4m3x2 || i.from == Type::e5m2x2) {
        i.run = i.type == Type::f16x2 ? halves_from_fp8 : nullptr;
    } else if (i.type == Type::bf16x2 || i.type == Type::f16x2) {
        i.run = !pair_source ? nullptr : i.type == Type::bf16x2 ? run_pair<true> : run_pair<false>;
    } else {
        bool whole = false;
        const std::pair<const char*, Round> modes[] = {
            {"rni", Round::nearest}, {"rzi", Round::zero}, {"rmi", Round::down}, {"rpi", Round::up}};
        for (auto [name, mode] : modes) {
            if (has(st, name)) {
                whole = true;
                i.round = mode;
            }
        }
        const bool plain = !i.ftz && !i.sat && !i.flag && !whole && i.round == Round::nearest;
        i.run = quick(i, plain);
        if (!i.run) i.run = whole ? run_any<true> : run_any<false>;
    }
    return true;
}

}  // namespace ptx
