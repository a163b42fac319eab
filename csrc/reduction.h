// How the losses of rows become one: a word of the two cross entropies on every device.
#pragma once

#include "checks.h"

namespace pyfast {

enum class Reduction { none, mean, sum };

inline Reduction parse_reduction(const char* op, const std::string& word) {
  if (word == "none") return Reduction::none;
  if (word == "mean") return Reduction::mean;
  PYFAST_EXPECT(word == "sum", op, ": reduction must be none, mean or sum; got ", word);
  return Reduction::sum;
}

}  // namespace pyfast
