// exp, tanh, erf, sigmoid and log1p on whole vectors. The float polynomials are our own minimax fits (error
// bounds in the comments; tests/test_vecmath.py measures them in ulp over the whole range); double calls libm.
#pragma once

#include "vec.h"

namespace pyfast {
namespace {

template <class F>
inline VecD each_lane(VecD x, const F& f) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = f(x[i]);
  return x;
}

// The exponent field of 2^n as a float; n in [-126, 127].
inline VecF power_of_two(VecI n) { return (VecF)((n + 127) << 23); }

// e^x = 2^n e^r, |r| <= ln(2)/2, e^r = 1 + r + r^2 P(r) with |error| < 4e-9. Overflows to infinity as libm's does; a
// NaN stays one. Below the normal numbers it is 0: a subnormal result costs the processor some 150 cycles.
inline VecF exp(VecF x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.f;                          // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLeast = -87.3f;                              // e^x is normal from -87.33
  x = min_of(splat(89.f), x);   // keeps a NaN
  const VecF n = (x * kLog2e + kRound) - kRound;
  const VecF r = (x - n * kLn2High) - n * kLn2Low;
  VecF p = r * 0.0013950478751212358f + 0.008368884213268757f;
  p = p * r + 0.04166620597243309f;
  p = p * r + 0.166665181517601f;
  p = p * r + 0.5f;
  p = p * (r * r) + (r + 1.f);
#ifdef __AVX512F__
  return (VecF)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(kLeast), _CMP_NLT_UQ), (__m512)p,
                                      (__m512)n);
#else
  const VecI whole = __builtin_convertvector(x >= kLeast ? n : VecF{}, VecI), half = whole >> 1;   // 2^n in two steps
  return x < kLeast ? VecF{} : p * power_of_two(half) * power_of_two(whole - half);
#endif
}
inline VecD exp(VecD x) { return each_lane(x, [](double v) { return __builtin_exp(v); }); }

// e^x = 2^n 2^f for x of 0 or less, for sums whose largest term is 1: 4/5 of the time of exp(). 2^f = 1 + f P(f),
// |f| <= 1/2, |error| < 1.1e-7; and 1.3e-8 |x| for want of digits of log2(e), where the terms are small. It becomes 0
// where exp() does, and a NaN stays one.
inline VecF exp_to_one(VecF x) {
  constexpr float kLog2e = 1.44269504f, kRound = 12582912.f, kLeast = -87.3f;
  const VecF n = (x * kLog2e + kRound) - kRound, f = x * kLog2e - n;
  VecF p = f * 0.001326472731307149f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.f;
#ifdef __AVX512F__
  return (VecF)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(kLeast), _CMP_NLT_UQ), (__m512)p,
                                      (__m512)n);
#else
  const VecI whole = __builtin_convertvector(x >= kLeast ? n : VecF{}, VecI);
  return x < kLeast ? VecF{} : p * power_of_two(whole);
#endif
}
inline VecD exp_to_one(VecD x) { return exp(x); }

// tanh x = x + x^3 P(x^2) for |x| < 0.63 (error < 2e-10), else 1 - 2 / (e^{2|x|} + 1) with the sign of x.
inline VecF tanh(VecF x) {
  const VecF size = x < 0.f ? -x : x, z = x * x;
  VecF p = z * 0.0021227425895631313f - 0.008156276308000088f;
  p = p * z + 0.021692605689167976f;
  p = p * z - 0.053945377469062805f;
  p = p * z + 0.13333195447921753f;
  p = p * z - 0.3333333134651184f;
  const VecF large = 1.f - 2.f / (exp(size + size) + 1.f);
  return size < 0.625f ? x * z * p + x : x < 0.f ? -large : large;
}
inline VecD tanh(VecD x) { return each_lane(x, [](double v) { return __builtin_tanh(v); }); }

// erf x = x P(x^2) for |x| < 1 (error < 4e-11), else 1 - t e^{-x^2} Q(t) with t = 1 / (1 + |x|/2).
inline VecF erf(VecF x) {
  const VecF size = x < 0.f ? -x : x, z = x * x;
  VecF p = z * -9.680135917733423e-06f + 0.00011270544200669974f;
  p = p * z - 0.00084847112884745f;
  p = p * z + 0.005221074912697077f;
  p = p * z - 0.02686544507741928f;
  p = p * z + 0.11283782869577408f;
  p = p * z - 0.37612637877464294f;
  p = p * z + 1.128379225730896f;
  const VecF t = 1.f / (0.5f * size + 1.f);
  VecF q = t * -0.0780673697590828f + 0.36515140533447266f;
  q = q * t - 0.6328791379928589f;
  q = q * t + 0.4244139790534973f;
  q = q * t - 0.11581321805715561f;
  q = q * t + 0.2364073395729065f;
  q = q * t + 0.23538358509540558f;
  q = q * t + 0.2833544611930847f;
  q = q * t + 0.28203365206718445f;
  const VecF large = 1.f - q * t * exp(-z);
  return size < 1.f ? x * p : x < 0.f ? -large : large;
}
inline VecD erf(VecD x) { return each_lane(x, [](double v) { return __builtin_erf(v); }); }

// Correctly rounded, by the instruction.
inline VecF sqrt(VecF x) {
#if defined(__AVX512F__)
  return (VecF)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (VecF)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (VecF)_mm_sqrt_ps((__m128)x);
#else
  for (int64_t i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
inline VecD sqrt(VecD x) { return each_lane(x, [](double v) { return __builtin_sqrt(v); }); }

template <class V>
inline V sigmoid(V x) {
  return 1 / (exp(-x) + 1);
}

// log(1 + u) for u in [0, 1]: 2 artanh(s) with s = u / (2 + u) <= 1/3, artanh by a polynomial in s^2.
inline VecF log1p_unit(VecF u) {
  const VecF s = u / (u + 2.f), z = s * s;
  VecF p = z * 0.24424901604652405f + 0.213899627327919f;
  p = p * z + 0.28621041774749756f;
  p = p * z + 0.39998677372932434f;
  p = p * z + 0.6666668057441711f;
  p = p * z + 2.f;
  return s * p;
}
inline VecD log1p_unit(VecD u) { return each_lane(u, [](double v) { return __builtin_log1p(v); }); }

// log(2^n m) = n log(2) + log(m), m in [1, 2), for x of 1 or more; of 0 it is -infinity, and a NaN stays one.
inline VecF log_from_one(VecF x) {
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;   // n times the first is exact
  const VecI bits = (VecI)x;
  const VecF n = __builtin_convertvector((bits >> 23) - 127, VecF), m = (VecF)((bits & 0x7fffff) | 0x3f800000);
  const VecF log = (log1p_unit(m - 1.f) + n * kLn2Low) + n * kLn2High;
  return x >= 1.f ? log : x == 0.f ? VecF{} - __builtin_inff() : x;
}
inline VecD log_from_one(VecD x) { return each_lane(x, [](double v) { return __builtin_log(v); }); }

}  // namespace
}  // namespace pyfast
