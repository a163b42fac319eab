// Short rows of layer_norm and rms_norm, a run of neighbours at a time: one by one, rows that are no whole sectors
// would each ask for those that they share. A run goes through shared memory, where a row may begin anywhere.
#pragma once

#include "norm_rows.cuh"

namespace pyfast {

// A run in shared memory, as it lies in global memory, where it begins at a pack. threadIdx.y is the row of a thread,
// threadIdx.x its place there: of blockDim.x lanes that have kVecs packs each.
template <class T, int kVecs>
struct NormRun {
  using Slice = RowSlice<T, kVecs>;
  static constexpr int kSize = kPack<T>, kElements = Slice::kElements;
  static constexpr int kMost = kVecs * kRunThreads;   // packs
  struct alignas(16) Pack {
    T part[kSize];
  };

  int cols, thread;
  Slice slice;

  __device__ __forceinline__ explicit NormRun(int cols)
      : cols(cols),
        thread(int(threadIdx.y * blockDim.x + threadIdx.x)),
        slice{cols, int(threadIdx.y) * cols % kSize} {}

  __device__ __forceinline__ int pack(int vec) const { return (vec * kRunThreads + thread) * kSize; }

  // made(column of the run, its pack or element) of what is there of `count` elements, made of from[..]; zeros behind
  // them, for rows that are not there.
  template <class Whole, class One>
  __device__ __forceinline__ void load(T* run, int count, const Whole& whole, const One& one) const {
    const int all = int(blockDim.y) * cols, tail = count / kSize * kSize;
    if (count < all) __syncthreads();   // others read the last pack, of the run before
    Pack packs[kVecs] = {};
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
      if (pack(v) < tail) packs[v] = whole(pack(v));
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
      if (pack(v) < all && (pack(v) != tail || tail == count)) put(run + pack(v), packs[v]);
    if (tail < count && thread < kSize) run[tail + thread] = tail + thread < count ? one(tail + thread) : T(0.0f);
  }
  __device__ __forceinline__ void load(T* run, int count, const T* from) const {
    load(run, count, [&](int at) { return get(from + at); }, [&](int at) { return from[at]; });
  }

  __device__ __forceinline__ void store(T* to, const T* run, int count) const {
    const int tail = count / kSize * kSize;
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
      if (pack(v) < tail) put(to + pack(v), get(run + pack(v)));
    if (tail + thread < count) to[tail + thread] = run[tail + thread];
  }

  // f(vec)
  template <class F>
  static __device__ __forceinline__ void each_pack(const F& f) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) f(i);
  }

  // Pack `vec` of the thread's part of its row, zeros around the row; and back.
  __device__ __forceinline__ void take(float (&v)[kSize], const T* run, int vec) const {
    const int col = slice.first(vec);
#pragma unroll
    for (int e = 0; e < kSize; ++e) v[e] = 0;
    if (!slice.whole(col) && !slice.is_edge(col)) return;
    load_pack(v, run + int(threadIdx.y) * cols + col);
    if (slice.whole(col)) return;
#pragma unroll
    for (int e = 0; e < kSize; ++e)
      if (!slice.has(col + e) && !mutant(8)) v[e] = 0;
  }
  __device__ __forceinline__ void give(T* run, const Pack (&made)[kVecs]) const {
    T* const row = run + int(threadIdx.y) * cols;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int col = slice.first(i);
      if (slice.whole(col)) {
        put(row + col, made[i]);
      } else if (slice.is_edge(col)) {
#pragma unroll
        for (int e = 0; e < kSize; ++e)
          if (slice.has(col + e)) row[col + e] = made[i].part[e];
      }
    }
  }

  // What all lanes of the row have.
  __device__ __forceinline__ float over_row(float v) const {
    const int lanes = kVecs > 1 ? 32 : int(blockDim.x);
    if (lanes > 16) v += shuffle_xor<16>(v);
    if (lanes > 8) v += shuffle_xor<8>(v);
    if (lanes > 4) v += shuffle_xor<4>(v);
    if (lanes > 2) v += shuffle_xor<2>(v);
    if (lanes > 1) v += shuffle_xor<1>(v);
    return v;
  }

  // weight or bias, by the whole block.
  __device__ __forceinline__ void stage(float* to, const void* from, DType dtype) const {
    with_affine<T>(from, dtype, 0, [&](auto* w) {
      for (int c = thread; c < cols; c += kRunThreads) to[staged(c)] = float(w[c]);
    });
  }
  __device__ __forceinline__ float staged_column(const float* from, int element) const {
    const int col = slice.col(element);
    return slice.has(col) ? from[staged(col)] : 0;
  }
  __device__ __forceinline__ void columns(float (&to)[kElements], const void* from, DType dtype, float* room) const {
    __syncthreads();
    stage(room, from, dtype);
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kElements; ++e) to[e] = staged_column(room, e);
  }

  // Where pack `vec` of the weight is that a thread needs, in shared memory: the same every kSize rows.
  __device__ __forceinline__ float4* parked(float4* room, int vec) const {
    return room + ((int(threadIdx.y) % kSize * kVecs + vec) * kSize / 4) * 32 + threadIdx.x;
  }
  __device__ __forceinline__ void park(float4* room, const float (&weight)[kElements]) const {
    if (int(threadIdx.y) < kSize)
      each_pack([&](int i) {
        const float* const w = weight + i * kSize;
#pragma unroll
        for (int f = 0; f < kSize; f += 4) parked(room, i)[f * 8] = make_float4(w[f], w[f + 1], w[f + 2], w[f + 3]);
      });
    __syncthreads();
  }
  __device__ __forceinline__ void unpark(float (&w)[kSize], float4* room, int vec) const {
#pragma unroll
    for (int f = 0; f < kSize; f += 4) {
      const float4 four = parked(room, vec)[f * 8];
      w[f] = four.x, w[f + 1] = four.y, w[f + 2] = four.z, w[f + 3] = four.w;
    }
  }

  // to[column] = the sum over all rows of the block.
  __device__ __forceinline__ void sum_columns(float* to, const float (&from)[kElements], float* room) const {
    const int window = int(staged_floats(kElements * int(blockDim.x)));
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kElements; ++e) own(room + threadIdx.y * window, slice, e) = from[e];
    __syncthreads();
    for (int c = thread; c < cols; c += kRunThreads) {
      float sum = 0;
      for (int row = 0; row < int(blockDim.y); ++row) sum += room[row * window + staged(c + row * cols % kSize)];
      to[c] = sum;
    }
  }

  static __device__ __forceinline__ Pack get(const T* from) { return *reinterpret_cast<const Pack*>(from); }
  static __device__ __forceinline__ void put(T* to, const Pack& pack) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&pack);
  }
  static __device__ __forceinline__ Pack rounded(const float* v) {
    Pack made;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int e = 0; e < kSize; e += 2) pyfast::pack(made.part + e, v + e);
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) made.part[e] = v[e];
    }
    return made;
  }
};

}  // namespace pyfast
