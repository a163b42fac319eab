// The activations, once: for whole CPU vectors and for GPU scalars alike. Each function takes any type V with
// arithmetic, comparison, `c ? a : b` and exp / tanh / erf / sigmoid / log1p_unit declared before this header.
#pragma once

#include "dispatch.h"

#ifdef __CUDACC__
#define PYFAST_DEVICE __device__
#else
#define PYFAST_DEVICE
#endif

namespace pyfast {

namespace {

template <class V>
struct GeluTanh {   // gelu(x) ~ x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)  (Hendrycks & Gimpel, 2016)
  using S = scalar_t<V>;
  static constexpr S kScale = S(0.79788456080286535588), kCubic = S(0.044715);
  static PYFAST_DEVICE V twice_u(V x) { return x * (x * x * (2 * kScale * kCubic) + 2 * kScale); }
  static PYFAST_DEVICE V twice_u_grad(V x) { return x * x * (6 * kScale * kCubic) + 2 * kScale; }
};

template <class V>
PYFAST_DEVICE V softplus(V x) {   // log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)
  const V size = x < 0 ? -x : x;
  return (x < 0 ? V{} : x) + log1p_unit(exp(-size));
}

template <class V>
PYFAST_DEVICE V tanh_softplus(V x) {   // tanh(log(1 + w)) = (w^2 + 2w) / (w^2 + 2w + 2), w = e^x; 1 beyond x = 20
  using S = scalar_t<V>;
  const V w = exp(x > S(20) ? V{} + S(20) : x), n = w * (w + 2);
  return n / (n + 2);
}

template <Act kAct, class V>
PYFAST_DEVICE inline V activate(V x) {
  using S = scalar_t<V>;
  if constexpr (kAct == Act::relu) return x < 0 ? V{} : x;
  if constexpr (kAct == Act::gelu) return x * S(0.5) * (erf(x * S(0.70710678118654752440)) + 1);
  if constexpr (kAct == Act::gelu_tanh) return x * sigmoid(GeluTanh<V>::twice_u(x));
  if constexpr (kAct == Act::silu) return x * sigmoid(x);
  if constexpr (kAct == Act::sigmoid) return sigmoid(x);
  if constexpr (kAct == Act::tanh) return tanh(x);
  if constexpr (kAct == Act::leaky_relu) return x < 0 ? x * S(0.01) : x;
  if constexpr (kAct == Act::elu) {   // e^x - 1 = 2t / (1 - t), t = tanh(x/2): no cancellation near 0
    const V t = tanh((x < 0 ? x : V{}) * S(0.5));
    return x > 0 ? x : 2 * t / (1 - t);
  }
  if constexpr (kAct == Act::softplus) return softplus(x);
  if constexpr (kAct == Act::mish) return x * tanh_softplus(x);
  return x;
}

// d activate / dx; `s` is the output or the pre-activation, as grad_from_output says.
template <Act kAct, class V>
PYFAST_DEVICE inline V activate_grad(V s) {
  using S = scalar_t<V>;
  const V one = V{} + S(1);
  if constexpr (kAct == Act::relu) return s > 0 ? one : V{};
  if constexpr (kAct == Act::gelu) {
    const V density = exp(s * s * S(-0.5)) * S(0.39894228040143267794);
    return (erf(s * S(0.70710678118654752440)) + 1) * S(0.5) + s * density;
  }
  if constexpr (kAct == Act::gelu_tanh) {
    const V p = sigmoid(GeluTanh<V>::twice_u(s));
    return p + s * p * (1 - p) * GeluTanh<V>::twice_u_grad(s);
  }
  if constexpr (kAct == Act::silu) {
    const V p = sigmoid(s);
    return p * (s * (1 - p) + 1);
  }
  if constexpr (kAct == Act::sigmoid) return s * (1 - s);
  if constexpr (kAct == Act::tanh) return 1 - s * s;
  if constexpr (kAct == Act::leaky_relu) return s > 0 ? one : V{} + S(0.01);
  if constexpr (kAct == Act::elu) return s > 0 ? one : s + 1;
  if constexpr (kAct == Act::softplus) return sigmoid(s);
  if constexpr (kAct == Act::mish) {
    const V t = tanh_softplus(s);
    return t + s * (1 - t * t) * sigmoid(s);
  }
  return one;
}

}  // namespace
}  // namespace pyfast
