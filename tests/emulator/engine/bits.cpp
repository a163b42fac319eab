// Bits: and or xor not cnot shl shr shf lop3 prmt bfe bfi bmsk popc clz bfind brev fns.
#include <algorithm>
#include <type_traits>

#include "lanewise.h"

namespace ptx {
namespace {

enum Op : u8 { kAnd, kOr, kXor, kNot, kCnot };

template <class T, Op op>
void logic(Warp& w, const Instr& i, u32 m) {
    if constexpr (op == kNot) unary<T, T>(w, i, m, [](T a) { return T(~a); });
    else if constexpr (op == kCnot) unary<T, T>(w, i, m, [](T a) { return T(a == 0); });
    else if constexpr (op == kAnd) binary<T, T>(w, i, m, [](T a, T b) { return T(a & b); });
    else if constexpr (op == kOr) binary<T, T>(w, i, m, [](T a, T b) { return T(a | b); });
    else binary<T, T>(w, i, m, [](T a, T b) { return T(a ^ b); });
}

template <Op op>
void logic_pred(Warp& w, const Instr& i, u32 m) {
    u32 a = predicate(w, i.src[0]), b = op == kNot ? 0 : predicate(w, i.src[1]);
    predicate_out(w, i.dst, op == kAnd ? a & b : op == kOr ? a | b : op == kXor ? a ^ b : ~a, m);
}

template <Op op>
RunFn pick(Type type) {
    switch (bytes_of(type)) {
    case 1: return logic_pred<op>;
    case 2: return logic<u16, op>;
    case 4: return logic<u32, op>;
    case 8: return logic<u64, op>;
    default: return nullptr;
    }
}

template <class T>
void shift_left(Warp& w, const Instr& i, u32 m) {
    const T* a = lanes_in<T>(w, i.src[0]);
    const u32* by = lanes_in<u32>(w, i.src[1]);
    constexpr u32 bits = 8 * sizeof(T);
    alignas(64) T r[kLanes];
    for (int l = 0; l < kLanes; ++l) r[l] = by[l] < bits ? T(a[l] << (by[l] & (bits - 1))) : T(0);
    lanes_out(w, i.dst, r, m);
}

template <class T>
void shift_right(Warp& w, const Instr& i, u32 m) {
    const T* a = lanes_in<T>(w, i.src[0]);
    const u32* by = lanes_in<u32>(w, i.src[1]);
    constexpr u32 bits = 8 * sizeof(T);
    alignas(64) T r[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        u32 n = std::min(by[l], bits - 1);
        r[l] = std::is_signed_v<T> || by[l] < bits ? T(a[l] >> n) : T(0);
    }
    lanes_out(w, i.dst, r, m);
}

void funnel(Warp& w, const Instr& i, u32 m) {  // op: left; flag: clamp
    const u32 *lo = lanes_in<u32>(w, i.src[0]), *hi = lanes_in<u32>(w, i.src[1]), *by = lanes_in<u32>(w, i.src[2]);
    alignas(64) u32 r[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        u32 n = i.flag ? std::min(by[l], 32u) : by[l] & 31;
        u64 both = u64(hi[l]) << 32 | lo[l];
        r[l] = i.op ? u32((both << n) >> 32) : u32(both >> n);
    }
    lanes_out(w, i.dst, r, m);
}

void lop3(Warp& w, const Instr& i, u32 m) {
    const u32 *a = lanes_in<u32>(w, i.src[0]), *b = lanes_in<u32>(w, i.src[1]), *c = lanes_in<u32>(w, i.src[2]);
    alignas(64) u32 r[kLanes] = {};
    for (int k = 0; k < 8; ++k) {
        if (!(i.immediate >> k & 1)) continue;
        u32 fa = k & 4 ? 0 : kAll, fb = k & 2 ? 0 : kAll, fc = k & 1 ? 0 : kAll;
        for (int l = 0; l < kLanes; ++l) r[l] |= (a[l] ^ fa) & (b[l] ^ fb) & (c[l] ^ fc);
    }
    lanes_out(w, i.dst, r, m);
}

// op 0 is the plain form; the others pick bytes by the low two bits of the control.
enum Permute : u8 { kPlain, kF4e, kB4e, kRc8, kEcl, kEcr, kRc16 };

u32 permute_control(u8 mode, u32 c) {
    c &= 3;
    static const u16 table[7][4] = {{},
                                    {0x3210, 0x4321, 0x5432, 0x6543},
                                    {0x5670, 0x6701, 0x7012, 0x0123},
                                    {0x0000, 0x1111, 0x2222, 0x3333},
                                    {0x3210, 0x3211, 0x3222, 0x3333},
                                    {0x0000, 0x1110, 0x2210, 0x3210},
                                    {0x1010, 0x3232, 0x1010, 0x3232}};
    return table[mode][c];
}

void permute(Warp& w, const Instr& i, u32 m) {
    const u32 *a = lanes_in<u32>(w, i.src[0]), *b = lanes_in<u32>(w, i.src[1]), *c = lanes_in<u32>(w, i.src[2]);
    alignas(64) u32 r[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        u64 both = u64(b[l]) << 32 | a[l];
        u32 control = i.op ? permute_control(i.op, c[l]) : c[l];
        r[l] = 0;
        for (int k = 0; k < 4; ++k) {
            u32 pick = control >> 4 * k & 15;
            u8 byte = u8(both >> 8 * (pick & 7));
            if (pick & 8) byte = byte & 128 ? 255 : 0;
            r[l] |= u32(byte) << 8 * k;
        }
    }
    lanes_out(w, i.dst, r, m);
}

template <class T>
T extract(T value, u32 pos, u32 len) {
    using U = std::make_unsigned_t<T>;
    constexpr u32 bits = 8 * sizeof(T);
    pos &= 255;
    len &= 255;
    bool sign = std::is_signed_v<T> && len && (U(value) >> std::min(pos + len - 1, bits - 1) & 1);
    U r = pos >= bits ? 0 : U(value) >> pos;
    if (pos < bits && len < bits) r &= (U(1) << len) - 1;
    u32 have = pos >= bits ? 0 : std::min(len, bits - pos);  // bits that come from the value
    if (sign && have < bits) r |= ~U(0) << have;
    return len ? T(r) : T(0);
}

template <class T>
void bit_extract(Warp& w, const Instr& i, u32 m) {
    const T* a = lanes_in<T>(w, i.src[0]);
    const u32 *pos = lanes_in<u32>(w, i.src[1]), *len = lanes_in<u32>(w, i.src[2]);
    alignas(64) T r[kLanes];
    for (int l = 0; l < kLanes; ++l) r[l] = extract(a[l], pos[l], len[l]);
    lanes_out(w, i.dst, r, m);
}

template <class T>
void bit_insert(Warp& w, const Instr& i, u32 m) {
    const T *a = lanes_in<T>(w, i.src[0]), *b = lanes_in<T>(w, i.src[1]);
    const u32 *position = lanes_in<u32>(w, i.src[2]), *length = lanes_in<u32>(w, i.src[3]);
    constexpr u32 bits = 8 * sizeof(T);
    alignas(64) T r[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        u32 pos = position[l] & 255, len = length[l] & 255;
        T field = len >= bits ? ~T(0) : T((T(1) << len) - 1);
        T where = pos >= bits ? T(0) : T(field << pos);
        r[l] = T((b[l] & ~where) | (pos >= bits ? T(0) : T(a[l] << pos) & where));
    }
    lanes_out(w, i.dst, r, m);
}

void bit_mask(Warp& w, const Instr& i, u32 m) {
    binary<u32, u32>(w, i, m, [&](u32 a, u32 b) {
        u32 pos = i.flag ? a & 31 : std::min(a, 32u), len = i.flag ? b & 31 : std::min(b, 32u);
        return u32(((1ull << len) - 1) << pos);
    });
}

template <class T>
int leading_zeros(T a) {
    return a == 0 ? int(8 * sizeof(T)) : __builtin_clzll(a) - int(64 - 8 * sizeof(T));
}

template <class T>
u32 find_first(T a, bool shift_amount) {
    using U = std::make_unsigned_t<T>;
    U u = U(a);
    if (std::is_signed_v<T> && a < 0) u = ~u;
    if (u == 0) return kAll;
    u32 pos = 8 * sizeof(T) - 1 - leading_zeros(u);
    return shift_amount ? 8 * sizeof(T) - 1 - pos : pos;
}

template <class T>
T reversed(T a) {
    T r = 0;
    for (size_t k = 0; k < 8 * sizeof(T); ++k) r |= (a >> k & 1) << (8 * sizeof(T) - 1 - k);
    return r;
}

template <class T>
void population(Warp& w, const Instr& i, u32 m) { unary<u32, T>(w, i, m, [](T a) { return __builtin_popcountll(a); }); }
template <class T>
void zeros(Warp& w, const Instr& i, u32 m) { unary<u32, T>(w, i, m, [](T a) { return leading_zeros(a); }); }
template <class T>
void reverse(Warp& w, const Instr& i, u32 m) { unary<T, T>(w, i, m, [](T a) { return reversed(a); }); }
template <class T>
void find(Warp& w, const Instr& i, u32 m) {
    const bool shift = i.flag;
    unary<u32, T>(w, i, m, [=](T a) { return find_first(a, shift); });
}


RunFn by_type(Type t, RunFn f32u, RunFn f32s, RunFn f64u, RunFn f64s, RunFn f16u = nullptr, RunFn f16s = nullptr) {
    switch (bytes_of(t)) {
    case 2: return is_signed(t) ? f16s : f16u;
    case 4: return is_signed(t) ? f32s : f32u;
    case 8: return is_signed(t) ? f64s : f64u;
    default: return nullptr;
    }
}

void more_operands(Decoder& d, const Statement& st, Instr& i, int typed, int words) {
    plain_operands(d, st, i, typed);
    need_args(st, typed + words + 1);
    for (int k = typed; k < typed + words; ++k) i.src[k] = d.value(st.args[k + 1], Type::u32);
}

bool decode_fields(Decoder& d, const Statement& st, Instr& i) {
    const string& base = st.op[0];
    if (base == "bfe") {
        more_operands(d, st, i, 1, 2);
        i.run = by_type(i.type, bit_extract<u32>, bit_extract<i32>, bit_extract<u64>, bit_extract<i64>);
    } else if (base == "bfi") {
        more_operands(d, st, i, 2, 2);
        i.run = by_type(i.type, bit_insert<u32>, nullptr, bit_insert<u64>, nullptr);
    } else if (base == "bmsk") {
        plain_operands(d, st, i, 2);
        i.flag = has(st, "wrap");
        i.run = bit_mask;
    } else if (base == "popc" || base == "clz" || base == "brev" || base == "bfind") {
        plain_operands(d, st, i, 1);
        i.flag = has(st, "shiftamt");
        i.run = base == "popc"   ? by_type(i.type, population<u32>, nullptr, population<u64>, nullptr)
                : base == "clz"  ? by_type(i.type, zeros<u32>, nullptr, zeros<u64>, nullptr)
                : base == "brev" ? by_type(i.type, reverse<u32>, nullptr, reverse<u64>, nullptr)
                                 : by_type(i.type, find<u32>, find<i32>, find<u64>, find<i64>);
    } else {
        return false;
    }
    return true;
}

}  // namespace

bool decode_bits(Decoder& d, const Statement& st, Instr& i) {
    const string& base = st.op[0];
    i.integer = type_at(st, 0) != Type::pred;
    if (base == "and" || base == "or" || base == "xor") {
        plain_operands(d, st, i, 2);
        i.run = base == "and" ? pick<kAnd>(i.type) : base == "or" ? pick<kOr>(i.type) : pick<kXor>(i.type);
    } else if (base == "not" || base == "cnot") {
        plain_operands(d, st, i, 1);
        i.run = base == "not" ? pick<kNot>(i.type) : pick<kCnot>(i.type);
    } else if (base == "shl") {
        more_operands(d, st, i, 1, 1);
        i.run = by_type(i.type, shift_left<u32>, nullptr, shift_left<u64>, nullptr, shift_left<u16>);
    } else if (base == "shr") {
        more_operands(d, st, i, 1, 1);
        i.run = by_type(i.type, shift_right<u32>, shift_right<i32>, shift_right<u64>, shift_right<i64>,
                        shift_right<u16>, shift_right<i16>);
    } else if (base == "shf") {
        plain_operands(d, st, i, 3);
        i.op = has(st, "l");
        i.flag = has(st, "clamp");
        i.run = funnel;
    } else if (base == "lop3") {
        plain_operands(d, st, i, 3);
        if (st.args.size() != 5) throw Unsupported("lop3 with a predicate is not modelled: " + st.text);
        i.immediate = i64(st.args[4].bits);
        i.run = lop3;
    } else if (base == "prmt") {
        plain_operands(d, st, i, 3);
        const char* modes[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
        for (u8 k = 1; k < 7; ++k) {
            if (has(st, modes[k])) i.op = k;
        }
        i.run = permute;
    } else if (!decode_fields(d, st, i)) {
        i.integer = false;
        return false;
    }
    return true;
}

}  // namespace ptx
