// Arithmetic of f32 and f64: add sub mul fma mad div min max neg abs copysign testp.
#include "lanewise.h"
#include "rounding.h"

namespace ptx {
namespace {

enum Op : u8 { kAdd, kSub, kMul, kFma, kDiv, kMin, kMax };

template <class F>
F saturated(F x) { return x > 0 ? (x < 1 ? x : F(1)) : F(0); }  // NaN becomes 0

template <class F>
F smaller(F a, F b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
}

template <class F, Op op>
F apply(F a, F b, F c) {
    switch (op) {
    case kAdd: return a + b;
    case kSub: return a - b;
    case kMul: return a * b;
    case kFma: return std::fma(a, b, c);
    case kDiv: return a / b;
    case kMin: return smaller(a, b);
    case kMax: return -smaller(-a, -b);
    }
}

template <class F, Op op>
void run(Warp& w, const Instr& i, u32 m) {
    const F *a = lanes_in<F>(w, i.src[0]), *b = lanes_in<F>(w, i.src[1]);
    const F* c = op == kFma ? lanes_in<F>(w, i.src[2]) : a;
    alignas(64) F r[kLanes];
    if (i.round == Round::nearest && !i.ftz) {
        for (int l = 0; l < kLanes; ++l) r[l] = apply<F, op>(a[l], b[l], c[l]);
    } else {
        RoundingScope scope(i.round);
        for (int l = 0; l < kLanes; ++l) {
            r[l] = i.ftz ? flush(apply<F, op>(flush(a[l]), flush(b[l]), flush(c[l]))) : apply<F, op>(a[l], b[l], c[l]);
        }
    }
    if (i.flag) {  // .NaN
        constexpr F nan = std::numeric_limits<F>::quiet_NaN();
        for (int l = 0; l < kLanes; ++l) r[l] = a[l] != a[l] || b[l] != b[l] ? nan : r[l];
    }
    if (i.sat) {
        for (int l = 0; l < kLanes; ++l) r[l] = saturated(r[l]);
    }
    if constexpr (op == kDiv && sizeof(F) == 4) {
        if (perturbs(w, i)) perturb(w, i, r);
    }
    lanes_out(w, i.dst, r, m);
}

template <Op op>
RunFn pick(Type type) { return type == Type::f64 ? run<double, op> : run<float, op>; }

template <class U, U keep, U flip>
void sign_bits(Warp& w, const Instr& i, u32 m) {
    const U* a = lanes_in<U>(w, i.src[0]);
    alignas(64) U r[kLanes];
    for (int l = 0; l < kLanes; ++l) r[l] = (a[l] & keep) ^ flip;
    if (i.ftz) {
        for (int l = 0; l < kLanes; ++l) r[l] = r[l] & 0x7f800000 ? r[l] : r[l] & U(0x80000000);
    }
    lanes_out(w, i.dst, r, m);
}

template <class U>
void copy_sign(Warp& w, const Instr& i, u32 m) {  // the sign of the first, the rest of the second
    constexpr U sign = U(1) << (8 * sizeof(U) - 1);
    binary<U, U>(w, i, m, [](U a, U b) { return U((a & sign) | (b & ~sign)); });
}

enum Property : u8 { kFinite, kInfinite, kNumber, kNotANumber, kNormal, kSubnormal };

template <class F>
void test_property(Warp& w, const Instr& i, u32 m) {
    const F* a = lanes_in<F>(w, i.src[0]);
    u32 r = 0;
    for (int l = 0; l < kLanes; ++l) {
        int c = std::fpclassify(a[l]);
        bool yes = i.op == kFinite        ? c != FP_NAN && c != FP_INFINITE
                   : i.op == kInfinite    ? c == FP_INFINITE
                   : i.op == kNumber      ? c != FP_NAN
                   : i.op == kNotANumber  ? c == FP_NAN
                   : i.op == kNormal      ? c == FP_NORMAL
                                          : c == FP_SUBNORMAL;
        r |= u32(yes) << l;
    }
    predicate_out(w, i.dst, r, m);
}

}  // namespace

bool decode_float(Decoder& d, const Statement& st, Instr& i) {
    const string& base = st.op[0];
    const Type type = type_at(st, 0);
    if (type != Type::f32 && type != Type::f64) return false;
    i.ftz = has(st, "ftz");
    i.sat = has(st, "sat");
    i.flag = has(st, "NaN");
    i.round = round_of(st);
    if (has(st, "xorsign")) throw Unsupported("xorsign is not modelled: " + st.text);
    if (base == "add" || base == "sub" || base == "mul" || base == "div" || base == "min" || base == "max") {
        if (type_at(st, 1) != Type::none) return false;  // mixed precision add of sm_100
        plain_operands(d, st, i, 2);
        i.approximate = base == "div" && (has(st, "approx") || has(st, "full"));
        i.run = base == "add"   ? pick<kAdd>(type)
                : base == "sub" ? pick<kSub>(type)
                : base == "mul" ? pick<kMul>(type)
                : base == "div" ? pick<kDiv>(type)
                : base == "min" ? pick<kMin>(type)
                                : pick<kMax>(type);
        if (st.args.size() > 3) i.run = nullptr;  // three operands, sm_100
    } else if (base == "fma" || base == "mad") {
        plain_operands(d, st, i, 3);
        i.run = pick<kFma>(type);
    } else if (base == "neg" || base == "abs") {
        plain_operands(d, st, i, 1);
        constexpr u64 top = 1ull << 63;
        if (type == Type::f64) i.run = base == "neg" ? sign_bits<u64, ~0ull, top> : sign_bits<u64, ~top, 0>;
        else i.run = base == "neg" ? sign_bits<u32, kAll, 1u << 31> : sign_bits<u32, 0x7fffffff, 0>;
        i.ftz = i.ftz && type == Type::f32;
    } else if (base == "copysign") {
        plain_operands(d, st, i, 2);
        i.run = type == Type::f64 ? copy_sign<u64> : copy_sign<u32>;
    } else if (base == "testp") {
        plain_operands(d, st, i, 1);
        const char* names[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
        for (u8 k = 0; k < 6; ++k) {
            if (has(st, names[k])) i.op = k;
        }
        i.run = type == Type::f64 ? test_property<double> : test_property<float>;
    } else {
        return false;
    }
    return true;
}

}  // namespace ptx
