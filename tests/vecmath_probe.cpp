// The vector functions of csrc/cpu/metal for one instruction set, as C functions that tests/test_vecmath.py calls.
#include "metal/vecmath.h"

namespace pyfast {
namespace {

template <class F>
void map(const float* x, float* y, int64_t n, const F& f) {
  sweep<float>(n, [&](auto lanes, int64_t i) { lanes.store(y + i, f(lanes.load(x + i))); });
}

template <class T>
void widen(const uint16_t* x, float* y, int64_t n) {
  sweep<float>(n, [&](auto lanes, int64_t i) { lanes.store(y + i, lanes.load(reinterpret_cast<const T*>(x) + i)); });
}

template <class T>
void narrow(const float* x, uint16_t* y, int64_t n) {
  sweep<float>(n, [&](auto lanes, int64_t i) { lanes.store(reinterpret_cast<T*>(y) + i, lanes.load(x + i)); });
}

}  // namespace
}  // namespace pyfast

using namespace pyfast;

extern "C" {
void probe_exp(const float* x, float* y, int64_t n) { map(x, y, n, [](VecF v) { return pyfast::exp(v); }); }
void probe_exp_to_one(const float* x, float* y, int64_t n) { map(x, y, n, [](VecF v) { return exp_to_one(v); }); }
void probe_tanh(const float* x, float* y, int64_t n) { map(x, y, n, [](VecF v) { return pyfast::tanh(v); }); }
void probe_erf(const float* x, float* y, int64_t n) { map(x, y, n, [](VecF v) { return pyfast::erf(v); }); }
void probe_sigmoid(const float* x, float* y, int64_t n) { map(x, y, n, [](VecF v) { return sigmoid(v); }); }
void probe_log1p_unit(const float* x, float* y, int64_t n) { map(x, y, n, [](VecF v) { return log1p_unit(v); }); }
void probe_log_from_one(const float* x, float* y, int64_t n) {
  map(x, y, n, [](VecF v) { return log_from_one(v); });
}
void probe_sqrt(const float* x, float* y, int64_t n) { map(x, y, n, [](VecF v) { return pyfast::sqrt(v); }); }
void widen_bf16(const uint16_t* x, float* y, int64_t n) { widen<bf16>(x, y, n); }
void widen_f16(const uint16_t* x, float* y, int64_t n) { widen<f16>(x, y, n); }
void narrow_bf16(const float* x, uint16_t* y, int64_t n) { narrow<bf16>(x, y, n); }
void narrow_f16(const float* x, uint16_t* y, int64_t n) { narrow<f16>(x, y, n); }
}
