// Rows of any length at any alignment, and sums over a block: what the kernels bound by memory are made of.
#pragma once

#include "ptx.cuh"

namespace pyfast {

constexpr int kSector = 32;   // bytes; what memory delivers at once
constexpr unsigned kFullWarp = 0xffffffffu;

template <class T>
constexpr int kPack = 16 / int(sizeof(T));   // elements of the widest access

// kCount neighbours that begin at a multiple of 16 bytes, or of their size where that is less.
template <int kCount, class A, class T>
__device__ __forceinline__ void load_pack(A (&to)[kCount], const T* from) {
  alignas(16) T part[kCount];
  if constexpr (sizeof(part) == 8) {
    *reinterpret_cast<uint2*>(part) = *reinterpret_cast<const uint2*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < int(sizeof(part) / 16); ++i)
      reinterpret_cast<uint4*>(part)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) to[e] = A(part[e]);
}

template <int kCount, class A, class T>
__device__ __forceinline__ void store_pack(T* to, const A (&from)[kCount]) {
  alignas(16) T part[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) part[e] = T(from[e]);
  // As instructions that stay whole: nvcc shares plain stores with those of single elements in another branch.
  if constexpr (sizeof(part) == 8) {
    __stwb(reinterpret_cast<uint2*>(to), *reinterpret_cast<const uint2*>(part));
  } else {
#pragma unroll
    for (int i = 0; i < int(sizeof(part) / 16); ++i)
      __stwb(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(part)[i]);
  }
}

// What a thread holds of a row of `cols` elements: kVecs packs, blockDim.x packs from one to the next. Packs are counted
// from the sector that the row begins in, `shift` elements before it: no access straddles a sector it does not fill.
template <class T, int kVecs>
struct RowSlice {
  static constexpr int kSize = kPack<T>, kElements = kVecs * kSize;
  int cols, shift;

  __device__ __forceinline__ int first(int vec) const {
    return (vec * int(blockDim.x) + int(threadIdx.x)) * kSize - shift;
  }
  __device__ __forceinline__ int col(int element) const { return first(element / kSize) + element % kSize; }
  __device__ __forceinline__ bool has(int col) const { return unsigned(col) < unsigned(cols); }
  __device__ __forceinline__ bool whole(int col) const { return col >= 0 && col + kSize <= cols; }

  // Zeros outside of the row.
  template <class S>
  __device__ __forceinline__ void load(float (&to)[kElements], const S* row) const {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int col = first(v);
      float part[kSize] = {};
      if (whole(col)) {
        load_pack(part, row + col);
      } else {
#pragma unroll
        for (int e = 0; e < kSize; ++e)
          if (has(col + e)) part[e] = float(row[col + e]);
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e) to[v * kSize + e] = part[e];
    }
  }

  __device__ __forceinline__ void store(T* row, const float (&from)[kElements]) const {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int col = first(v);
      float part[kSize];
#pragma unroll
      for (int e = 0; e < kSize; ++e) part[e] = from[v * kSize + e];
      if (whole(col)) {
        store_pack(row + col, part);
      } else {
#pragma unroll
        for (int e = 0; e < kSize; ++e)
          if (has(col + e)) row[col + e] = T(part[e]);
      }
    }
  }
};

// Where a column lies in shared memory, so that neither neighbours nor every eighth of them share a bank.
__device__ __forceinline__ int staged(int col) { return col + col / 32; }
constexpr int64_t staged_floats(int64_t cols) { return cols + cols / 32 + 1; }

template <class V, class F>
__device__ __forceinline__ V over_lanes(V v, int lanes, const F& f) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    if (step < lanes) v = f(v, __shfl_xor_sync(kFullWarp, v, step));
  return v;
}

struct Add {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const { return a + b; }
};
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Meetings of the block: each leaves every thread what f makes of the numbers of all threads, in one order. Two places
// in shared memory take turns, so that one barrier for each meeting is enough.
template <int kCount, class V = float>
class BlockReduction {
 public:
  struct Shared {
    V place[2][kCount][32];
  };

  __device__ __forceinline__ explicit BlockReduction(Shared& shared) : shared_(shared) {}

  template <class F>
  __device__ __forceinline__ void reduce(V (&v)[kCount], const F& f) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
#pragma unroll
    for (int c = 0; c < kCount; ++c) v[c] = over_lanes(v[c], 32, f);
    if (warps == 1) return;
    V(&place)[kCount][32] = shared_.place[turn_];
    turn_ ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) place[c][warp] = v[c];
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kCount; ++c) v[c] = over_lanes(place[c][lane % warps], warps, f);   // warps: a power of two
  }

 private:
  Shared& shared_;
  int turn_ = 0;
};

}  // namespace pyfast
