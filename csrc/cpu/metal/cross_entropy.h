#pragma once

#include "../../dispatch.h"
#include "../isa.h"

namespace pyfast {

// Logits [rows, cols] with adjacent columns and any row stride (in elements); every target a class or ignore_index;
// null means absent. `weight`,
// `loss` and `lse` are of the accumulator type. `lse` [rows, 2] is log(sum(exp(x))) as the maximum and the logarithm
// of the sum of exp(x - maximum): added up, they would lose two digits for logits of about -100 (GPT-2's).
struct CrossEntropyArgs {
  DType dtype;
  int64_t rows, cols, row_stride;
  const void* logits;
  const int64_t* target;
  const void* weight;
  int64_t ignore_index;
  double label_smoothing;
  void *loss, *lse;           // [rows], [rows, 2]
};

struct CrossEntropyBackwardArgs {
  DType dtype;
  int64_t rows, cols, row_stride;
  const void* logits;
  const int64_t* target;
  const void* weight;
  int64_t ignore_index;
  double label_smoothing;
  const void* grad_loss;      // of the accumulator type
  int64_t grad_loss_stride;   // 0: one number for all rows
  double grad_scale;          // multiplies it
  const void* lse;
  void* grad_logits;          // [rows, cols], contiguous
};

template <Isa kIsa> void cross_entropy(const CrossEntropyArgs&);
template <Isa kIsa> void cross_entropy_backward(const CrossEntropyBackwardArgs&);

}  // namespace pyfast
