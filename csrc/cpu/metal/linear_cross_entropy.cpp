// The logits [M, V] exist only as slabs of some hundred classes, or for a chunk of rows. Three products make loss
// and gradients: logits = X W^T, dX = dL W, dW = dL^T X, each 2 M V K operations.
//
// Gradients together with the loss: rows go in chunks whose logits are kept from the log-sum-exp to the gradient. For
// a chunk of R rows W is read and packed twice and dW updated in place: 4 V K numbers moved for 6 R V K operations.
// Gradients alone: all rows go at once and the logits are computed again (a fourth product), slab by slab; a slab of
// dW is finished, and rounded, before the next begins. W is packed twice and dW written once, whatever M. This is
// how the 16-bit types go: for them dW of the other way, summed in float32, would be larger than the logits.
#include "linear_cross_entropy.h"

#include "gemm.h"
#include "log_sum_exp.h"

namespace pyfast {
namespace {

constexpr int64_t kMaxSlab = 1024;                       // classes; the packed slab of W should stay in L3
constexpr int64_t kLeastBudget = int64_t(16) << 20;      // bytes of workspace that are never too many
constexpr int64_t kSlabBlocks = kMaxSlab / kBlockCols;

// Hands out pieces of the workspace; without memory, only counts.
struct Pieces {
  char* base;
  int64_t used = 0;

  template <class P>
  void take(P*& p, int64_t count) {
    p = base ? reinterpret_cast<P*>(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(P)), 64);
  }
};

template <class T>
struct LinearCrossEntropy {
  using Core = CoreFor<T>;
  using Elem = typename Core::Elem;
  using A = typename Core::Acc;

  struct Partial {
    A top, sum, weighted;   // of one row over one block of classes
  };
  struct State {
    double top, sum, weighted;
    A at_target;
  };

  const LinearCrossEntropyArgs& a;
  const A* class_weight = static_cast<const A*>(a.class_weight);
  const T* weight = static_cast<const T*>(a.weight);
  const bool gradients_wanted = a.dx || a.dweight || a.dbias;
  const bool keep = gradients_wanted && !a.lse_known;
  const int64_t logit_stride = round_up(a.classes, 16);
  int64_t chunk, slab, bytes;
  A weight_sum;

  T* gathered;       // [chunk, K]: the rows of x that count
  A* bias;           // [V]
  A* bias_gradient;  // [V]
  A* logits;         // [chunk, V] if kept, else [chunk, slab]: gradients of the logits
  A* dx;             // [chunk, K]
  Elem *x_rows, *x_cols;         // panels of X for the logits (lanes: rows) and for dW (lanes: columns)
  Elem *weight_panels, *gradient_panels;
  Partial* partial;  // [kSlabBlocks, chunk]
  State* state;      // [chunk]

  explicit LinearCrossEntropy(const LinearCrossEntropyArgs& args) : a(args) {
    plan();
    bytes = lay_out(static_cast<char*>(a.workspace));
  }

  // Workspace of about an eighth of the whole logits: a chunk of rows that keeps its logits, or else all rows and
  // slabs as wide as that allows.
  void plan() {
    const int64_t budget = max_of(kLeastBudget, a.rows * a.classes * int64_t(sizeof(T)) / 8);
    chunk = keep ? Core::kRows : a.rows;
    slab = min_of(kMaxSlab, round_up(a.classes, kBlockCols));
    while (slab > kBlockCols && lay_out(nullptr) > budget) slab = round_up(slab / 2, kBlockCols);
    if (!keep) return;
    const int64_t first = lay_out(nullptr);
    chunk = 2 * Core::kRows;
    const int64_t each = (lay_out(nullptr) - first) / Core::kRows;   // bytes per row of the chunk
    chunk = max_of(Core::kRows, (budget - first) / max_of(1, each) + Core::kRows);
    const int64_t chunks = ceil_div(a.rows, min_of(chunk, a.rows));
    chunk = min_of(a.rows, round_up(ceil_div(a.rows, chunks), Core::kRows));
  }

  int64_t lay_out(char* base) {
    Pieces pieces{base};
    const int64_t k = a.depth;
    pieces.take(gathered, chunk * k);
    pieces.take(bias, a.bias ? a.classes : 0);
    pieces.take(bias_gradient, a.dbias ? a.classes : 0);
    pieces.take(logits, keep ? chunk * logit_stride : gradients_wanted ? chunk * slab : 0);
    pieces.take(dx, a.dx ? chunk * k : 0);
    pieces.take(x_rows, panels_size<Core>(Core::kRows, chunk, k));
    pieces.take(x_cols, a.dweight ? panels_size<Core>(Core::kCols, k, chunk) : 0);
    pieces.take(weight_panels,
                max_of(panels_size<Core>(Core::kCols, slab, k), a.dx ? panels_size<Core>(Core::kCols, k, slab) : 0));
    pieces.take(gradient_panels, max_of(a.dweight ? panels_size<Core>(Core::kRows, slab, chunk) : 0,
                                        a.dx ? panels_size<Core>(Core::kRows, chunk, slab) : 0));
    pieces.take(partial, kSlabBlocks * chunk);
    pieces.take(state, chunk);
    return pieces.used;
  }

  void run() {
    weight_sum = class_total(class_weight, a.classes);
    if (a.bias)
      sweep<A>(a.classes, [&](auto lanes, int64_t i) {
        lanes.store(bias + i, lanes.load(static_cast<const T*>(a.bias) + i));
      });
    if (a.dbias) __builtin_memset(bias_gradient, 0, size_t(a.classes) * sizeof(A));
    for (int64_t first = 0; first < a.rows; first += chunk) {
      const int64_t rows = min_of(chunk, a.rows - first);
      pack_x(first, rows);
      if (!a.lse_known) find_lse(first, rows);
      if (gradients_wanted) find_gradients(first, rows);
    }
    if (a.dbias)
      sweep<A>(a.classes, [&](auto lanes, int64_t i) {
        lanes.store(static_cast<T*>(a.dbias) + i, lanes.load(bias_gradient + i));
      });
  }

  void pack_x(int64_t first, int64_t rows) {
    const int64_t k = a.depth;
    parallel_for(rows, max_of(1, 32768 / max_of(k, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        __builtin_memcpy(gathered + i * k, static_cast<const T*>(a.x) + a.row_index[first + i] * a.x_row_stride,
                         size_t(k) * sizeof(T));
    });
    pack_rows<Core>(x_rows, Operand<T>{gathered, k, 1, rows, k});
    if (a.dweight) pack_cols<Core>(x_cols, Operand<T>{gathered, 1, k, k, rows});
  }

  // f(row, class, n, x): x are the n logits from `class` on, of one row of the chunk.
  template <class F>
  void for_logits(int64_t rows, int64_t slab_first, int64_t width, const F& f) {
    const T* w = weight + slab_first * a.weight_row_stride;
    pack_cols<Core>(weight_panels, Operand<T>{w, a.weight_row_stride, a.weight_col_stride, width, a.depth});
    multiply_panels<Core>({x_rows, rows, a.depth}, {weight_panels, width, a.depth},
                          [&](int64_t row, int64_t count, int64_t col, int64_t n, A* c) {
                            for (int64_t i = 0; i < count; ++i, c += kBlockCols) {
                              if (a.bias)
                                sweep<A>(n, [&](auto lanes, int64_t j) {
                                  lanes.store(c + j, lanes.load(c + j) + lanes.load(bias + slab_first + col + j));
                                });
                              f(row + i, slab_first + col, n, c);
                            }
                          });
  }

  void find_lse(int64_t first, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) state[i] = {-__DBL_MAX__, 0, 0, 0};
    for (int64_t at = 0; at < a.classes; at += slab) {
      const int64_t width = min_of(slab, a.classes - at);
      for_logits(rows, at, width, [&](int64_t row, int64_t from, int64_t n, const A* x) {
        Partial& p = partial[(from - at) / kBlockCols * chunk + row];
        LogSumExp<A> sums;
        sums.add(x, n);
        sums.result(p.top, p.sum);
        p.weighted = 0;
        if (a.label_smoothing > 0)
          p.weighted = sum_lanes(weighted_sum(x, class_weight ? class_weight + from : nullptr, A(0), n));
        const int64_t t = a.target[a.row_index[first + row]];
        if (t >= from && t < from + n) state[row].at_target = x[t - from];
        if (keep) __builtin_memcpy(logits + row * logit_stride + from, x, size_t(n) * sizeof(A));
      });
      parallel_for(rows, 512, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          for (int64_t b = 0; b * kBlockCols < width; ++b) merge(state[row], partial[b * chunk + row]);
      });
    }
    for (int64_t row = 0; row < rows; ++row) finish_row(a.row_index[first + row], state[row]);
  }

  static void merge(State& s, const Partial& p) {
    const double top = double(p.top) > s.top ? double(p.top) : s.top;
    s.sum = s.sum * __builtin_exp(s.top - top) + double(p.sum) * __builtin_exp(double(p.top) - top);
    s.top = top;
    s.weighted += double(p.weighted);
  }

  // As loss_row of cross_entropy.cpp.
  void finish_row(int64_t index, const State& s) {
    const int64_t t = a.target[index];
    const double log_sum = __builtin_log(s.sum), smoothing = a.label_smoothing;
    A* lse = static_cast<A*>(a.lse) + 2 * index;
    lse[0] = A(s.top);
    lse[1] = A(log_sum);
    double loss = (1 - smoothing) * (class_weight ? class_weight[t] : 1) * ((s.top - s.at_target) + log_sum);
    if (smoothing > 0) loss += smoothing / double(a.classes) * (weight_sum * (s.top + log_sum) - s.weighted);
    static_cast<A*>(a.loss)[index] = A(loss);
  }

  LogitGradient<A> gradient_of(int64_t row) const {
    const int64_t index = a.row_index[row];
    const A g = a.grad_loss ? static_cast<const A*>(a.grad_loss)[index * a.grad_loss_stride] : A(1);
    return {g * A(a.grad_scale), static_cast<const A*>(a.lse) + 2 * index, class_weight, weight_sum,
            a.label_smoothing, a.classes, a.target[index]};
  }

  void find_gradients(int64_t first, int64_t rows) {
    if (a.dx) __builtin_memset(dx, 0, size_t(rows * a.depth) * sizeof(A));
    for (int64_t at = 0; at < a.classes; at += slab) {
      const int64_t width = min_of(slab, a.classes - at), stride = keep ? logit_stride : slab;
      A* dl = keep ? logits + at : logits;   // [rows, width]
      if (keep)
        parallel_for(rows, 8, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i)
            gradient_of(first + i).write(dl + i * stride, dl + i * stride, at, width);
        });
      else
        for_logits(rows, at, width, [&](int64_t row, int64_t from, int64_t n, const A* x) {
          gradient_of(first + row).write(dl + row * stride + from - at, x, from, n);
        });
      if (a.dbias) add_bias_gradient(dl, stride, rows, at, width);
      if (a.dweight) add_weight_gradient(dl, stride, rows, at, width, first == 0);
      if (a.dx) add_x_gradient(dl, stride, rows, at, width);
    }
    if (!a.dx) return;
    parallel_for(rows, max_of(1, 32768 / max_of(a.depth, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* to = static_cast<T*>(a.dx) + a.row_index[first + row] * a.depth;
        sweep<A>(a.depth, [&](auto lanes, int64_t i) { lanes.store(to + i, lanes.load(dx + row * a.depth + i)); });
      }
    });
  }

  void add_bias_gradient(const A* dl, int64_t stride, int64_t rows, int64_t at, int64_t width) {
    parallel_for(width, 256, [&](int64_t begin, int64_t end) {
      A* to = bias_gradient + at + begin;
      for (int64_t row = 0; row < rows; ++row)
        sweep<A>(end - begin, [&](auto lanes, int64_t i) {
          lanes.store(to + i, lanes.load(to + i) + lanes.load(dl + row * stride + begin + i));
        });
    });
  }

  void add_weight_gradient(const A* dl, int64_t stride, int64_t rows, int64_t at, int64_t width, bool first) {
    pack_rows<Core>(gradient_panels, Operand<A>{dl, 1, stride, width, rows});
    multiply_panels<Core>({gradient_panels, width, rows}, {x_cols, a.depth, rows},
                          [&](int64_t row, int64_t count, int64_t col, int64_t n, A* c) {
                            T* to = static_cast<T*>(a.dweight) + (at + row) * a.depth + col;
                            for (int64_t i = 0; i < count; ++i, c += kBlockCols, to += a.depth)
                              sweep<A>(n, [&](auto lanes, int64_t j) {
                                const Vec<A> sum = lanes.load(c + j);
                                lanes.store(to + j, first ? sum : sum + lanes.load(to + j));
                              });
                          });
  }

  void add_x_gradient(const A* dl, int64_t stride, int64_t rows, int64_t at, int64_t width) {
    const T* w = weight + at * a.weight_row_stride;
    pack_cols<Core>(weight_panels, Operand<T>{w, a.weight_col_stride, a.weight_row_stride, a.depth, width});
    pack_rows<Core>(gradient_panels, Operand<A>{dl, stride, 1, rows, width});
    multiply_panels<Core>({gradient_panels, rows, width}, {weight_panels, a.depth, width},
                          [&](int64_t row, int64_t count, int64_t col, int64_t n, A* c) {
                            A* to = dx + row * a.depth + col;
                            for (int64_t i = 0; i < count; ++i, c += kBlockCols, to += a.depth)
                              sweep<A>(n, [&](auto lanes, int64_t j) {
                                lanes.store(to + j, lanes.load(to + j) + lanes.load(c + j));
                              });
                          });
  }
};

}  // namespace

template <>
int64_t linear_cross_entropy_workspace<kIsa>(const LinearCrossEntropyArgs& a) {
  int64_t bytes = 0;
  dispatch_dtype(a.dtype, [&](auto tag) { bytes = LinearCrossEntropy<typename decltype(tag)::type>(a).bytes; });
  return bytes;
}

template <>
void linear_cross_entropy<kIsa>(const LinearCrossEntropyArgs& a) {
  dispatch_dtype(a.dtype, [&](auto tag) { LinearCrossEntropy<typename decltype(tag)::type>(a).run(); });
}

}  // namespace pyfast
