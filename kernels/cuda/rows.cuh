// Rows of any length at any alignment, and sums over a block: what the kernels bound by memory are made of.
#pragma once

#include "ptx.cuh"

namespace pyfast {

constexpr int kSector = 32;   // bytes; what memory delivers at once
constexpr unsigned kFullWarp = 0xffffffffu;

template <class T>
constexpr int kPack = 16 / int(sizeof(T));   // elements of the widest access

// A pack and its elements, 16-bit ones in pairs.
template <class A>
__device__ __forceinline__ void unpack(A* to, const bfloat16* two) {
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(two);
  to[0] = __uint_as_float(bits << 16);
  to[1] = __uint_as_float(bits & 0xffff0000u);
}
__device__ __forceinline__ void unpack(float* to, const float16* two) {
  const float2 v = __half22float2(*reinterpret_cast<const __half2*>(two));
  to[0] = v.x;
  to[1] = v.y;
}
template <class A>
__device__ __forceinline__ void pack(bfloat16* two, const A* from) {
  *reinterpret_cast<__nv_bfloat162*>(two) = __floats2bfloat162_rn(from[0], from[1]);
}
__device__ __forceinline__ void pack(float16* two, const float* from) {
  *reinterpret_cast<__half2*>(two) = __floats2half2_rn(from[0], from[1]);
}

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
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int e = 0; e < kCount; e += 2) unpack(to + e, part + e);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) to[e] = A(part[e]);
  }
}

// kStreams: what is written will not be read soon, and leaves the caches first.
template <bool kStreams = false, int kCount, class A, class T>
__device__ __forceinline__ void store_pack(T* to, const A (&from)[kCount]) {
  alignas(16) T part[kCount];
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int e = 0; e < kCount; e += 2) pack(part + e, from + e);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) part[e] = T(from[e]);
  }
  // As instructions that stay whole: nvcc shares plain stores with those of single elements in another branch.
  if constexpr (sizeof(part) == 8) {
    __stwb(reinterpret_cast<uint2*>(to), *reinterpret_cast<const uint2*>(part));
  } else {
#pragma unroll
    for (int i = 0; i < int(sizeof(part) / 16); ++i) {
      const uint4 bits = reinterpret_cast<const uint4*>(part)[i];
      if constexpr (kStreams) __stcs(reinterpret_cast<uint4*>(to) + i, bits);
      else __stwb(reinterpret_cast<uint4*>(to) + i, bits);
    }
  }
}

// What a thread holds of a row of `cols` elements: kVecs packs, blockDim.x packs from one to the next. Packs are
// counted from the sector that the row begins in, `shift` elements before it: no access straddles one it does not fill.
// kExact: rows are whole packs.
template <class T, int kVecs, bool kExact = false>
struct RowSlice {
  static constexpr int kSize = kPack<T>, kElements = kVecs * kSize;
  int cols, shift;

  __device__ __forceinline__ int first(int vec) const {
    return (vec * int(blockDim.x) + int(threadIdx.x)) * kSize - shift;
  }
  __device__ __forceinline__ int col(int element) const { return first(element / kSize) + element % kSize; }
  __device__ __forceinline__ bool has(int col) const { return unsigned(col) < unsigned(cols); }
  __device__ __forceinline__ bool whole(int col) const { return col >= 0 && col + kSize <= cols; }
  __device__ __forceinline__ bool is_edge(int col) const { return col + kSize > 0 && col < cols && !whole(col); }

  // Zeros outside of the row. Around it `before` and `after` elements, the row counted in, may be read all the same:
  // those of its neighbours, which share sectors with it.
  template <class S>
  __device__ __forceinline__ void load(float (&to)[kElements], const S* row, int before, int after) const {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int col = first(v);
      if constexpr (kExact) {
        float part[kSize] = {};
        if (has(col)) load_pack(part, row + col);
#pragma unroll
        for (int e = 0; e < kSize; ++e) to[v * kSize + e] = part[e];
        continue;
      }
      const bool edge = is_edge(col), reachable = col >= -before && col + kSize <= after;
      float part[kSize] = {};
      if (whole(col) || (edge && reachable)) load_pack(part, row + col);
      if (edge) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          if (!has(col + e)) part[e] = 0;
          else if (!reachable) part[e] = float(row[col + e]);
        }
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e) to[v * kSize + e] = part[e];
    }
  }

  // f(i) for every element i that is in the row.
  template <class F>
  __device__ __forceinline__ void for_each(const F& f) const {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const bool all = kExact ? has(first(v)) : whole(first(v));
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        if (all || (!kExact && has(first(v) + e))) f(v * kSize + e);
    }
  }

  // All lanes of a warp together. The elements of a sector at an edge of the row go to as many lanes, which store them
  // at once: in pieces, or beside whole packs, they would ask for their sector several times.
  __device__ __forceinline__ void store(T* row, const float (&from)[kElements]) const {
    const int lane = int(threadIdx.x % 32);
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      if constexpr (kExact) {
        float part[kSize];
#pragma unroll
        for (int e = 0; e < kSize; ++e) part[e] = from[v * kSize + e];
        if (has(first(v))) store_pack(row + first(v), part);
        continue;
      }
      const int sector = first(v) - lane % 2 * kSize;
      const bool inside = sector >= 0 && sector + 2 * kSize <= cols;
      const bool edge = !inside && sector + 2 * kSize > 0 && sector < cols;
      float part[kSize];
#pragma unroll
      for (int e = 0; e < kSize; ++e) part[e] = from[v * kSize + e];
      if (inside) store_pack(row + first(v), part);
      for (unsigned edges = __ballot_sync(kFullWarp, edge && lane % 2 == 0); edges; edges &= edges - 1) {
        const int owner = __ffs(int(edges)) - 1, mine = __shfl_sync(kFullWarp, sector, owner) + lane;
        float element = 0;
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const float other = __shfl_sync(kFullWarp, part[e], owner + lane / kSize);
          element = lane % kSize == e ? other : element;
        }
        if (lane < 2 * kSize && has(mine)) row[mine] = T(element);
      }
    }
  }
};

// Where an element of the block's window lies in shared memory: so that neither neighbours nor every eighth of them
// share a bank.
__device__ __forceinline__ int staged(int place) { return place + place / 32; }
constexpr int64_t staged_floats(int64_t places) { return places + places / 32 + 1; }

template <class V, class F>
__device__ __forceinline__ V over_lanes(V v, const F& f) {
  v = f(v, shuffle_xor<16>(v));
  v = f(v, shuffle_xor<8>(v));
  v = f(v, shuffle_xor<4>(v));
  v = f(v, shuffle_xor<2>(v));
  return f(v, shuffle_xor<1>(v));
}

struct Add {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const { return a + b; }
};
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The threads with one threadIdx.y: a block may have several teams, each with rows of its own.
__device__ __forceinline__ void team_barrier() { __barrier_sync_count(threadIdx.y + 1, blockDim.x); }

// Meetings of the block, or of a team: each leaves every thread what f makes of the numbers of all threads, in one
// order. Two places in shared memory take turns, so that one barrier for each meeting is enough.
template <int kCount, class V = float, bool kTeams = false>
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
    for (int c = 0; c < kCount; ++c) v[c] = over_lanes(v[c], f);
    if (warps == 1) return;
    V(*place)[32] = shared_.place[0] + turn_;
    turn_ ^= kCount;
    const int own = kTeams ? int(threadIdx.y) * warps : 0;   // the first warp of the team
    if (lane == 0) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) place[c][own + warp] = v[c];
    }
    if constexpr (kTeams) team_barrier();
    else __syncthreads();
    if (warps <= 4) {   // warps: a power of two
#pragma unroll
      for (int c = 0; c < kCount; ++c) v[c] = f(place[c][own], place[c][own + 1]);
      if (warps < 4) return;
#pragma unroll
      for (int c = 0; c < kCount; ++c) v[c] = f(v[c], f(place[c][own + 2], place[c][own + 3]));
      return;
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      v[c] = place[c][own + (lane & (warps - 1))];
      if (warps == 32) v[c] = f(v[c], shuffle_xor<16>(v[c]));
      if (warps >= 16) v[c] = f(v[c], shuffle_xor<8>(v[c]));
      v[c] = f(v[c], shuffle_xor<4>(v[c]));
      v[c] = f(v[c], shuffle_xor<2>(v[c]));
      v[c] = f(v[c], shuffle_xor<1>(v[c]));
    }
  }

 private:
  Shared& shared_;
  int turn_ = 0;
};

}  // namespace pyfast
