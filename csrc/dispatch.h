// Run-time values that become template arguments or function choices, shared by rooms and metal.
#pragma once

#include <cstdint>

namespace pyfast {

enum class DType { float32, bfloat16, float16, float64 };

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// The gradient of an activation is a function of its output where that determines it, else of the pre-activation:
// what a layer has to save.
enum class Act { none, relu, gelu, gelu_tanh, silu, sigmoid, tanh, leaky_relu, elu, softplus, mish };

constexpr const char* kActNames[] = {"none",       "relu", "gelu",     "gelu_tanh", "silu", "sigmoid", "tanh",
                                     "leaky_relu", "elu",  "softplus", "mish"};
constexpr int kActCount = 11;

constexpr bool grad_from_output(Act act) {
  return act == Act::relu || act == Act::sigmoid || act == Act::tanh || act == Act::leaky_relu || act == Act::elu;
}
constexpr bool grad_from_input(Act act) { return act != Act::none && !grad_from_output(act); }

namespace {   // internal linkage: compiled once per instruction set

template <class T>
struct TypeTag {
  using type = T;
};

// f(TypeTag<T>) with T the storage type.
template <class F>
inline void dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32: return f(TypeTag<float>{});
    case DType::bfloat16: return f(TypeTag<bf16>{});
    case DType::float16: return f(TypeTag<f16>{});
    case DType::float64: return f(TypeTag<double>{});
  }
}

// The element type of a vector type; a scalar is its own.
template <class V> struct ScalarOf { using type = V; };
template <class V> using scalar_t = typename ScalarOf<V>::type;

// The type arithmetic is done in: double for double, float for all else.
template <class T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <class T> using acc_t = typename Accumulator<T>::type;

}  // namespace
}  // namespace pyfast
