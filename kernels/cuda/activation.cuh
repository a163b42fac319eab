// csrc/activation.h for the GPU: its functions of a vector, for a float.
#pragma once

#include <cmath>

namespace pyfast {

__device__ __forceinline__ float exp(float x) { return expf(x); }
__device__ __forceinline__ float tanh(float x) { return tanhf(x); }
__device__ __forceinline__ float erf(float x) { return erff(x); }
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float log1p_unit(float x) { return log1pf(x); }

}  // namespace pyfast

#include "../../csrc/activation.h"

namespace pyfast {

// f(std::integral_constant-like tag with the activation as `value`): the choice is made once, outside of loops.
template <Act kAct>
struct ActTag {
  static constexpr Act value = kAct;
};

template <class F>
__device__ __forceinline__ void dispatch_act(Act act, const F& f) {
  switch (act) {
    case Act::none: return f(ActTag<Act::none>{});
    case Act::relu: return f(ActTag<Act::relu>{});
    case Act::gelu: return f(ActTag<Act::gelu>{});
    case Act::gelu_tanh: return f(ActTag<Act::gelu_tanh>{});
    case Act::silu: return f(ActTag<Act::silu>{});
    case Act::sigmoid: return f(ActTag<Act::sigmoid>{});
    case Act::tanh: return f(ActTag<Act::tanh>{});
    case Act::leaky_relu: return f(ActTag<Act::leaky_relu>{});
    case Act::elu: return f(ActTag<Act::elu>{});
    case Act::softplus: return f(ActTag<Act::softplus>{});
    case Act::mish: return f(ActTag<Act::mish>{});
  }
}

}  // namespace pyfast
