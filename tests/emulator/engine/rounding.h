// Rounding of single numbers: half types, flushing of subnormals, rounding modes, ulps.
#pragma once
#include <cfenv>
#include <cmath>
#include <limits>

#include "isa.h"
#include "machine.h"

namespace ptx {

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

inline float half_to_float(u16 h) { return float(bits_as<_Float16>(h)); }
inline u16 float_to_half(float f) { return f != f ? 0x7fff : bits_as<u16>(_Float16(f)); }
inline float bfloat_to_float(u16 b) { return bits_as<float>(u32(b) << 16); }

inline u16 float_to_bfloat(float f) {
    u32 u = bits_as<u32>(f);
    u32 rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return f != f ? 0x7fff : u16(rounded);
}

// To float so that a further rounding to fewer bits is right: truncate, and keep a sticky last bit.
inline float round_to_odd(double d) {
    float f = float(d);
    if (double(f) == d || f != f) return f;
    u32 u = bits_as<u32>(f);
    if (std::fabs(double(f)) > std::fabs(d)) --u;  // towards zero
    return bits_as<float>(u | 1);
}

inline u16 double_to_half(double d) { return float_to_half(round_to_odd(d)); }

inline u16 double_to_bfloat(double d) { return float_to_bfloat(round_to_odd(d)); }

inline float flush(float f) {
    u32 u = bits_as<u32>(f);
    return u & 0x7f800000 ? f : bits_as<float>(u & 0x80000000);
}

inline double flush(double d) { return d; }

inline int fenv_mode(Round round) {
    switch (round) {
    case Round::zero: return FE_TOWARDZERO;
    case Round::down: return FE_DOWNWARD;
    case Round::up: return FE_UPWARD;
    default: return FE_TONEAREST;
    }
}

// The processor rounds this way until the end of the scope.
class RoundingScope {
public:
    explicit RoundingScope(Round round) : changed_(round != Round::nearest) {
        if (changed_) fesetround(fenv_mode(round));
    }
    ~RoundingScope() {
        if (changed_) fesetround(FE_TONEAREST);
    }

private:
    bool changed_;
};

// Whether the launch moves approximate results.
bool perturbs(const Warp& w, const Instr& i);

// Each moved by at most two units in the last place, by a fixed hash of value, operation and seed: what lanes
// compute from the same operands is the same, as on a GPU, where several may store it to one place.
void perturb(const Warp& w, const Instr& i, float* values);

}  // namespace ptx
