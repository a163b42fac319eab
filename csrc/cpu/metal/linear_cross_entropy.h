#pragma once

#include "../../dispatch.h"
#include "../isa.h"

namespace pyfast {

// loss = cross entropy of x weight^T + bias, and its gradients, over the rows whose target counts. Null means
// absent or not wanted. loss, lse, grad_loss and class_weight are of the accumulator type.
struct LinearCrossEntropyArgs {
  DType dtype;
  int64_t rows, classes, depth;     // rows: those that count
  const int64_t* row_index;         // [rows]: where they are in x, target, loss, lse, grad_loss and dx
  const void* x;                    // [.., depth], columns side by side
  int64_t x_row_stride;
  const void* weight;               // [classes, depth]
  int64_t weight_row_stride, weight_col_stride;
  const void* bias;                 // [classes]
  const int64_t* target;
  const void* class_weight;
  double label_smoothing;
  bool lse_known;                   // only gradients are wanted, lse is given
  const void* grad_loss;            // null: ones
  int64_t grad_loss_stride;         // 0: one number for all rows
  double grad_scale;                // multiplies it
  void *loss, *lse;                 // [..], [.., 2]
  void *dx, *dweight, *dbias;       // contiguous; of 16-bit dtypes only where lse_known or the logits are kept whole
  void* workspace;                  // of linear_cross_entropy_workspace() bytes
};

// Whether the logits are few enough to be kept whole, in float32, from the loss to the gradients: what the door
// promises of memory allows for it.
constexpr bool keeps_whole_logits(int64_t rows, int64_t classes) {
  return classes <= 0 || rows <= (int64_t(32) << 20) / (classes * int64_t(sizeof(float)));
}

template <Isa kIsa> int64_t linear_cross_entropy_workspace(const LinearCrossEntropyArgs&);
template <Isa kIsa> void linear_cross_entropy(const LinearCrossEntropyArgs&);

}  // namespace pyfast
