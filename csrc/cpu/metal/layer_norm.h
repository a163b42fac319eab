#pragma once

#include "norm.h"

namespace pyfast {

template <Isa kIsa> void layer_norm(const NormArgs&);
template <Isa kIsa> void layer_norm_backward(const NormBackwardArgs&);

}  // namespace pyfast
