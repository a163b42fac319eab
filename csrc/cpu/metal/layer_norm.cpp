#include "layer_norm.h"

#include "vecmath.h"

namespace pyfast {
namespace {

constexpr int64_t kRowGrain = 8;   // rows a thread takes at least: below that, waking it costs more

// sum = x + residual (if any); mean and variance of it by the shifted two-pass formula over a row in cache.
template <class T, class A = acc_t<T>>
void norm_row(const LayerNormArgs& a, int64_t row) {
  const int64_t n = a.cols, at = row * n;
  const T* x = static_cast<const T*>(a.x) + at;
  Vec<A> total{};
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + at;
    T* sum = static_cast<T*>(a.sum) + at;
    sweep<A>(n, [&](auto lanes, int64_t i) {
      lanes.store(sum + i, lanes.load(x + i) + lanes.load(residual + i));
      total += lanes.load(sum + i);          // what is normalised is the sum as stored, rounded to T
    });
    x = sum;
  } else {
    sweep<A>(n, [&](auto lanes, int64_t i) { total += lanes.load(x + i); });
  }
  const A mean = sum_lanes(total) / A(n);
  Vec<A> squares{};
  sweep<A>(n, [&](auto lanes, int64_t i) {
    const Vec<A> d = lanes.keep(lanes.load(x + i) - mean, 0);
    squares += d * d;
  });
  const A rstd = 1 / A(__builtin_sqrt(sum_lanes(squares) / A(n) + A(a.eps)));
  static_cast<A*>(a.mean)[row] = mean;
  static_cast<A*>(a.rstd)[row] = rstd;
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  T* out = static_cast<T*>(a.out) + at;
  sweep<A>(n, [&](auto lanes, int64_t i) {
    Vec<A> y = (lanes.load(x + i) - mean) * rstd;
    if (weight) y *= lanes.load(weight + i);
    if (bias) y += lanes.load(bias + i);
    lanes.store(out + i, y);
  });
}

// With xhat = (x - mean) rstd and g = grad_out * weight:
// grad_x = rstd (g - mean(g) - xhat mean(g xhat)) + grad_sum;  grad_weight += grad_out xhat;  grad_bias += grad_out.
template <class T, class A = acc_t<T>>
void norm_backward_row(const LayerNormBackwardArgs& a, int64_t row, A* dweight, A* dbias) {
  const int64_t n = a.cols, at = row * n;
  const T *dy = static_cast<const T*>(a.grad_out) + at, *x = static_cast<const T*>(a.x) + at;
  const T *weight = static_cast<const T*>(a.weight), *dsum = static_cast<const T*>(a.grad_sum);
  const A mean = static_cast<const A*>(a.mean)[row], rstd = static_cast<const A*>(a.rstd)[row];
  Vec<A> g_total{}, gx_total{};
  sweep<A>(n, [&](auto lanes, int64_t i) {
    const Vec<A> d = lanes.load(dy + i), xhat = (lanes.load(x + i) - mean) * rstd;
    const Vec<A> g = weight ? d * lanes.load(weight + i) : d;
    g_total += g;
    gx_total += lanes.keep(g * xhat, 0);
    if (dweight) lanes.store(dweight + i, lanes.load(dweight + i) + d * xhat);
    if (dbias) lanes.store(dbias + i, lanes.load(dbias + i) + d);
  });
  const A g_mean = sum_lanes(g_total) / A(n), gx_mean = sum_lanes(gx_total) / A(n);
  T* dx = static_cast<T*>(a.grad_x) + at;
  sweep<A>(n, [&](auto lanes, int64_t i) {
    const Vec<A> d = lanes.load(dy + i), xhat = (lanes.load(x + i) - mean) * rstd;
    const Vec<A> g = weight ? d * lanes.load(weight + i) : d;
    Vec<A> out = rstd * (g - g_mean - xhat * gx_mean);
    if (dsum) out += lanes.load(dsum + at + i);
    lanes.store(dx + i, out);
  });
}

// Column sums in two steps whose order does not depend on the number of threads: a partial per block of
// rows, then the partials in order.
template <class T, class A = acc_t<T>>
void norm_backward(const LayerNormBackwardArgs& a) {
  const int64_t blocks = layer_norm_partials(a.rows), n = a.cols;
  A* partial = static_cast<A*>(a.partial);
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      A *dweight = nullptr, *dbias = nullptr;
      if (partial) {
        A* own = partial + block * 2 * n;
        __builtin_memset(own, 0, size_t(2 * n) * sizeof(A));
        if (a.grad_weight) dweight = own;
        if (a.grad_bias) dbias = own + n;
      }
      const int64_t first = block * a.rows / blocks, last = (block + 1) * a.rows / blocks;
      for (int64_t row = first; row < last; ++row) norm_backward_row<T>(a, row, dweight, dbias);
    }
  });
  const auto reduce = [&](void* to, int64_t offset) {
    if (!to) return;
    sweep<A>(n, [&](auto lanes, int64_t i) {
      Vec<A> total{};
      for (int64_t block = 0; block < blocks; ++block) total += lanes.load(partial + block * 2 * n + offset + i);
      lanes.store(static_cast<T*>(to) + i, total);
    });
  };
  reduce(a.grad_weight, 0);
  reduce(a.grad_bias, n);
}

}  // namespace

template <>
void layer_norm<kIsa>(const LayerNormArgs& a) {
  dispatch_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(a.rows, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) norm_row<T>(a, row);
    });
  });
}

template <>
void layer_norm_backward<kIsa>(const LayerNormBackwardArgs& a) {
  dispatch_dtype(a.dtype, [&](auto tag) { norm_backward<typename decltype(tag)::type>(a); });
}

}  // namespace pyfast
