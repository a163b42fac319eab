// Loops over the 32 lanes, which the compiler turns into vector code. All lanes are computed; those in
// the mask are kept.
#pragma once
#include "decoder.h"

namespace ptx {

using RunFn = void (*)(Warp&, const Instr&, u32);

template <class To, class From, class F>
inline void unary(Warp& w, const Instr& i, u32 mask, F f) {
    const From* a = lanes_in<From>(w, i.src[0]);
    alignas(64) To r[kLanes];
    for (int l = 0; l < kLanes; ++l) r[l] = f(a[l]);
    lanes_out(w, i.dst, r, mask);
}

template <class To, class From, class F>
inline void binary(Warp& w, const Instr& i, u32 mask, F f) {
    const From* a = lanes_in<From>(w, i.src[0]);
    const From* b = lanes_in<From>(w, i.src[1]);
    alignas(64) To r[kLanes];
    for (int l = 0; l < kLanes; ++l) r[l] = f(a[l], b[l]);
    lanes_out(w, i.dst, r, mask);
}

template <class To, class From, class F>
inline void ternary(Warp& w, const Instr& i, u32 mask, F f) {
    const From* a = lanes_in<From>(w, i.src[0]);
    const From* b = lanes_in<From>(w, i.src[1]);
    const To* c = lanes_in<To>(w, i.src[2]);
    alignas(64) To r[kLanes];
    for (int l = 0; l < kLanes; ++l) r[l] = f(a[l], b[l], c[l]);
    lanes_out(w, i.dst, r, mask);
}

// Source operands of the instruction's type, in order after the result.
inline void plain_operands(Decoder& d, const Statement& st, Instr& i, int sources) {
    need_args(st, sources + 1);
    i.type = type_at(st, 0);
    i.dst = d.result(st.args[0]);
    for (int k = 0; k < sources; ++k) i.src[k] = d.value(st.args[k + 1], i.type);
}

}  // namespace ptx
