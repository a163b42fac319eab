// A block goes along a row of any alignment in packs of 16 bytes.
#pragma once

#include "mutant.cuh"
#include "rows.cuh"

namespace pyfast {

constexpr int kWalkLoads = 4;   // packs that a thread has on their way

// Columns [begin, end) of a row, by the block: packs(first column, float (&x)[n]) with the whole packs of all of them,
// four at a time; one(column, x) with the single elements at both ends. Without kRead the numbers are zeros.
template <bool kRead, class T, class Packs, class One>
__device__ __forceinline__ void walk(const T* row, int begin, int end, const Packs& packs, const One& one) {
  constexpr int kSize = kPack<T>;
  const auto single = [&](int col) { one(col, kRead ? float(row[col]) : 0.0f); };
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const int offset = int(reinterpret_cast<uintptr_t>(row + begin) % kSector / sizeof(T));
  const int head = min(begin + (kSector / int(sizeof(T)) - offset) % (kSector / int(sizeof(T))), end);
  const int count = (end - head) / kSize, tail = head + count * kSize;
  for (int col = begin + thread; col < head; col += threads) single(col);
  int pack = thread;
  for (; pack + (kWalkLoads - 1) * threads < count; pack += kWalkLoads * threads) {
    float x[kWalkLoads][kSize] = {};
#pragma unroll
    for (int l = 0; l < kWalkLoads; ++l)
      if constexpr (kRead) load_pack(x[l], row + head + int64_t(pack + l * threads) * kSize);
#pragma unroll
    for (int l = 0; l < kWalkLoads; ++l) packs(head + (pack + l * threads) * kSize, x[l]);
  }
  for (; pack < count; pack += threads) {
    float x[kSize] = {};
    if constexpr (kRead) load_pack(x, row + head + int64_t(pack) * kSize);
    packs(head + pack * kSize, x);
  }
  for (int col = tail + thread; col < end + int(mutant(5)); col += threads) single(col);
}

// 16 bytes, from byte `by` of the 32 of a and b on.
__device__ __forceinline__ uint4 shifted(uint4 a, uint4 b, int by) {
  uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = by & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = by & 4 ? w[i + 1] : w[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = __funnelshift_r(w[i], w[i + 1], by % 4 * 8);
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// v of the next lane, and `after` of the first one for the last.
__device__ __forceinline__ uint4 from_next_lane(uint4 v, uint4 after) {
  const int lane = int(threadIdx.x % 32), next = (lane + 1) % 32;
  const auto word = [&](uint32_t own, uint32_t other) { return __shfl_sync(kFullWarp, lane ? own : other, next); };
  return make_uint4(word(v.x, after.x), word(v.y, after.y), word(v.z, after.z), word(v.w, after.w));
}

// The same where packs are those of `to`, a row that lies otherwise: a lane's is made of its own 16 bytes of `row` and
// of the next lane's. Warps take neighbouring packs, so that one lane in 128 loads twice.
template <class T, class Packs, class One>
__device__ __forceinline__ void walk_apart(const T* row, const T* to, int begin, int end, const Packs& packs,
                                           const One& one) {
  constexpr int kSize = kPack<T>, kWhole = kSector / int(sizeof(T));
  const int thread = int(threadIdx.x), threads = int(blockDim.x), lane = thread % 32;
  const int offset = int(reinterpret_cast<uintptr_t>(to + begin) % kSector / sizeof(T));
  const int head = min(begin + (kWhole - offset) % kWhole, end);
  const int count = (end - head) / kSize, tail = head + count * kSize;
  const int by = int(reinterpret_cast<uintptr_t>(row + head) % 16), back = by / int(sizeof(T));
  const auto fetch = [&](int col) {
    if (col < begin || col + kSize > end) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(row + col);
  };
  for (int col = begin + thread; col < head; col += threads) one(col, float(row[col]));
  for (int first = thread / 32 * 32 * kWalkLoads; first < count; first += kWalkLoads * threads) {
    uint4 own[kWalkLoads + 1];
    const int col = head + (first + lane) * kSize;
#pragma unroll
    for (int l = 0; l < kWalkLoads; ++l) own[l] = fetch(col - back + l * 32 * kSize);
    own[kWalkLoads] = lane == 0 ? fetch(col - back + kWalkLoads * 32 * kSize) : own[0];
#pragma unroll
    for (int l = 0; l < kWalkLoads; ++l) {
      alignas(16) T part[kSize];
      float x[kSize];
      const int at = col + l * 32 * kSize;
      *reinterpret_cast<uint4*>(part) = shifted(own[l], from_next_lane(own[l], own[l + 1]), by);
      load_pack(x, part);
      if (at >= tail) continue;
      if (at - back < begin || at - back + 2 * kSize > end) {   // some of its bytes are not in this part of the row
#pragma unroll
        for (int e = 0; e < kSize; ++e) x[e] = float(row[at + e]);
      }
      packs(at, x);
    }
  }
  for (int col = tail + thread; col < end; col += threads) one(col, float(row[col]));
}

}  // namespace pyfast
