// rope: one read and one write; the angles of a position are read once for all sequences of the batch.
#pragma once

#include "mutant.cuh"
#include "rope.h"
#include "rows.cuh"

namespace pyfast {

constexpr int kRopeThreads = 128;   // most of a block

// kCount neighbours, which lie aligned to all of them if kAligned.
template <bool kAligned, int kCount, class T>
__device__ __forceinline__ void take(float (&to)[kCount], const T* from) {
  if constexpr (kAligned) {
    load_pack(to, from);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) to[e] = float(from[e]);
  }
}

template <bool kAligned, int kCount, class T>
__device__ __forceinline__ void give(T* to, const float (&from)[kCount]) {
  if constexpr (kAligned) {
    store_pack(to, from);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) to[e] = T(from[e]);
  }
}

// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for kPairs pairs: of neighbours, or of the halves of a head.
template <bool kInterleaved, int kPairs, class T>
__device__ __forceinline__ void turn(T* out, const T* x, int64_t half, const float (&cos)[kPairs],
                                     const float (&sin)[kPairs]) {
  constexpr bool kAligned = kPairs > 1;
  if constexpr (kInterleaved) {
    float v[2 * kPairs];
    take<kAligned>(v, x);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float first = v[2 * i], second = v[2 * i + 1];
      v[2 * i] = first * cos[i] - second * sin[i];
      v[2 * i + 1] = second * cos[i] + first * sin[i];
    }
    give<kAligned>(out, v);
  } else {
    float first[kPairs], second[kPairs];
    take<kAligned>(first, x);
    take<kAligned>(second, x + half);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float old = first[i];
      first[i] = old * cos[i] - second[i] * sin[i];
      second[i] = second[i] * cos[i] + old * sin[i];
    }
    give<kAligned>(out, first);
    give<kAligned>(out + half, second);
  }
}

// A block takes one position and every gridDim.y-th sequence. A thread has the same pairs of several heads, whose
// angles it keeps.
template <class T, bool kInterleaved, int kPairs>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(RopeCudaArgs a) {
  const int64_t time = blockIdx.x, half = a.size / 2;
  const int units = int(half / kPairs), lanes = min(units, int(blockDim.x));
  const int groups = int(blockDim.x) / lanes, group = int(threadIdx.x) / lanes;
  if (group >= groups) return;
  for (int unit = int(threadIdx.x) % lanes; unit < units; unit += lanes) {
    const int pair = unit * kPairs, element = kInterleaved ? 2 * pair : pair;
    float cos[kPairs], sin[kPairs];
    take<(kPairs > 1)>(cos, a.cos + time * a.cos_stride + pair);
    take<(kPairs > 1)>(sin, a.sin + time * a.sin_stride + pair);
    if (a.inverse && !mutant(2)) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) sin[i] = -sin[i];
    }
    for (int64_t batch = blockIdx.y; batch < a.batch; batch += gridDim.y) {
      const T* x = static_cast<const T*>(a.x) + batch * a.batch_stride + time * a.time_stride + element;
      T* out = static_cast<T*>(a.out) + (batch * a.length + time) * a.heads * a.size + element;
      for (int head = group; head < int(a.heads) + int(mutant(1)); head += groups)
        turn<kInterleaved, kPairs>(out + head * a.size, x + head * a.head_stride, half, cos, sin);
    }
  }
}

// Whether every pack of four elements, and the angles of its pairs, lie aligned to all of them.
inline bool rope_packs(const RopeCudaArgs& a) {
  const int64_t item = size_of(a.dtype), pairs = a.interleaved ? 2 : 4;
  bool whole = a.size / 2 % pairs == 0;
  for (const int64_t stride : {a.batch_stride, a.head_stride, a.time_stride}) whole = whole && stride % 4 == 0;
  for (const int64_t stride : {a.cos_stride, a.sin_stride}) whole = whole && stride % pairs == 0;
  whole = whole && reinterpret_cast<uintptr_t>(a.x) % uintptr_t(4 * item) == 0;
  for (const float* table : {a.cos, a.sin})
    whole = whole && reinterpret_cast<uintptr_t>(table) % uintptr_t(4 * pairs) == 0;
  return whole;
}

template <class T>
cudaError_t launch_rope_of(const RopeCudaArgs& a, cudaStream_t stream) {
  const bool packs = rope_packs(a);
  const int64_t units = a.size / 2 / (packs ? (a.interleaved ? 2 : 4) : 1);
  unsigned threads = 32;
  while (threads < kRopeThreads && threads < units) threads *= 2;
  // The batch is split only where there are too few positions to fill the processors.
  const int64_t splits = int64_t(a.processors) * 512 / threads / a.length;
  const dim3 grid(unsigned(a.length), unsigned(splits < 1 ? 1 : splits < a.batch ? splits : a.batch));
  if (a.interleaved && packs) rope_kernel<T, true, 2><<<grid, threads, 0, stream>>>(a);
  else if (a.interleaved) rope_kernel<T, true, 1><<<grid, threads, 0, stream>>>(a);
  else if (packs) rope_kernel<T, false, 4><<<grid, threads, 0, stream>>>(a);
  else rope_kernel<T, false, 1><<<grid, threads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_rope(const RopeCudaArgs& a, cudaStream_t stream) {
  if (a.dtype == DType::float32) return launch_rope_of<float>(a, stream);
  return a.dtype == DType::bfloat16 ? launch_rope_of<bfloat16>(a, stream) : launch_rope_of<float16>(a, stream);
}

}  // namespace pyfast
