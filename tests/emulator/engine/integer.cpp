// Integer arithmetic: add sub mul mad div rem min max neg abs sad, and the forms with carry.
#include <algorithm>
#include <type_traits>

#include "lanewise.h"

namespace ptx {
namespace {

enum Op : u8 { kAdd, kSub, kMulLo, kMulHi, kMadLo, kMadHi, kDiv, kRem, kMin, kMax, kNeg, kAbs, kSad };

template <class T>
T high_half(T a, T b) {
    if constexpr (sizeof(T) == 8) {
        using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
        return T((Wide(a) * Wide(b)) >> 64);
    } else {
        using Wide = std::conditional_t<std::is_signed_v<T>, i64, u64>;
        return T((Wide(a) * Wide(b)) >> (8 * sizeof(T)));
    }
}

// Division by zero gives all ones, and the remainder is the dividend; the most negative number over -1
// wraps around.
template <class T>
T divide(T a, T b) {
    if (b == 0) return T(-1);
    if (std::is_signed_v<T> && b == T(-1)) return T(0 - std::make_unsigned_t<T>(a));
    return T(a / b);
}

template <class T>
T remainder(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return T(a % b);
}

template <class T, Op op>
void run(Warp& w, const Instr& i, u32 m) {
    using U = std::make_unsigned_t<T>;
    using Full = std::conditional_t<sizeof(T) < 4, u32, U>;  // no promotion to a signed int
    if constexpr (op == kAdd) {
        binary<U, U>(w, i, m, [](U a, U b) { return U(a + b); });
    } else if constexpr (op == kSub) {
        binary<U, U>(w, i, m, [](U a, U b) { return U(a - b); });
    } else if constexpr (op == kMulLo) {
        binary<U, U>(w, i, m, [](U a, U b) { return U(Full(a) * Full(b)); });
    } else if constexpr (op == kMulHi) {
        binary<T, T>(w, i, m, [](T a, T b) { return high_half(a, b); });
    } else if constexpr (op == kMadLo) {
        ternary<U, U>(w, i, m, [](U a, U b, U c) { return U(Full(a) * Full(b) + c); });
    } else if constexpr (op == kMadHi) {
        ternary<T, T>(w, i, m, [](T a, T b, T c) { return T(U(high_half(a, b)) + U(c)); });
    } else if constexpr (op == kDiv) {
        binary<T, T>(w, i, m, [](T a, T b) { return divide(a, b); });
    } else if constexpr (op == kRem) {
        binary<T, T>(w, i, m, [](T a, T b) { return remainder(a, b); });
    } else if constexpr (op == kMin) {
        binary<T, T>(w, i, m, [](T a, T b) { return a < b ? a : b; });
    } else if constexpr (op == kMax) {
        binary<T, T>(w, i, m, [](T a, T b) { return a > b ? a : b; });
    } else if constexpr (op == kNeg) {
        unary<U, U>(w, i, m, [](U a) { return U(0 - a); });
    } else if constexpr (op == kAbs) {
        unary<U, T>(w, i, m, [](T a) { return a < 0 ? U(0 - U(a)) : U(a); });
    } else {
        ternary<T, T>(w, i, m, [](T a, T b, T c) { return T(U(c) + (a < b ? U(b) - U(a) : U(a) - U(b))); });
    }
}

template <Op op>
RunFn pick(Type type) {
    switch (type) {
    case Type::b16: case Type::u16: return run<u16, op>;
    case Type::s16: return run<i16, op>;
    case Type::b32: case Type::u32: return run<u32, op>;
    case Type::s32: return run<i32, op>;
    case Type::b64: case Type::u64: return run<u64, op>;
    case Type::s64: return run<i64, op>;
    default: return nullptr;
    }
}

template <class T, class Wide, bool add>
void run_wide(Warp& w, const Instr& i, u32 m) {
    using U = std::make_unsigned_t<Wide>;
    if constexpr (add) {
        ternary<Wide, T>(w, i, m, [](T a, T b, Wide c) { return Wide(U(Wide(a) * Wide(b)) + U(c)); });
    } else {
        binary<Wide, T>(w, i, m, [](T a, T b) { return Wide(a) * Wide(b); });
    }
}

template <bool add>
RunFn pick_wide(Type type) {
    switch (type) {
    case Type::u16: return run_wide<u16, u32, add>;
    case Type::s16: return run_wide<i16, i32, add>;
    case Type::u32: return run_wide<u32, u64, add>;
    case Type::s32: return run_wide<i32, i64, add>;
    default: return nullptr;
    }
}

template <class T>
void run_saturating(Warp& w, const Instr& i, u32 m) {  // add.sat.s32, sub.sat.s32
    const bool subtract = i.op == kSub;
    binary<T, T>(w, i, m, [=](T a, T b) {
        i64 r = subtract ? i64(a) - b : i64(a) + b;
        return T(std::min<i64>(std::max<i64>(r, INT32_MIN), INT32_MAX));
    });
}

// add.cc, addc, sub.cc, subc, mad.lo.cc, madc: `flag` takes the carry in, `sat` sets it.
template <class T, class Wide>
void run_carry(Warp& w, const Instr& i, u32 m) {
    const T* a = lanes_in<T>(w, i.src[0]);
    const T* b = lanes_in<T>(w, i.src[1]);
    const T* c = i.src[2].exists ? lanes_in<T>(w, i.src[2]) : nullptr;
    T r[kLanes];
    u32 out = 0;
    for (int l = 0; l < kLanes; ++l) {
        Wide in = i.flag ? w.carry >> l & 1 : 0, sum;
        if (i.op == kSub) sum = Wide(a[l]) - b[l] - in;
        else if (i.op == kAdd) sum = Wide(a[l]) + b[l] + in;
        else sum = Wide(i.op == kMadHi ? high_half(a[l], b[l]) : T(Wide(a[l]) * b[l])) + c[l] + in;
        r[l] = T(sum);
        out |= u32(sum >> (8 * sizeof(T)) & 1) << l;
    }
    if (i.sat) w.carry = (w.carry & ~m) | (out & m);
    lanes_out(w, i.dst, r, m);
}

bool decode_carry(Decoder& d, const Statement& st, Instr& i) {
    string base = st.op[0];
    i.flag = base.back() == 'c' && base != "sub" && base.size() > 3;
    if (!i.flag && !has(st, "cc")) return false;
    const string kind = i.flag ? base.substr(0, base.size() - 1) : base;
    plain_operands(d, st, i, kind == "mad" ? 3 : 2);
    i.sat = has(st, "cc");
    i.op = kind == "sub" ? kSub : kind == "add" ? kAdd : has(st, "hi") ? kMadHi : kMadLo;
    i.run = bytes_of(i.type) == 8 ? run_carry<u64, unsigned __int128> : run_carry<u32, u64>;
    return true;
}

void lanewise_dp4a(Warp& w, const Instr& i, u32 m) {
    const u32* a = lanes_in<u32>(w, i.src[0]);
    const u32* b = lanes_in<u32>(w, i.src[1]);
    const u32* c = lanes_in<u32>(w, i.src[2]);
    const bool sa = is_signed(i.from), sb = is_signed(i.type);
    u32 r[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        i32 sum = i32(c[l]);
        for (int k = 0; k < 4; ++k) {
            i32 x = u8(a[l] >> 8 * k), y = u8(b[l] >> 8 * k);
            sum = i32(u32(sum) + u32((sa ? i8(x) : x) * (sb ? i8(y) : y)));
        }
        r[l] = u32(sum);
    }
    lanes_out(w, i.dst, r, m);
}

}  // namespace

bool decode_integer(Decoder& d, const Statement& st, Instr& i) {
    const string& base = st.op[0];
    const Type type = type_at(st, 0);
    if (type == Type::none || is_float(type) || type == Type::pred) return false;
    i.integer = true;
    if ((base == "add" || base == "addc" || base == "sub" || base == "subc" || base == "mad" || base == "madc") &&
        decode_carry(d, st, i)) {
        return true;
    }
    const bool hi = has(st, "hi"), wide = has(st, "wide");
    if (base == "dp4a") {
        plain_operands(d, st, i, 3);
        i.from = type_at(st, 1);
        i.run = lanewise_dp4a;
    } else if (base == "mul" || base == "mad" || base == "mul24" || base == "mad24") {
        const bool add = base[1] == 'a';
        plain_operands(d, st, i, 2);
        if (base.size() > 3) throw Unsupported("24-bit multiplication is not modelled: " + st.text);
        if (add) {
            Type c = !wide ? type : bytes_of(type) == 2 ? Type::b32 : Type::b64;
            i.src[2] = d.value(st.args.at(3), c);
        }
        i.run = wide ? (add ? pick_wide<true>(type) : pick_wide<false>(type))
                : hi ? (add ? pick<kMadHi>(type) : pick<kMulHi>(type))
                     : (add ? pick<kMadLo>(type) : pick<kMulLo>(type));
        if (add && has(st, "sat")) i.run = nullptr;
    } else if (base == "add" || base == "sub") {
        plain_operands(d, st, i, 2);
        i.op = base == "sub" ? kSub : kAdd;
        i.run = has(st, "sat") ? run_saturating<i32> : base == "add" ? pick<kAdd>(type) : pick<kSub>(type);
    } else if (base == "div" || base == "rem" || base == "min" || base == "max") {
        plain_operands(d, st, i, 2);
        i.run = base == "div" ? pick<kDiv>(type) : base == "rem" ? pick<kRem>(type)
                : base == "min" ? pick<kMin>(type) : pick<kMax>(type);
        if (has(st, "relu")) i.run = nullptr;
    } else if (base == "neg" || base == "abs") {
        plain_operands(d, st, i, 1);
        i.run = base == "neg" ? pick<kNeg>(type) : pick<kAbs>(type);
    } else if (base == "sad") {
        plain_operands(d, st, i, 3);
        i.run = pick<kSad>(type);
    } else {
        i.integer = false;
        return false;
    }
    return true;
}

}  // namespace ptx
