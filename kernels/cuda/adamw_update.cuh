// Kernels of adamw_step_: every parameter in one launch, found through a table that travels as the kernel's argument.
// Nothing is copied to the GPU and nothing waited for; in a CUDA graph the table is that of the capture, and the
// numbers of each step come from `hyper` on the GPU.
#pragma once

#include "adamw.h"
#include "mutant.cuh"
#include "rows.cuh"

namespace pyfast {

constexpr int kAdamWThreads = 256;
constexpr int kFewTensors = 24, kMostTensors = 224;   // of a launch: 32764 bytes of arguments are allowed

template <int kMost>
struct AdamWTable {
  int count, first;            // `first`: the number of tensors before these
  int64_t first_chunk;         // and of chunks
  const AdamWNumbers* numbers; // of all tensors, or null
  AdamWCudaTensor tensors[kMost];
};

__host__ __device__ inline AdamWNumbers numbers_of(const double* hyper, bool decoupled, bool maximize,
                                                   double grad_scale) {
  const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3], decay = hyper[4], step = hyper[5];
  return {grad_scale * (maximize ? -1 : 1), decoupled ? 1 - lr * decay : 1, decoupled ? 0 : decay, 1 - beta1, beta2,
          1 - beta2, lr / (1 - pow(beta1, step)), 1 / sqrt(1 - pow(beta2, step)), eps};
}

__global__ void adamw_numbers_kernel(AdamWNumbers* numbers, const double* hyper, int count, bool decoupled,
                                     bool maximize, double grad_scale) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) numbers[i] = numbers_of(hyper + 6 * i, decoupled, maximize, grad_scale);
}

template <class A>
struct AdamWFactors {
  A grad_factor, keep, l2, rate1, beta2, rate2, step_size, root_scale, eps;

  __device__ __forceinline__ AdamWFactors(const AdamWNumbers& n, double clip)
      : grad_factor(A(n.grad_factor * clip)),
        keep(A(n.keep)),
        l2(A(n.l2)),
        rate1(A(n.rate1)),
        beta2(A(n.beta2)),
        rate2(A(n.rate2)),
        step_size(A(n.step_size)),
        root_scale(A(n.root_scale)),
        eps(A(n.eps)) {}
};

template <int kCount, class A, class T>
__device__ __forceinline__ void fetch(A (&to)[kCount], const T* from) {
  if constexpr (kCount == 1) to[0] = A(*from);
  else load_pack(to, from);
}

template <int kCount, class A, class T>
__device__ __forceinline__ void put(T* to, const A (&from)[kCount]) {
  if constexpr (kCount == 1) *to = T(from[0]);
  else store_pack(to, from);
}

// Squares for the norm are of double: float32 would overflow at 2e19 and lose small gradients beside large ones.
template <int kCount, class A>
__device__ __forceinline__ double squares(const A (&g)[kCount]) {
  double sum = 0;
#pragma unroll
  for (int e = 0; e < kCount; ++e) sum += double(g[e]) * double(g[e]);
  return sum;
}

// One step of kCount neighbours; the sum of their squared gradients.
template <int kCount, class T, class G, class S, class A>
__device__ __forceinline__ double update(const AdamWCudaTensor& t, const AdamWFactors<A>& f, int64_t at) {
  A g[kCount], p[kCount], m[kCount], v[kCount];
  T* param = static_cast<T*>(t.param) + at;
  A* master = t.master ? static_cast<A*>(t.master) + at : nullptr;
  S *exp_avg = static_cast<S*>(t.exp_avg) + at, *exp_avg_sq = static_cast<S*>(t.exp_avg_sq) + at;
  fetch(g, static_cast<const G*>(t.grad) + at);
  if (master) fetch(p, master);
  else fetch(p, param);
  fetch(m, exp_avg);
  fetch(v, exp_avg_sq);
  const double sum = squares(g);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    g[e] = p[e] * f.l2 + g[e] * f.grad_factor;   // in this order the product that may cancel is the fused one
    m[e] += (g[e] - m[e]) * f.rate1;
    v[e] = v[e] * f.beta2 + g[e] * g[e] * f.rate2;
  }
  put(exp_avg, m);
  put(exp_avg_sq, v);
  if (t.peak) {
    A before[kCount];
    S* peak = static_cast<S*>(t.peak) + at;
    fetch(before, peak);
#pragma unroll
    for (int e = 0; e < kCount; ++e) v[e] = v[e] < before[e] ? before[e] : v[e];   // a nan in v stays visible
    put(peak, v);
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) p[e] = p[e] * f.keep - f.step_size * m[e] / (sqrt(v[e]) * f.root_scale + f.eps);
  if (master) put(master, p);
  put(param, p);
  return sum;
}

// f(std::integral_constant-like count, first element) over [begin, end): kCount neighbours at a time where the arrays
// allow it, single elements at the end.
template <int kNumber>
struct Count {
  static constexpr int value = kNumber;
};

template <int kCount, class F>
__device__ __forceinline__ void for_elements(int64_t begin, int64_t end, bool aligned, const F& f) {
  const int64_t whole = aligned ? begin + (end - begin) / kCount * kCount : begin;
  for (int64_t at = begin + threadIdx.x * kCount; at < whole; at += kAdamWThreads * kCount) f(Count<kCount>{}, at);
  for (int64_t at = (mutant(1) ? begin : whole) + threadIdx.x; at < end; at += kAdamWThreads) f(Count<1>{}, at);
}

template <int kCount, class T, class G, class S>
__device__ __forceinline__ double update_chunk(const AdamWCudaTensor& t, const AdamWNumbers& numbers, double clip,
                                               int64_t begin, int64_t end) {
  const AdamWFactors<acc_t<T>> factors(numbers, mutant(2) ? 1 : clip);
  double sum = 0;
  for_elements<kCount>(begin, end, t.aligned,
                       [&](auto n, int64_t at) { sum += update<decltype(n)::value, T, G, S>(t, factors, at); });
  return sum;
}

// Threads have 16 bytes of the widest array, and the same elements of the others.
template <class T>
__device__ __forceinline__ double update_narrow(const AdamWCudaTensor& t, const AdamWNumbers& n, double clip,
                                                int64_t begin, int64_t end) {
  const bool wide_grad = t.grad_dtype == uint8_t(DType::float32), wide = t.moment_dtype == uint8_t(DType::float32);
  if (wide_grad) return wide ? update_chunk<4, T, float, float>(t, n, clip, begin, end)
                             : update_chunk<4, T, float, T>(t, n, clip, begin, end);
  if (wide) return update_chunk<4, T, T, float>(t, n, clip, begin, end);
  return t.master ? update_chunk<4, T, T, T>(t, n, clip, begin, end)
                  : update_chunk<8, T, T, T>(t, n, clip, begin, end);
}

template <bool kDouble>
__device__ __forceinline__ double update_any(const AdamWCudaTensor& t, const AdamWNumbers& n, double clip,
                                             int64_t begin, int64_t end) {
  if constexpr (kDouble) return update_chunk<2, double, double, double>(t, n, clip, begin, end);
  switch (DType(t.dtype)) {
    case DType::float32: return update_chunk<4, float, float, float>(t, n, clip, begin, end);
    case DType::bfloat16: return update_narrow<bfloat16>(t, n, clip, begin, end);
    default: return update_narrow<float16>(t, n, clip, begin, end);
  }
}

template <class G>
__device__ __forceinline__ double squares_of_chunk(const AdamWCudaTensor& t, int64_t begin, int64_t end) {
  double sum = 0;
  for_elements<16 / int(sizeof(G))>(begin, end, t.aligned, [&](auto n, int64_t at) {
    acc_t<G> g[decltype(n)::value];
    fetch(g, static_cast<const G*>(t.grad) + at);
    sum += squares(g);
  });
  return sum;
}

// What a block has to do: a chunk of a tensor.
struct AdamWChunk {
  int tensor;
  int64_t begin, end;

  template <class Table>
  __device__ __forceinline__ explicit AdamWChunk(const Table& table) {
    int low = 0, high = table.count;   // the last tensor that begins at or before this block
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (table.tensors[middle].first_chunk <= int(blockIdx.x) ? low : high) = middle;
    }
    tensor = low;
    begin = (int64_t(blockIdx.x) - table.tensors[low].first_chunk) * kAdamWCudaChunk;
    const int64_t count = table.tensors[low].count;
    end = count - begin > kAdamWCudaChunk ? begin + kAdamWCudaChunk : count;
  }
};

template <class Table>
__device__ __forceinline__ void add_up(const Table& table, double* partial, double sum) {
  __shared__ BlockReduction<1, double>::Shared meeting;
  double all[1] = {sum};
  BlockReduction<1, double>(meeting).reduce(all, Add{});
  if (threadIdx.x == 0) partial[table.first_chunk + blockIdx.x] = all[0];
}

// partial[chunk] = the sum of the squared gradients of the chunk.
template <int kMost, bool kDouble>
__global__ void __launch_bounds__(kAdamWThreads) adamw_norm_kernel(const __grid_constant__ AdamWTable<kMost> table,
                                                                   double* partial) {
  const AdamWChunk chunk(table);
  const AdamWCudaTensor& t = table.tensors[chunk.tensor];
  double sum = 0;
  if constexpr (kDouble) sum = squares_of_chunk<double>(t, chunk.begin, chunk.end);
  else if (t.grad_dtype == uint8_t(DType::float32)) sum = squares_of_chunk<float>(t, chunk.begin, chunk.end);
  else if (t.grad_dtype == uint8_t(DType::bfloat16)) sum = squares_of_chunk<bfloat16>(t, chunk.begin, chunk.end);
  else sum = squares_of_chunk<float16>(t, chunk.begin, chunk.end);
  add_up(table, partial, sum);
}

// The step of a chunk; without `clip` also partial[chunk], the sum of its squared gradients.
template <int kMost, bool kDouble>
__global__ void __launch_bounds__(kAdamWThreads) adamw_update_kernel(const __grid_constant__ AdamWTable<kMost> table,
                                                                     const double* clip, double* partial,
                                                                     const float* found_inf) {
  if (found_inf && *found_inf != 0 && !mutant(3)) return;   // with it the norm is made before
  const AdamWChunk chunk(table);
  const AdamWCudaTensor& t = table.tensors[chunk.tensor];
  const AdamWNumbers& numbers = table.numbers ? table.numbers[table.first + chunk.tensor] : t.numbers;
  const double sum = update_any<kDouble>(t, numbers, clip ? *clip : 1, chunk.begin, chunk.end);
  if (!clip) add_up(table, partial, sum);
}

// norm = scale sqrt(sum of partial), clip = min(1, max_norm / (norm + 1e-6)). One block.
__global__ void __launch_bounds__(1024) adamw_final_kernel(const double* partial, int64_t chunks, double scale,
                                                           double max_norm, float* norm, double* clip) {
  __shared__ BlockReduction<1, double>::Shared meeting;
  double sum[1] = {};
  for (int64_t i = threadIdx.x; i < chunks; i += blockDim.x) sum[0] += partial[i];
  BlockReduction<1, double>(meeting).reduce(sum, Add{});
  if (threadIdx.x != 0) return;
  const double all = sqrt(sum[0]) * scale, ratio = max_norm / (all + 1e-6);   // of torch.nn.utils.clip_grad_norm_
  *norm = float(all);
  *clip = ratio > 1 || isinf(max_norm) ? 1 : ratio;   // a nan stays, as in torch
}

}  // namespace pyfast
