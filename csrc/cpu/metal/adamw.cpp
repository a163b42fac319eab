#include "adamw.h"

#include "vecmath.h"

namespace pyfast {
namespace {

typedef float VecFHalf __attribute__((vector_size(kVectorBytes / 2)));

// Squares for the norm, in double: float32 would overflow at 2e19 and forget small gradients beside large ones.
inline VecD squares(VecF v) {
  VecFHalf halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  const VecD low = __builtin_convertvector(halves[0], VecD), high = __builtin_convertvector(halves[1], VecD);
  return low * low + high * high;
}
inline VecD squares(VecD v) { return v * v; }

// The formula's numbers that stay the same over a tensor, worked out in double.
template <class A>
struct Coefficients {
  A grad_factor, keep, l2, rate1, beta2, rate2, step_size, root_scale, eps;

  Coefficients(const AdamWTensor& t, const AdamWArgs& a, double clip)
      : grad_factor(A(a.grad_scale * clip * (a.maximize ? -1 : 1))),
        keep(A(a.decoupled ? 1 - t.lr * t.weight_decay : 1)),
        l2(A(a.decoupled ? 0 : t.weight_decay)),
        rate1(A(1 - t.beta1)),
        beta2(A(t.beta2)),
        rate2(A(1 - t.beta2)),
        step_size(A(t.lr / (1 - __builtin_pow(t.beta1, t.step)))),
        root_scale(A(1 / __builtin_sqrt(1 - __builtin_pow(t.beta2, t.step)))),
        eps(A(t.eps)) {}
};

// p, m, v of elements [begin, begin + n), and the sum of their squared gradients.
template <class T, class G, class S, class A = acc_t<T>>
double update(const AdamWTensor& t, const Coefficients<A>& c, int64_t begin, int64_t n) {
  T* param = static_cast<T*>(t.param) + begin;
  const G* grad = static_cast<const G*>(t.grad) + begin;
  S *exp_avg = static_cast<S*>(t.exp_avg) + begin, *exp_avg_sq = static_cast<S*>(t.exp_avg_sq) + begin;
  S* peak = t.max_exp_avg_sq ? static_cast<S*>(t.max_exp_avg_sq) + begin : nullptr;
  A* master = t.master ? static_cast<A*>(t.master) + begin : nullptr;
  VecD sum{};
  sweep<A>(n, [&](auto lanes, int64_t i) {
    Vec<A> g = lanes.load(grad + i), p = master ? lanes.load(master + i) : lanes.load(param + i);
    sum += squares(g);
    g = p * c.l2 + g * c.grad_factor;   // in this order the product that may cancel is the fused one
    Vec<A> m = lanes.load(exp_avg + i), v = lanes.load(exp_avg_sq + i);
    m += (g - m) * c.rate1;
    v = v * c.beta2 + g * g * c.rate2;
    lanes.store(exp_avg + i, m);
    lanes.store(exp_avg_sq + i, v);
    if (peak) {
      const Vec<A> before = lanes.load(peak + i);
      v = v < before ? before : v;   // a NaN in v stays visible
      lanes.store(peak + i, v);
    }
    p = p * c.keep - c.step_size * m / (sqrt(v) * c.root_scale + c.eps);
    if (master) lanes.store(master + i, p);
    lanes.store(param + i, p);
  });
  return sum_lanes(sum);
}

template <class G, class A = acc_t<G>>
double sum_of_squares(const void* grad, int64_t begin, int64_t n) {
  const G* g = static_cast<const G*>(grad) + begin;
  VecD sum{};
  sweep<A>(n, [&](auto lanes, int64_t i) { sum += squares(lanes.load(g + i)); });
  return sum_lanes(sum);
}

double update_part(const AdamWArgs& a, const AdamWTensor& t, double clip, int64_t begin, int64_t n) {
  double sum = 0;
  dispatch_dtype(t.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Coefficients<acc_t<T>> c(t, a, clip);
    if constexpr (sizeof(T) > 2) {
      sum = update<T, T, T>(t, c, begin, n);
    } else if (t.grad_dtype == t.dtype) {
      sum = t.moment_dtype == t.dtype ? update<T, T, T>(t, c, begin, n) : update<T, T, float>(t, c, begin, n);
    } else {
      sum = t.moment_dtype == t.dtype ? update<T, float, T>(t, c, begin, n) : update<T, float, float>(t, c, begin, n);
    }
  });
  return sum;
}

// partial[chunk] = the sum of f(tensor, begin, n) over the pieces of tensors in the chunk; returns the total,
// added in the same order whatever the number of threads.
template <class F>
double sum_chunks(const AdamWArgs& a, const F& f) {
  const int64_t chunks = ceil_div(a.first[a.count], kAdamWChunk);
  parallel_for(chunks, 1, [&](int64_t chunk_begin, int64_t chunk_end) {
    int64_t i = 0;
    for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
      const int64_t begin = chunk * kAdamWChunk, end = begin + kAdamWChunk;
      double sum = 0;
      while (i < a.count && a.first[i + 1] <= begin) ++i;
      for (int64_t k = i; k < a.count && a.first[k] < end; ++k) {
        const int64_t from = max_of(begin - a.first[k], int64_t(0));
        const int64_t to = min_of(end - a.first[k], a.tensors[k].count);
        if (from < to) sum += f(a.tensors[k], from, to - from);
      }
      a.partial[chunk] = sum;
    }
  });
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += a.partial[chunk];
  return total;
}

}  // namespace

// With clipping the norm needs its own pass over the gradients first; without, it comes with the update.
template <>
double adamw_step<kIsa>(const AdamWArgs& a) {
  const double scale = __builtin_fabs(a.grad_scale);
  const auto update_all = [&](double clip) {
    return sum_chunks(
        a, [&](const AdamWTensor& t, int64_t begin, int64_t n) { return update_part(a, t, clip, begin, n); });
  };
  if (a.max_norm == __builtin_inf() && !a.skips) return __builtin_sqrt(update_all(1.)) * scale;
  const double norm = scale * __builtin_sqrt(sum_chunks(a, [](const AdamWTensor& t, int64_t begin, int64_t n) {
    double sum = 0;
    dispatch_dtype(
        t.grad_dtype, [&](auto tag) { sum = sum_of_squares<typename decltype(tag)::type>(t.grad, begin, n); });
    return sum;
  }));
  const double clip = a.max_norm / (norm + 1e-6);   // torch.nn.utils.clip_grad_norm_'s; a NaN norm gives NaN
  if (!a.skips) update_all(clip > 1 ? 1. : clip);
  return norm;
}

}  // namespace pyfast
