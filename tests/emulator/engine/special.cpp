// The special function unit: rcp sqrt rsqrt ex2 lg2 sin cos tanh. Computed in double and rounded; the
// .approx forms may be moved by up to two units in the last place.
#include "lanewise.h"
#include "rounding.h"

namespace ptx {
namespace {

enum Op : u8 { kRcp, kSqrt, kRsqrt, kEx2, kLg2, kSin, kCos, kTanh };

double value_of(u8 op, double x) {
    switch (op) {
    case kRcp: return 1 / x;
    case kSqrt: return std::sqrt(x);
    case kRsqrt: return 1 / std::sqrt(x);
    case kEx2: return std::exp2(x);
    case kLg2: return std::log2(x);
    case kSin: return std::sin(x);
    case kCos: return std::cos(x);
    default: return std::tanh(x);
    }
}

void count(Warp& w, u32 mask, int each) {
    w.block->group->grid->stats.special_ops += u64(__builtin_popcount(mask)) * each;
}

void run_float(Warp& w, const Instr& i, u32 m) {
    count(w, m, 1);
    const float* a = lanes_in<float>(w, i.src[0]);
    alignas(64) float r[kLanes] = {};
    {
        // rcp and sqrt also come rounded in other ways, which float arithmetic does right
        RoundingScope scope(i.round);
        each_lane(m, [&](int l) {
            float x = i.ftz ? flush(a[l]) : a[l];
            if (i.op == kRcp) r[l] = 1 / x;
            else if (i.op == kSqrt) r[l] = std::sqrt(x);
            else r[l] = float(value_of(i.op, x));
            if (i.ftz) r[l] = flush(r[l]);
        });
    }
    if (perturbs(w, i)) perturb(w, i, r);
    lanes_out(w, i.dst, r, m);
}

void run_double(Warp& w, const Instr& i, u32 m) {
    count(w, m, 1);
    const double* a = lanes_in<double>(w, i.src[0]);
    alignas(64) double r[kLanes] = {};
    RoundingScope scope(i.round);
    each_lane(m, [&](int l) {
        r[l] = value_of(i.op, a[l]);
        if (i.approximate) r[l] = bits_as<double>(bits_as<u64>(r[l]) & ~0xffffffffull);  // .approx.ftz.f64: 20 bits
    });
    lanes_out(w, i.dst, r, m);
}

template <bool brain>
u16 half_value(u8 op, u16 x) {
    double y = value_of(op, brain ? bfloat_to_float(x) : half_to_float(x));
    return brain ? double_to_bfloat(y) : double_to_half(y);
}

template <bool brain>
void run_half(Warp& w, const Instr& i, u32 m) {
    count(w, m, 1);
    unary<u16, u16>(w, i, m, [&](u16 a) { return half_value<brain>(i.op, a); });
}

template <bool brain>
void run_pair(Warp& w, const Instr& i, u32 m) {
    count(w, m, 2);
    unary<u32, u32>(w, i, m, [&](u32 a) {
        return u32(half_value<brain>(i.op, u16(a))) | u32(half_value<brain>(i.op, u16(a >> 16))) << 16;
    });
}

float moved(float f, u64 salt) {
    u32 u = bits_as<u32>(f);
    if ((u & 0x7f800000) == 0x7f800000 || !(u & 0x7fffffff)) return f;
    u64 hash = ((u + salt * 0x9e3779b97f4a7c15ull) ^ salt >> 7) * 0xff51afd7ed558ccdull;
    u32 near = u + u32((hash >> 40) % 5) - 2;
    return (near & 0x7f800000) == 0x7f800000 ? f : bits_as<float>(near);
}

}  // namespace

bool perturbs(const Warp& w, const Instr& i) { return i.approximate && w.block->group->grid->options.perturb; }

void perturb(const Warp& w, const Instr& i, float* values) {
    const u64 salt = w.block->group->grid->options.seed * 16 + i.op;
    for (int l = 0; l < kLanes; ++l) values[l] = moved(values[l], salt);
}

bool decode_special(Decoder& d, const Statement& st, Instr& i) {
    const char* names[] = {"rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"};
    u8 op = 0;
    while (op < 8 && st.op[0] != names[op]) ++op;
    if (op == 8) return false;
    plain_operands(d, st, i, 1);
    i.op = op;
    i.ftz = has(st, "ftz") && i.type == Type::f32;
    i.approximate = has(st, "approx");
    i.round = round_of(st);
    switch (i.type) {
    case Type::f32: i.run = run_float; break;
    case Type::f64: i.run = run_double; break;
    case Type::f16: i.run = run_half<false>; break;
    case Type::bf16: i.run = run_half<true>; break;
    case Type::f16x2: i.run = run_pair<false>; break;
    case Type::bf16x2: i.run = run_pair<true>; break;
    default: break;
    }
    return true;
}

}  // namespace ptx
