#include "rms_norm.h"

#include "norm_threads.h"

namespace pyfast {

template <>
void rms_norm<kIsa>(const NormArgs& a) {
  norm<false>(a);
}

template <>
void rms_norm_backward<kIsa>(const NormBackwardArgs& a) {
  norm_backward<false>(a);
}

}  // namespace pyfast
