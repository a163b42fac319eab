// The logits [M, V] exist only as slabs of 256 classes, or for a chunk of rows. Three products make loss and gradients:
// logits = X W^T, dX = dL W, dW = dL^T X, each 2 M V K operations. A thread takes whole slabs: it packs its part of W
// into its own level-2 cache and needs no other thread until the pass over the classes ends.
//
// Gradients together with the loss: rows go in chunks whose logits are kept from the log-sum-exp to the gradient. For
// a chunk of R rows W is read and packed twice and dW updated in place: 4 V K numbers moved for 6 R V K operations.
// The classes are divided into ranges, as many as the sizes alone decide, and each range sums its own dX.
// Gradients alone: all rows go at once and the logits are computed again (a fourth product), for a group of slabs at a
// time: dW of a slab is finished, and rounded, at once, dX added up group by group. W is packed twice, dW written once.
// So go 16-bit types unless one chunk holds all rows: dW of the first way, in float32, would be larger than the logits.
#include "linear_cross_entropy_plan.h"

#include "few_rows.h"
#include "log_sum_exp.h"

namespace pyfast {
namespace {

constexpr int kWeightSlot = 1, kRowsSlot = 2, kClassesSlot = 3;

template <class T>
struct LinearCrossEntropy : LinearCrossEntropyPlan<T> {
  using Plan = LinearCrossEntropyPlan<T>;
  using typename Plan::A, typename Plan::Core, typename Plan::Elem, typename Plan::Partial;
  using Session = typename Core::Session;
  using Plan::a, Plan::chunk, Plan::group, Plan::keep, Plan::kBlockRows, Plan::range, Plan::ranges, Plan::slabs;
  using Plan::at_target, Plan::bias, Plan::bias_gradient, Plan::class_weight, Plan::dx, Plan::gathered;
  using Plan::gradients_wanted, Plan::group_gradients, Plan::group_weights, Plan::logits, Plan::partial;
  using Plan::side_by_side, Plan::weight, Plan::x_cols, Plan::x_rows;

  A weight_sum = 0;   // of the class weights
  Operand<T> chunk_x{};   // the rows of this chunk that count

  using Plan::Plan;

  void run() {
    weight_sum = class_total(class_weight, a.classes);
    if (a.bias) load_row(bias, static_cast<const T*>(a.bias), a.classes);
    if (a.dbias) __builtin_memset(bias_gradient, 0, size_t(slabs * kSlab) * sizeof(A));
    for (int64_t first = 0; first < a.rows; first += chunk) {
      const int64_t rows = min_of(chunk, a.rows - first);
      pack_x(first, rows);
      if (!a.lse_known) {
        find_partials(first, rows);
        finish_rows(first, rows);
      }
      if (!gradients_wanted) continue;
      keep ? gradients_of_kept(first, rows) : gradients_by_groups();
      if (a.dx) write_dx(first, rows);
    }
    if (a.dbias) store_row(static_cast<T*>(a.dbias), bias_gradient, a.classes);
  }

  void pack_x(int64_t first, int64_t rows) {
    const T* all = static_cast<const T*>(a.x);
    const int64_t k = a.depth;
    chunk_x = {all + a.row_index[first] * a.x_row_stride, a.x_row_stride, 1, rows, k};
    if (!side_by_side(first, rows)) {
      parallel_for(rows, max_of(1, 32768 / max_of(k, 1)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          __builtin_memcpy(gathered + i * k, all + a.row_index[first + i] * a.x_row_stride, size_t(k) * sizeof(T));
      });
      chunk_x = {gathered, k, 1, rows, k};
    }
    pack_rows<Core>(x_rows, chunk_x);
    if (a.dweight) pack_cols<Core>(x_cols, Operand<T>{chunk_x.data, 1, chunk_x.lane_stride, k, rows});
  }

  Operand<T> weights(int64_t at, int64_t width) const {   // lanes: classes
    return {weight + at * a.weight_row_stride, a.weight_row_stride, a.weight_col_stride, width, a.depth};
  }
  Operand<T> weights_across(int64_t at, int64_t width) const {   // lanes: columns
    return {weight + at * a.weight_row_stride, a.weight_col_stride, a.weight_row_stride, a.depth, width};
  }

  // The panels of W for the logits of one slab, in memory of this thread; none for few rows, which read W as it lies.
  const Elem* packed_slab(int64_t at, int64_t width, int64_t rows) const {
    if (rows <= kFewRows && a.weight_col_stride == 1) return nullptr;
    Elem* to = scratch<Elem>(kWeightSlot, panels_size<Core>(Core::kCols, kSlab, a.depth));
    pack_cols<Core>(to, weights(at, width));
    return to;
  }

  // c[n][kBlockCols]: the logits of n rows from `row` on, of the slab at `at`.
  void logits_of(const Elem* slab, int64_t at, int64_t width, int64_t rows, int64_t row, int64_t n, A* c) const {
    for (int64_t i = 0; !slab && i < n; ++i)
      multiply_row(chunk_x.from(row + i, 0).data, weights(at, width), width, c + i * kBlockCols);
    if (slab) multiply_block<Core>({x_rows, rows, a.depth}, {slab, width, a.depth}, row, n, 0, width, c);
    if (a.bias)
      for (int64_t i = 0; i < n; ++i) add_row(c + i * kBlockCols, bias + at, width);
  }

  A* block() const { return scratch<A>(kBlockSlot, kBlockRows * kBlockCols); }

  void find_partials(int64_t first, int64_t rows) {
    const int64_t blocks = ceil_div(rows, kBlockRows);
    const int64_t parts = min_of(blocks, ceil_div(2 * thread_count(), slabs)), each = ceil_div(blocks, parts);
    const int64_t flops = 2 * each * kBlockRows * kSlab * max_of(1, a.depth);
    parallel_for(slabs * parts, ceil_div(kBlockFlops, flops), [&](int64_t begin, int64_t end) {
      [[maybe_unused]] Session session;
      A* c = block();
      for (int64_t task = begin; task < end; ++task) {
        const int64_t at = task / parts * kSlab, width = min_of(kSlab, a.classes - at);
        const int64_t from = task % parts * each * kBlockRows, to = min_of(rows, from + each * kBlockRows);
        const Elem* slab = packed_slab(at, width, rows);
        for (int64_t row = from; row < to; row += kBlockRows) {
          const int64_t n = min_of(kBlockRows, to - row);
          logits_of(slab, at, width, rows, row, n, c);
          for (int64_t i = 0; i < n; ++i) find_partial(first, row + i, at, width, c + i * kBlockCols);
        }
      }
    });
  }

  void find_partial(int64_t first, int64_t row, int64_t at, int64_t width, const A* x) {
    Partial& p = partial[at / kSlab * chunk + row];
    LogSumExp<A> sums;
    sums.add(x, width);
    sums.result(p.top, p.sum);
    const A* const weight = class_weight ? class_weight + at : nullptr;
    p.weighted = a.label_smoothing > 0 ? sum_lanes(weighted_sum(x, weight, p.top, width)) : A(0);
    p.weights = a.label_smoothing > 0 ? class_total(weight, width) : A(0);
    const int64_t t = a.target[a.row_index[first + row]];
    if (t >= at && t < at + width) at_target[row] = x[t - at];
    if (keep) __builtin_memcpy(logits + (at * chunk + row * kSlab), x, size_t(width) * sizeof(A));
  }

  // Sums over the slabs, in order; the loss as loss_row of cross_entropy.cpp.
  void finish_rows(int64_t first, int64_t rows) {
    parallel_for(rows, ceil_div(4096, slabs), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        double top = -__DBL_MAX__, sum = 0, weighted = 0;
        for (int64_t s = 0; s < slabs; ++s) top = max_of(top, double(partial[s * chunk + row].top));
        for (int64_t s = 0; s < slabs; ++s) {
          const Partial& p = partial[s * chunk + row];
          sum += double(p.sum) * __builtin_exp(double(p.top) - top);
          weighted += p.weighted + double(p.weights) * (double(p.top) - top);
        }
        finish_row(a.row_index[first + row], top, sum, weighted, at_target[row]);
      }
    });
  }

  void finish_row(int64_t index, double top, double sum, double weighted, A picked) const {
    const int64_t t = a.target[index];
    const double log_sum = __builtin_log(sum), smoothing = a.label_smoothing;
    A* lse = static_cast<A*>(a.lse) + 2 * index;
    lse[0] = A(top);
    lse[1] = A(log_sum);
    double loss = (1 - smoothing) * (class_weight ? class_weight[t] : 1) * ((top - picked) + log_sum);
    if (smoothing > 0) loss += smoothing / double(a.classes) * (weight_sum * log_sum - weighted);
    static_cast<A*>(a.loss)[index] = A(loss);
  }

  LogitGradient<A> gradient_of(int64_t row) const {
    const int64_t index = a.row_index[row];
    const A g = a.grad_loss ? static_cast<const A*>(a.grad_loss)[index * a.grad_loss_stride] : A(1);
    return {g * A(a.grad_scale), static_cast<const A*>(a.lse) + 2 * index, class_weight, weight_sum,
            a.label_smoothing, a.classes, a.target[index]};
  }

  // The gradients of the logits of one slab: made block by block in cache, summed into the bias gradient and packed as
  // both products want them, into panels of rows (part of panels that are `deep` deep) and of classes.
  void make_slab(int64_t first, int64_t rows, int64_t at, int64_t width, Elem* by_rows, int64_t deep,
                 Elem* by_classes) {
    const Elem* slab = keep ? nullptr : packed_slab(at, width, rows);
    const int64_t deep_rows = padded_depth<Core>(rows);
    A* c = block();
    for (int64_t row = 0; row < rows; row += kBlockRows) {
      const int64_t n = min_of(kBlockRows, rows - row);
      if (!keep) logits_of(slab, at, width, rows, row, n, c);
      for (int64_t i = 0; i < n; ++i) {
        A* to = c + i * kBlockCols;
        const A* x = keep ? logits + (at / kSlab * chunk + row + i) * kSlab + at % kSlab : to;
        gradient_of(first + row + i).write(to, x, at, width);
        if (a.dbias) add_row(bias_gradient + at, to, width);
      }
      if (a.dx)
        for (int64_t i = 0; i < n; i += Core::kRows)
          pack_row_panel<Core>(by_rows + (row + i) * deep, Operand<A>{c + i * kBlockCols, kBlockCols, 1, n - i, width});
      if (a.dweight)
        for (int64_t j = 0; j < width; j += Core::kRows)
          pack_row_panel<Core>(by_classes + j * deep_rows + row * Core::kRows,
                               Operand<A>{c + j, 1, kBlockCols, width - j, n});
    }
  }

  // finish(row, col, cols, c) for every row of every block of the product, on this thread.
  template <class Finish>
  void multiply_here(const Panels<Core>& left, const Panels<Core>& right, const Finish& finish) {
    A* c = block();
    for (int64_t col = 0; col < right.lanes; col += kBlockCols)
      for (int64_t row = 0; row < left.lanes; row += kBlockRows) {
        const int64_t n = min_of(kBlockRows, left.lanes - row), cols = min_of(kBlockCols, right.lanes - col);
        multiply_block(left, right, row, n, col, cols, c);
        for (int64_t i = 0; i < n; ++i) finish(row + i, col, cols, c + i * kBlockCols);
      }
  }

  void slab_weight_gradient(const Elem* by_classes, int64_t rows, int64_t at, int64_t width, bool add) {
    T* own = static_cast<T*>(a.dweight) + at * a.depth;
    multiply_here({by_classes, width, rows}, {x_cols, a.depth, rows}, [&](int64_t i, int64_t col, int64_t n, A* c) {
      T* to = own + i * a.depth + col;
      if (add) {
        prefetch_row(to + 4 * a.depth, n);   // 1 KB pieces of a matrix in memory
        add_row(c, to, n);
      }
      store_row(to, c, n);
    });
  }

  void gradients_of_kept(int64_t first, int64_t rows) {
    const int64_t flops = 4 * rows * range * max_of(1, a.depth);
    parallel_for(ranges, ceil_div(kBlockFlops, flops), [&](int64_t begin, int64_t end) {
      [[maybe_unused]] Session session;
      Elem* by_rows = scratch<Elem>(kRowsSlot, panels_size<Core>(Core::kRows, chunk, kSlab));
      Elem* by_classes = scratch<Elem>(kClassesSlot, panels_size<Core>(Core::kRows, kSlab, chunk));
      for (int64_t r = begin; r < end; ++r) {
        A* own = dx + r * chunk * a.depth;
        if (a.dx) __builtin_memset(own, 0, size_t(rows * a.depth) * sizeof(A));
        const int64_t stop = min_of(a.classes, (r + 1) * range);
        for (int64_t at = r * range; at < stop;) {
          const int64_t width = min_of(kSlab - at % kSlab, stop - at);
          make_slab(first, rows, at, width, by_rows, padded_depth<Core>(width), by_classes);
          if (a.dweight) slab_weight_gradient(by_classes, rows, at, width, first > 0);
          if (a.dx) add_slab_to_dx(by_rows, rows, at, width, own);
          at += width;
        }
      }
    });
  }

  void add_slab_to_dx(const Elem* by_rows, int64_t rows, int64_t at, int64_t width, A* own) {
    Elem* w = scratch<Elem>(kWeightSlot, panels_size<Core>(Core::kCols, a.depth, kSlab));
    pack_cols<Core>(w, weights_across(at, width));
    multiply_here({by_rows, rows, width}, {w, a.depth, width}, [&](int64_t i, int64_t col, int64_t n, const A* c) {
      accumulate_row(own + i * a.depth + col, c, n);
    });
  }

  void gradients_by_groups() {
    if (a.dx) __builtin_memset(dx, 0, size_t(a.rows * a.depth) * sizeof(A));
    for (int64_t at = 0; at < a.classes; at += group) {
      const int64_t classes = min_of(group, a.classes - at), deep = padded_depth<Core>(classes);
      group_slabs(at, classes, deep);
      if (!a.dx) continue;
      const auto add = [&](int64_t row, int64_t count, int64_t col, int64_t n, const A* c) {
        for (int64_t i = 0; i < count; ++i) accumulate_row(dx + (row + i) * a.depth + col, c + i * kBlockCols, n);
      };
      multiply_panels<Core>({group_gradients, a.rows, classes}, {group_weights, a.depth, classes}, add);
    }
  }

  void group_slabs(int64_t group_at, int64_t classes, int64_t deep) {
    const int64_t fair = round_up(ceil_div(classes, 2 * thread_count()), kNarrowSlab);
    const int64_t step = max_of(kNarrowSlab, min_of(kSlab, fair)), rows = a.rows;
    const int64_t flops = 4 * rows * step * max_of(1, a.depth);
    parallel_for(ceil_div(classes, step), ceil_div(kBlockFlops, flops), [&](int64_t begin, int64_t end) {
      [[maybe_unused]] Session session;
      Elem* by_classes = scratch<Elem>(kClassesSlot, panels_size<Core>(Core::kRows, kSlab, chunk));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t within = task * step, at = group_at + within, width = min_of(step, classes - within);
        make_slab(0, rows, at, width, group_gradients + within * Core::kRows, deep, by_classes);
        if (a.dweight) slab_weight_gradient(by_classes, rows, at, width, false);
        if (a.dx) pack_cols<Core>(group_weights + within * Core::kCols, weights_across(at, width), classes);
      }
    });
  }

  // The sum over the ranges, in order.
  void write_dx(int64_t first, int64_t rows) {
    const int64_t k = a.depth;
    parallel_for(rows, max_of(1, 32768 / max_of(k * ranges, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* to = static_cast<T*>(a.dx) + a.row_index[first + row] * k;
        sweep<A>(k, [&](auto lanes, int64_t i) {
          Vec<A> sum = lanes.load(dx + row * k + i);
          for (int64_t r = 1; r < ranges; ++r) sum += lanes.load(dx + (r * chunk + row) * k + i);
          lanes.store(to + i, sum);
        });
      }
    });
  }
};

}  // namespace

template <>
int64_t linear_cross_entropy_workspace<kIsa>(const LinearCrossEntropyArgs& a) {
  int64_t bytes = 0;
  dispatch_matmul_dtype(a.dtype, [&](auto tag) { bytes = LinearCrossEntropy<typename decltype(tag)::type>(a).bytes; });
  return bytes;
}

template <>
void linear_cross_entropy<kIsa>(const LinearCrossEntropyArgs& a) {
  dispatch_matmul_dtype(a.dtype, [&](auto tag) { LinearCrossEntropy<typename decltype(tag)::type>(a).run(); });
}

}  // namespace pyfast
