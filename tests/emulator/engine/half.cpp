// Arithmetic of f16, bf16 and their pairs: computed in float or double, rounded once.
#include "lanewise.h"
#include "rounding.h"

namespace ptx {
namespace {

enum Op : u8 { kAdd, kSub, kMul, kFma, kMin, kMax };

struct Half {
    static float load(u16 b) { return half_to_float(b); }
    static u16 store(double d) { return double_to_half(d); }
};

struct Bfloat {
    static float load(u16 b) { return bfloat_to_float(b); }
    static u16 store(double d) { return double_to_bfloat(d); }
};

double lesser(double a, double b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
}

template <class F>
u16 apply(const Instr& i, u16 x, u16 y, u16 z) {
    const double a = F::load(x), b = F::load(y);
    double r = 0;
    switch (i.op) {
    case kAdd: r = a + b; break;
    case kSub: r = a - b; break;
    case kMul: r = a * b; break;
    case kFma: r = a * b + F::load(z); break;  // the product is exact in double
    case kMin: r = lesser(a, b); break;
    case kMax: r = -lesser(-a, -b); break;
    }
    if (i.flag && (a != a || b != b)) r = std::nan("");
    if (i.sat) r = r > 0 ? (r < 1 ? r : 1) : 0;
    if (i.immediate) r = r > 0 || r != r ? r : 0;  // .relu keeps NaN
    return F::store(r);
}

template <class F>
void run(Warp& w, const Instr& i, u32 m) {
    const u16 *a = lanes_in<u16>(w, i.src[0]), *b = lanes_in<u16>(w, i.src[1]);
    const u16* c = i.op == kFma ? lanes_in<u16>(w, i.src[2]) : a;
    alignas(64) u16 r[kLanes];
    for (int l = 0; l < kLanes; ++l) r[l] = apply<F>(i, a[l], b[l], c[l]);
    lanes_out(w, i.dst, r, m);
}

template <class F>
void run_pair(Warp& w, const Instr& i, u32 m) {
    const u32 *a = lanes_in<u32>(w, i.src[0]), *b = lanes_in<u32>(w, i.src[1]);
    const u32* c = i.op == kFma ? lanes_in<u32>(w, i.src[2]) : a;
    alignas(64) u32 r[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        u32 low = apply<F>(i, u16(a[l]), u16(b[l]), u16(c[l]));
        u32 high = apply<F>(i, u16(a[l] >> 16), u16(b[l] >> 16), u16(c[l] >> 16));
        r[l] = low | high << 16;
    }
    lanes_out(w, i.dst, r, m);
}

template <class U, u32 keep, u32 flip>
void sign_bits(Warp& w, const Instr& i, u32 m) {
    unary<U, U>(w, i, m, [](U a) { return U((a & U(keep)) ^ U(flip)); });
}

}  // namespace

bool decode_half(Decoder& d, const Statement& st, Instr& i) {
    const string& base = st.op[0];
    const Type type = type_at(st, 0);
    const bool pair = type == Type::f16x2 || type == Type::bf16x2;
    const bool brain = type == Type::bf16 || type == Type::bf16x2;
    if (!pair && type != Type::f16 && type != Type::bf16) return false;
    if (base == "neg" || base == "abs") {
        plain_operands(d, st, i, 1);
        if (pair) i.run = base == "neg" ? sign_bits<u32, kAll, 0x80008000> : sign_bits<u32, 0x7fff7fff, 0>;
        else i.run = base == "neg" ? sign_bits<u16, 0xffff, 0x8000> : sign_bits<u16, 0x7fff, 0>;
        return true;
    }
    const char* names[] = {"add", "sub", "mul", "fma", "min", "max"};
    u8 op = 0;
    while (op < 6 && base != names[op]) ++op;
    if (op == 6) return false;
    if (has(st, "xorsign") || has(st, "oob")) throw Unsupported("modifier is not modelled: " + st.text);
    plain_operands(d, st, i, op == kFma ? 3 : 2);
    i.op = op;
    i.sat = has(st, "sat");
    i.flag = has(st, "NaN");
    i.immediate = has(st, "relu");
    i.run = pair ? (brain ? run_pair<Bfloat> : run_pair<Half>) : (brain ? run<Bfloat> : run<Half>);
    return true;
}

}  // namespace ptx
