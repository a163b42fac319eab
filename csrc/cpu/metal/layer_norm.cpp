#include "layer_norm.h"

#include "norm_threads.h"

namespace pyfast {

template <>
void layer_norm<kIsa>(const NormArgs& a) {
  norm<true>(a);
}

template <>
void layer_norm_backward<kIsa>(const NormBackwardArgs& a) {
  norm_backward<true>(a);
}

}  // namespace pyfast
