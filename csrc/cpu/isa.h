// Which instruction set the CPU kernels use: chosen once at load, or forced by PYFAST_CPU_ISA.
#pragma once

#include <utility>

#include "../dispatch.h"

namespace pyfast {

enum class Isa { generic, avx2, avx512, avx512_bf16, amx };   // each level contains the ones before it

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);       // by this processor and operating system
Isa current_isa();
bool rounds_bfloat16();            // at the current level
bool select_isa(const char* name); // false: no such level here, nothing changed

template <Isa kIsa>
struct IsaTag {
  static constexpr Isa value = kIsa;
};

// Calls f(IsaTag) for the best level the kernels of one operation were compiled for.
template <class F>
void dispatch_isa(F&& f) {
#ifdef __x86_64__
  if (current_isa() >= Isa::avx512) return f(IsaTag<Isa::avx512>{});
  if (current_isa() == Isa::avx2) return f(IsaTag<Isa::avx2>{});
#endif
  f(IsaTag<Isa::generic>{});
}

// The same for kernels that also exist at the level that rounds to bfloat16 by one instruction, in that dtype's form
// alone: a third of the time of many.
template <class F>
void dispatch_isa(DType dtype, F&& f) {
#ifdef __x86_64__
  if (dtype == DType::bfloat16 && rounds_bfloat16()) return f(IsaTag<Isa::avx512_bf16>{});
#endif
  dispatch_isa(std::forward<F>(f));
}

// The same for kernels made of matrix products. Above AVX-512 are levels that multiply bfloat16: of these kernels they
// have that dtype's form and no other.
template <class F>
void dispatch_matmul_isa(DType dtype, F&& f) {
#ifdef __x86_64__
  if (dtype == DType::bfloat16) {
    if (current_isa() == Isa::amx) return f(IsaTag<Isa::amx>{});
    if (current_isa() == Isa::avx512_bf16) return f(IsaTag<Isa::avx512_bf16>{});
  }
#endif
  dispatch_isa(std::forward<F>(f));
}

}  // namespace pyfast
