// Rows that do not fit into the registers of a block, in its shared memory.
#pragma once

#include "norm_rows.cuh"

namespace pyfast {

constexpr int kLongThreads = 32 * kNormWarps;
// Most columns, by what a thread keeps of them in registers: the weight, or sums of two gradients beside more.
template <bool kCentred>
constexpr int kLongForward = (kCentred ? 32 : 64) * kLongThreads;
template <bool kCentred>
constexpr int kLongBackward = (kCentred ? 32 : 48) * kLongThreads;

// A row of any alignment in shared memory, as it lies in global memory from the sector on that it begins in. It comes
// and goes in packs; between, a thread has the same columns of every row: words of 4 bytes, kLongThreads apart.
template <class T, int kMost>
struct SharedRow {
  static constexpr int kSize = kPack<T>, kWhole = 2 * kSize;   // elements of a pack, of a sector
  static constexpr int kEach = 4 / int(sizeof(T)), kWords = kMost / kLongThreads / kEach;

  int cols, shift;   // shift: elements from the sector to the row

  // Of `cols` elements from `at` on.
  __device__ __forceinline__ SharedRow(int cols, int64_t at) : cols(cols), shift(int(at % kWhole)) {}

  // Elements of shared memory.
  static __host__ __device__ __forceinline__ int64_t room(int64_t cols) {
    return (cols + 2 * kWhole - 1) / kWhole * kWhole;
  }

  // Begins to copy the row at element `at` of `all`, and what a word reads past it.
  __device__ __forceinline__ void fetch(T* to, const T* from, int64_t at, int64_t all) const {
    const int64_t left = all - (at - shift);
    for (int p = int(threadIdx.x) * kSize; p <= shift + cols; p += kLongThreads * kSize) {
      if (p + kSize <= shift) continue;
      const int there = int(max(min(left - p, int64_t(kSize)), int64_t(0)));
      cp_async(shared_address(to + p), from + (at - shift) + (there ? p : 0), there * int(sizeof(T)));
    }
  }

  // Whole sectors in packs, what is left at both ends in single elements: in one request each.
  __device__ __forceinline__ void store(T* to, const T* from, int64_t at) const {
    const int end = shift + cols, head = shift ? kWhole : 0, tail = end / kWhole * kWhole, thread = int(threadIdx.x);
    to += at - shift;
    for (int p = head + thread * kSize; p < tail; p += kLongThreads * kSize)
      __stwb(reinterpret_cast<uint4*>(to + p), *reinterpret_cast<const uint4*>(from + p));
    if (shift + thread < head) to[shift + thread] = from[shift + thread];
    if (tail + thread < end) to[tail + thread] = from[tail + thread];
  }

  // f(word of the thread, its first column)
  template <class F>
  __device__ __forceinline__ void each_word(const F& f) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const int col = (k * kLongThreads + int(threadIdx.x)) * kEach;
      if (col < cols) f(k, col);
    }
  }

  // A word, zeros past the row; and back. Its elements one by one: of an odd row they are in two words of the memory.
  __device__ __forceinline__ void get(float (&v)[kEach], const T* row, int col) const {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      v[e] = float(row[shift + col + e]);
      if (e > 0 && col + e >= cols && !mutant(6)) v[e] = 0;
    }
  }
  __device__ __forceinline__ void put(T* row, int col, const float (&v)[kEach]) const {
#pragma unroll
    for (int e = 0; e < kEach; ++e) row[shift + col + e] = T(v[e]);
  }

  // Weight or bias.
  template <class A>
  __device__ __forceinline__ void load_columns(float (&to)[kWords][kEach], const A* from) const {
    each_word([&](int k, int col) {
      if constexpr (kEach == 1) to[k][0] = float(from[col]);
      else if (col + 1 >= cols) to[k][0] = float(from[col]);
      else if constexpr (sizeof(A) == 2) unpack(to[k], from + col);
      else to[k][0] = from[col], to[k][1] = from[col + 1];
    });
  }
};

// Launches a kernel whose rows take `row` bytes of shared memory each, beside `more` of a block: two at a time if there
// is room. Whether one fits; `blocks`: of how many blocks the launch is then.
template <class Args>
bool launch_rows(void (*kernel)(Args, int), cudaError_t* status, int64_t* blocks, Args a, int64_t row, int64_t more,
                 cudaStream_t stream) {
  constexpr int kReserved = 4096;   // bytes, for statistics and meetings
  int device = 0, limit = 0;
  *status = cudaGetDevice(&device);
  if (*status == cudaSuccess)
    *status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (*status != cudaSuccess) return true;
  const int64_t left = limit - kReserved - more;
  if (row > left) return false;
  const int slots = 2 * row > left ? 1 : 2;
  const int64_t shared = slots * row + more;
  a.rows_each = (a.rows + a.processors - 1) / a.processors;
  if (a.rows_each > 32) a.rows_each = (a.rows_each + 7) / 8 * 8;   // so that statistics fill sectors
  *blocks = (a.rows + a.rows_each - 1) / a.rows_each;
  *status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (*status != cudaSuccess) return true;
  kernel<<<unsigned(*blocks), kLongThreads, size_t(shared), stream>>>(a, slots);
  *status = cudaGetLastError();
  return true;
}

}  // namespace pyfast
