// Comparison and selection: setp set selp slct.
#include "lanewise.h"
#include "rounding.h"

namespace ptx {
namespace {

enum Cmp : u8 { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
const char* const kCmpNames[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                 "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

enum Combine : u8 { kNone, kAnd, kOr, kXor };

template <class T, class F>
u32 mask_of(const T* a, const T* b, F test) {
    u32 r = 0;
    for (int l = 0; l < kLanes; ++l) r |= test(a[l], b[l]) ? 1u << l : 0;
    return r;
}

template <class T>
u32 compare(u8 cmp, const T* a, const T* b) {
    switch (cmp) {
    case kEq: return mask_of(a, b, [](T x, T y) { return x == y; });
    case kNe: return mask_of(a, b, [](T x, T y) { return x < y || x > y; });  // false for NaN
    case kLt: return mask_of(a, b, [](T x, T y) { return x < y; });
    case kLe: return mask_of(a, b, [](T x, T y) { return x <= y; });
    case kGt: return mask_of(a, b, [](T x, T y) { return x > y; });
    case kGe: return mask_of(a, b, [](T x, T y) { return x >= y; });
    case kEqu: return mask_of(a, b, [](T x, T y) { return !(x < y || x > y); });
    case kNeu: return mask_of(a, b, [](T x, T y) { return !(x == y); });
    case kLtu: return mask_of(a, b, [](T x, T y) { return !(x >= y); });
    case kLeu: return mask_of(a, b, [](T x, T y) { return !(x > y); });
    case kGtu: return mask_of(a, b, [](T x, T y) { return !(x <= y); });
    case kGeu: return mask_of(a, b, [](T x, T y) { return !(x < y); });
    case kNum: return mask_of(a, b, [](T x, T y) { return x == x && y == y; });
    default: return mask_of(a, b, [](T x, T y) { return x != x || y != y; });
    }
}

u32 combine(u8 how, u32 r, u32 p) { return how == kAnd ? r & p : how == kOr ? r | p : how == kXor ? r ^ p : r; }

void finish(Warp& w, const Instr& i, u32 r, u32 m) {
    u32 p = i.src[2].exists ? predicate(w, i.src[2]) : 0;
    const u8 how = u8(i.immediate);
    if (i.type == Type::pred) {
        predicate_out(w, i.dst, combine(how, r, p), m);
        predicate_out(w, i.dst2, combine(how, ~r, p), m);
        return;
    }
    const u32 yes = i.type == Type::f32 ? bits_as<u32>(1.0f) : kAll;  // set
    u32 out[kLanes];
    r = combine(how, r, p);
    for (int l = 0; l < kLanes; ++l) out[l] = r >> l & 1 ? yes : 0;
    lanes_out(w, i.dst, out, m);
}

template <class T>
void run(Warp& w, const Instr& i, u32 m) {
    finish(w, i, compare(i.op, lanes_in<T>(w, i.src[0]), lanes_in<T>(w, i.src[1])), m);
}

void run_flushed(Warp& w, const Instr& i, u32 m) {
    const float *a = lanes_in<float>(w, i.src[0]), *b = lanes_in<float>(w, i.src[1]);
    float x[kLanes], y[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        x[l] = flush(a[l]);
        y[l] = flush(b[l]);
    }
    finish(w, i, compare(i.op, x, y), m);
}

template <bool brain>
void run_half(Warp& w, const Instr& i, u32 m) {
    const u16 *a = lanes_in<u16>(w, i.src[0]), *b = lanes_in<u16>(w, i.src[1]);
    float x[kLanes], y[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        x[l] = brain ? bfloat_to_float(a[l]) : half_to_float(a[l]);
        y[l] = brain ? bfloat_to_float(b[l]) : half_to_float(b[l]);
    }
    finish(w, i, compare(i.op, x, y), m);
}

template <bool brain>
void run_pair(Warp& w, const Instr& i, u32 m) {  // p for the low halves, q for the high ones
    const u32 *a = lanes_in<u32>(w, i.src[0]), *b = lanes_in<u32>(w, i.src[1]);
    u32 p = i.src[2].exists ? predicate(w, i.src[2]) : 0;
    for (int part = 0; part < 2; ++part) {
        float x[kLanes], y[kLanes];
        for (int l = 0; l < kLanes; ++l) {
            u16 xa = u16(a[l] >> 16 * part), yb = u16(b[l] >> 16 * part);
            x[l] = brain ? bfloat_to_float(xa) : half_to_float(xa);
            y[l] = brain ? bfloat_to_float(yb) : half_to_float(yb);
        }
        predicate_out(w, part ? i.dst2 : i.dst, combine(u8(i.immediate), compare(i.op, x, y), p), m);
    }
}

RunFn pick(Type type, bool ftz) {
    switch (type) {
    case Type::b16: case Type::u16: return run<u16>;
    case Type::s16: return run<i16>;
    case Type::b32: case Type::u32: return run<u32>;
    case Type::s32: return run<i32>;
    case Type::b64: case Type::u64: return run<u64>;
    case Type::s64: return run<i64>;
    case Type::f32: return ftz ? run_flushed : run<float>;
    case Type::f64: return run<double>;
    case Type::f16: return run_half<false>;
    case Type::bf16: return run_half<true>;
    case Type::f16x2: return run_pair<false>;
    case Type::bf16x2: return run_pair<true>;
    default: return nullptr;
    }
}

template <class T>
void select(Warp& w, const Instr& i, u32 m) {
    const T *a = lanes_in<T>(w, i.src[0]), *b = lanes_in<T>(w, i.src[1]);
    const u32 p = predicate(w, i.src[2]);
    alignas(64) T r[kLanes];
    for (int l = 0; l < kLanes; ++l) r[l] = p >> l & 1 ? a[l] : b[l];
    lanes_out(w, i.dst, r, m);
}

void select_pred(Warp& w, const Instr& i, u32 m) {
    u32 a = predicate(w, i.src[0]), b = predicate(w, i.src[1]), p = predicate(w, i.src[2]);
    predicate_out(w, i.dst, (a & p) | (b & ~p), m);
}

template <class T>
void select_by_sign(Warp& w, const Instr& i, u32 m) {
    const T *a = lanes_in<T>(w, i.src[0]), *b = lanes_in<T>(w, i.src[1]);
    const u32* c = lanes_in<u32>(w, i.src[2]);
    alignas(64) T r[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        bool first = i.from == Type::f32 ? bits_as<float>(c[l]) >= 0 : i32(c[l]) >= 0;
        r[l] = first ? a[l] : b[l];
    }
    lanes_out(w, i.dst, r, m);
}

void decode_set(Decoder& d, const Statement& st, Instr& i) {
    const Type type = type_at(st, 0);
    need_args(st, 3);
    i.type = st.op[0] == "setp" ? Type::pred : type_at(st, 1);
    i.dst = d.result(st.args[0]);
    if (!st.args[0].parts.empty()) i.dst2 = d.result(st.args[0].parts[0]);
    i.src[0] = d.value(st.args[1], type);
    i.src[1] = d.value(st.args[2], type);
    const char* combines[] = {"", "and", "or", "xor"};
    for (u8 k = 1; k < 4; ++k) {
        if (has(st, combines[k])) i.immediate = k;
    }
    if (i.immediate) i.src[2] = d.value(st.args.at(3), Type::pred);
    string cmp = st.op[1];
    if (!is_float(type)) cmp = cmp == "lo" ? "lt" : cmp == "ls" ? "le" : cmp == "hi" ? "gt" : cmp == "hs" ? "ge" : cmp;
    while (i.op < 14 && cmp != kCmpNames[i.op]) ++i.op;
    if (i.op < 14 && bytes_of(i.type) != 2 && bytes_of(i.type) != 8) i.run = pick(type, has(st, "ftz"));
    i.integer = !is_float(type);
}

}  // namespace

bool decode_compare(Decoder& d, const Statement& st, Instr& i) {
    const string& base = st.op[0];
    if (base == "setp" || base == "set") {
        decode_set(d, st, i);
    } else if (base == "selp") {
        plain_operands(d, st, i, 2);
        i.src[2] = d.value(st.args.at(3), Type::pred);
        const int bytes = bytes_of(i.type);
        i.run = i.type == Type::pred ? select_pred : bytes == 2 ? select<u16> : bytes == 4 ? select<u32> : select<u64>;
        i.integer = true;
    } else if (base == "slct") {
        i.from = type_at(st, 0);
        i.type = type_at(st, 1);
        need_args(st, 4);
        i.dst = d.result(st.args[0]);
        for (int k = 0; k < 3; ++k) i.src[k] = d.value(st.args[k + 1], k < 2 ? i.type : i.from);
        const int bytes = bytes_of(i.type);
        i.run = bytes == 2 ? select_by_sign<u16> : bytes == 4 ? select_by_sign<u32> : select_by_sign<u64>;
    } else {
        return false;
    }
    return true;
}

}  // namespace ptx
