// layer_norm and rms_norm of rows that do not fit into the registers of a block: kept in its shared memory, beside the
// weight and the bias, so that each is read once all the same.
#pragma once

#include "norm.cuh"

namespace pyfast {

constexpr int kLongThreads = 32 * kNormWarps;

// In shared memory: of the row, in packs, what a thread has of each window that it is walked in; and columns of weight
// and bias, a float apart after each pack: lanes, which have packs that begin anywhere, do not meet in the banks.
template <class T>
struct LongRow {
  static constexpr int kElements = 16, kSize = kPack<T>, kVecs = kElements / kSize;
  using Slice = RowSlice<T, kVecs>;
  static constexpr int kBeside = 2 * kSize;   // floats at both ends, which threads read as well
  static constexpr int kWindow = kElements * kLongThreads;

  static __host__ __device__ __forceinline__ int64_t packs(int64_t cols) { return (cols + kBeside) / kSize + 1; }
  static __host__ __device__ __forceinline__ int64_t floats(int64_t cols) { return place(cols + 2 * kBeside); }
  static __host__ __device__ __forceinline__ int64_t place(int64_t at) { return at + at / kSize; }

  // f(element of the thread, its pack of the row) for each pack that has columns.
  template <class F>
  static __device__ __forceinline__ void each_pack(uint4* row, const Slice& slice, int window, const F& f) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int col = slice.first(i);
      if (slice.whole(col) || slice.is_edge(col))
        f(i * kSize, reinterpret_cast<T*>(row + (window * kVecs + i) * kLongThreads + threadIdx.x));
    }
  }
  static __device__ __forceinline__ void put(uint4* row, const Slice& slice, int window, const float (&v)[kElements]) {
    each_pack(row, slice, window, [&](int first, T* to) {
      alignas(16) T part[kSize];
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int e = 0; e < kSize; e += 2) pack(part + e, v + first + e);
      } else {
#pragma unroll
        for (int e = 0; e < kSize; ++e) part[e] = v[first + e];
      }
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(part);
    });
  }
  static __device__ __forceinline__ void get(float (&v)[kElements], uint4* row, const Slice& slice, int window) {
    each_pack(row, slice, window, [&](int first, T* from) {
      float part[kSize];
      load_pack(part, from);
#pragma unroll
      for (int e = 0; e < kSize; ++e) v[first + e] = part[e];
    });
  }

  template <class A>
  static __device__ __forceinline__ void stage(float* to, const A* from, int cols) {
    for (int c = int(threadIdx.x); c < cols; c += kLongThreads) to[place(c + kBeside)] = float(from[c]);
    if (int(threadIdx.x) >= kBeside) return;
    to[place(threadIdx.x)] = to[place(cols + kBeside + int(threadIdx.x))] = 0;
  }
};

// As norm_forward_kernel, where a row is all of `windows`.
template <class T, bool kCentred>
__global__ void __launch_bounds__(kLongThreads, 1) norm_long_forward_kernel(NormCudaArgs a, int windows) {
  extern __shared__ uint4 long_row[];
  using Row = LongRow<T>;
  using Slice = typename Row::Slice;
  constexpr int kElements = Row::kElements;
  __shared__ NormStatistics statistics;
  __shared__ typename NormMeetings<false>::Shared meeting;
  NormMeetings<false> team(meeting);
  const NormRows rows(a.rows, a.rows_each, 1);
  float* const weights = reinterpret_cast<float*>(long_row + Row::packs(a.cols));
  float* const biases = weights + (a.weight ? Row::floats(a.cols) : 0);
  const auto stage = [&](float* to, const void* from) {
    with_affine<T>(from, a.affine_dtype, 0, [&](auto* w) { Row::stage(to, w, a.cols); });
  };
  if (a.weight) stage(weights, a.weight);
  if (kCentred && a.bias) stage(biases, a.bias);
  const float share = 1 / float(a.cols);
  const int64_t all = a.rows * a.cols;
  const auto store_statistics = [&](int begin) { statistics.store(a.mean, a.rstd, rows, a.rows, begin); };
  for (int i = 0; i < rows.count; ++i) {
    if (i % NormStatistics::kRows == 0 && i > 0) store_statistics(i - NormStatistics::kRows);
    const int64_t row = rows.first + i, at = row * a.cols;
    const auto strip_of = [&](int window) { return NormStrip<Slice>(row, a.cols, window); };
    float v[kElements], total[1] = {};
    for (int s = 0; s < windows; ++s) {
      const NormStrip<Slice> strip = strip_of(s);
      const Slice& slice = strip.slice;
      const int64_t here = at + strip.begin;
      const int before = within_pack<T>(here), after = slice.cols + within_pack<T>(all - here - slice.cols);
      slice.load(v, static_cast<const T*>(a.x) + here, before, after);
      if (a.residual) {
        float other[kElements];
        slice.load(other, static_cast<const T*>(a.residual) + here, before, after);
#pragma unroll
        for (int e = 0; e < kElements; ++e) v[e] = float(T(v[e] + other[e]));
        slice.store(static_cast<T*>(a.sum) + here, v);
      }
      Row::put(long_row, slice, s, v);
#pragma unroll
      for (int e = 0; e < kElements; ++e) total[0] += kCentred ? v[e] : v[e] * v[e];
    }
    team.reduce(total, Add{});
    const float mean = kCentred ? total[0] * share : 0;
    if constexpr (kCentred) {
      total[0] = 0;
      for (int s = 0; s < windows; ++s) {
        const Slice slice = strip_of(s).slice;
        Row::get(v, long_row, slice, s);
        slice.for_each([&](int e) { total[0] += (v[e] - mean) * (v[e] - mean); });
      }
      team.reduce(total, Add{});
    }
    const float rstd = 1 / sqrtf(total[0] * share + a.eps);
    if (threadIdx.x == 0) {
      statistics.mean[statistics.place(i)] = mean;
      statistics.rstd[statistics.place(i)] = rstd;
    }
    for (int s = 0; s < windows; ++s) {
      const NormStrip<Slice> strip = strip_of(s);
      Row::each_pack(long_row, strip.slice, s, [&](int first, T* from) {
        float part[Row::kSize];
        load_pack(part, from);
        const int col = strip.begin + strip.slice.col(first) + Row::kBeside;
        const int place = int(Row::place(col)), over = Row::kSize - col % Row::kSize;
#pragma unroll
        for (int e = 0; e < Row::kSize; ++e) {
          const int w = place + e + (e >= over && !mutant(6));
          part[e] = (part[e] - mean) * rstd;
          if (a.weight) part[e] *= weights[w];
          if (kCentred && a.bias) part[e] += biases[w];
          v[first + e] = part[e];
        }
      });
      strip.slice.store(static_cast<T*>(a.out) + at + strip.begin, v);
    }
  }
  if (rows.count > 0) store_statistics((rows.count - 1) / NormStatistics::kRows * NormStatistics::kRows);
}

// Launches it where a row, its weight and its bias fit into shared memory; whether they do.
template <class T, bool kCentred>
bool launch_long(cudaError_t* status, NormCudaArgs a, cudaStream_t stream) {
  using Row = LongRow<T>;
  constexpr int kReserved = 4096;   // bytes of a block, for statistics and meetings
  int device = 0, limit = 0;
  *status = cudaGetDevice(&device);
  if (*status == cudaSuccess)
    *status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (*status != cudaSuccess) return true;
  const int64_t windows = (a.cols + Row::kBeside + Row::kWindow - 1) / Row::kWindow;
  const int weights = int(a.weight != nullptr) + int(kCentred && a.bias);
  const int64_t shared = Row::packs(a.cols) * 16 + weights * Row::floats(a.cols) * int64_t(sizeof(float));
  if (shared > limit - kReserved) return false;
  const int64_t blocks = int64_t(a.processors) * (!kCentred && 2 * shared < limit ? 2 : 1);
  a.rows_each = (a.rows + blocks - 1) / blocks;
  if (a.rows_each > 32) a.rows_each = (a.rows_each + 7) / 8 * 8;
  const int64_t grid = (a.rows + a.rows_each - 1) / a.rows_each;
  const auto kernel = norm_long_forward_kernel<T, kCentred>;
  *status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (*status != cudaSuccess) return true;
  kernel<<<unsigned(grid), kLongThreads, size_t(shared), stream>>>(a, int(windows));
  *status = cudaGetLastError();
  return true;
}

}  // namespace pyfast
