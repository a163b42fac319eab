// Tiles in shared memory and the products of a warp: what GEMM and attention are made of.
//
// An operand of a product C [M, N] += A [M, K] B [N, K]^T is a matrix [rows, depth] of which either index may be the
// one with stride 1. A warp holds C as kMi x kNj tiles of [16, 8]; of each, lane l has the elements
// (l / 4 + 8 h, l % 4 * 2 + w) in register 2 h + w, as mma.sync leaves them. Products of float32 keep to the same
// places and use plain FMA: sums on tensor cores are cut off, and three tf32 products err more than torch may.
#pragma once

#include "mutant.cuh"
#include "ptx.cuh"

namespace pyfast {

enum class Major { depth, rows };   // the index of an operand [rows, depth] that has stride 1

__device__ __forceinline__ int lane_id() { return int(threadIdx.x % 32); }

// Lines of 16-byte chunks. The place of a chunk is XORed with its line, so that neither eight chunks of a line nor the
// same chunk of eight lines share a bank; the same permutation as TMA's and wgmma's 128-byte swizzle.
template <class T, Major kMajorIndex, int kRowCount, int kDepthSize>
struct SharedTile {
  using Element = T;
  static constexpr Major kMajor = kMajorIndex;
  static constexpr int kRows = kRowCount, kDepth = kDepthSize;
  static constexpr int kPack = 16 / int(sizeof(T));                             // elements of a chunk
  static constexpr int kAcross = kMajor == Major::depth ? kDepth : kRows;       // elements of a line
  static constexpr int kLines = kMajor == Major::depth ? kRows : kDepth;
  static constexpr int kChunks = kAcross / kPack;
  static constexpr int kBytes = kRows * kDepth * int(sizeof(T));
  static constexpr int kKeys = kChunks < 8 ? kChunks : 8, kPeriod = 8 / kKeys;  // kPeriod lines make 128 bytes
  static_assert(kChunks >= 2 && (kKeys & (kKeys - 1)) == 0, "lines are whole pairs of chunks");

  static __device__ __forceinline__ int key(int line) { return mutant(104) ? 0 : line / kPeriod % kKeys; }
  static __device__ __forceinline__ uint32_t offset(int line, int chunk) {
    return uint32_t(line * kChunks + (chunk ^ key(line))) * 16;
  }
  // Byte offset of one element.
  static __device__ __forceinline__ uint32_t element(int row, int depth) {
    const int line = kMajor == Major::depth ? row : depth, across = kMajor == Major::depth ? depth : row;
    return offset(line, across / kPack) + across % kPack * sizeof(T);
  }
};

// Up to 16 bytes of elements that are aligned to themselves only, zeros after them.
template <class T>
__device__ __forceinline__ uint4 gather(const T* from, int bytes) {
  union {
    uint4 whole;
    T part[16 / sizeof(T)];
  };
  whole = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int e = 0; e < int(16 / sizeof(T)); ++e)
    if (e * int(sizeof(T)) < bytes) part[e] = from[e];
  return whole;
}

// The block copies a tile: `lines` of `across` elements are there, with `stride` elements from line to line; zeros
// elsewhere. `aligned`: every line begins at a multiple of 16 bytes; the copy is then asynchronous.
template <class Tile, int kThreads, class T = typename Tile::Element>
__device__ __forceinline__ void copy_tile(uint32_t to, const T* from, int64_t stride, int lines, int across,
                                          bool aligned) {
  constexpr int kStep = kThreads / Tile::kChunks;   // lines at once
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kLines % kStep == 0, "threads share a tile evenly");
  const int chunk = threadIdx.x % Tile::kChunks, first = threadIdx.x / Tile::kChunks;
  const int bytes = min(max((across - chunk * Tile::kPack) * int(sizeof(T)), 0), 16);
  const uint32_t place = to + Tile::offset(first, chunk);
  const int left = lines - first;
  const auto there = [&](int line) { return line < left || mutant(103) ? bytes : 0; };
  from += first * stride + chunk * Tile::kPack;
  if (aligned) {
#pragma unroll
    for (int line = 0; line < Tile::kLines; line += kStep)
      cp_async(kStep % 8 ? to + Tile::offset(first + line, chunk) : place + line * Tile::kChunks * 16,   // the same XOR
               from + line * stride, there(line));
  } else {
#pragma unroll 1
    for (int line = 0; line < Tile::kLines; line += kStep)
      store_shared(to + Tile::offset(first + line, chunk), gather(from + line * stride, there(line)));
  }
}

// ---- 16-bit elements: ldmatrix and mma.sync ----

// The fragment [16, 16] at (row, depth), multiples of 16, of the left operand, or of the right one: two fragments of 8
// rows. The lane's part of the XOR stands apart from theirs, so that it is made once for all fragments.
template <class Tile, bool kLeft>
__device__ __forceinline__ void load_fragment(uint32_t (&fragment)[4], uint32_t tile, int row, int depth) {
  const int lane = lane_id();
  constexpr bool kByDepth = Tile::kMajor == Major::depth;
  // Matrices come in the order of the registers: of the left operand first down the rows, of the right along the depth.
  const int along = kByDepth == kLeft ? lane % 16 : lane % 8 + lane / 16 * 8;
  const int chunk = kByDepth == kLeft ? lane / 16 : lane / 8 % 2;
  const uint32_t own = tile + along * Tile::kChunks * 16, place = (chunk ^ Tile::key(along)) * 16;
  if constexpr (kByDepth)
    ldmatrix(fragment, own + (place ^ depth * 2) + row * Tile::kChunks * 16);
  else
    ldmatrix_transposed(fragment, own + (place ^ row * 2) + depth * Tile::kChunks * 16);
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
__device__ __forceinline__ uint32_t pack<float16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

// c += a b^T over one step of depth, 16; b is two fragments of 8 rows in each.
template <class T, int kMi, int kNj>
__device__ __forceinline__ void multiply_fragments(float (&c)[kMi][kNj][4], const uint32_t (&a)[kMi][4],
                                                   const uint32_t (&b)[kNj / 2][4]) {
#pragma unroll
  for (int i = 0; i < kMi; ++i)
#pragma unroll
    for (int j = 0; j < kNj; ++j) mma<T>(c[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
}

// ---- float32: FMA ----

// v[e] = the element (row, depth + e), e < 4.
template <class Tile>
__device__ __forceinline__ void load_depth(float (&v)[4], uint32_t tile, int row, int depth) {
  if constexpr (Tile::kMajor == Major::depth) {
    load_shared(v, tile + Tile::offset(row, depth / 4));
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = load_shared(tile + Tile::element(row, depth + e));
  }
}

template <int kMi, int kNj>
__device__ __forceinline__ void multiply_add(float (&c)[kMi][kNj][4], const float (&a)[kMi][2][4],
                                             const float (&b)[kNj][2][4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e)
#pragma unroll
    for (int i = 0; i < kMi; ++i)
#pragma unroll
      for (int j = 0; j < kNj; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) c[i][j][r] += a[i][r / 2][e] * b[j][r % 2][e];
}

template <class Tile, int kNj>
__device__ __forceinline__ void load_columns(float (&b)[kNj][2][4], uint32_t tile, int row, int depth) {
#pragma unroll
  for (int j = 0; j < kNj; ++j)
#pragma unroll
    for (int w = 0; w < 2; ++w) load_depth<Tile>(b[j][w], tile, row + 8 * j + lane_id() % 4 * 2 + w, depth);
}

// c += A[a_row ..] B[b_row ..]^T over four of depth from `k` on, both in shared memory.
template <class A, class B, int kMi, int kNj>
__device__ __forceinline__ void multiply_four(float (&c)[kMi][kNj][4], uint32_t a, int a_row, uint32_t b, int b_row,
                                              int k) {
  float left[kMi][2][4], right[kNj][2][4];
#pragma unroll
  for (int i = 0; i < kMi; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) load_depth<A>(left[i][h], a, a_row + 16 * i + 8 * h + lane_id() / 4, k);
  load_columns<B>(right, b, b_row, k);
  multiply_add(c, left, right);
}

// ---- products of a warp, for any element ----

// c += A[a_row ..] B[b_row ..]^T, both in shared memory, over the first `depth` of the tiles rounded up to 32, or to
// 80, a common size of heads: a branch for each 16 is up to 1 in 10 integer instructions more for all others.
template <class A, class B, int kMi, int kNj>
__device__ __forceinline__ void multiply(float (&c)[kMi][kNj][4], uint32_t a, int a_row, uint32_t b, int b_row,
                                         int depth = A::kDepth) {
  using T = typename A::Element;
  if constexpr (sizeof(T) == 4) {
#pragma unroll 1
    for (int k = 0; k < min(A::kDepth, (depth + 31) / 32 * 32); k += 4)
      multiply_four<A, B>(c, a, a_row, b, b_row, k);
  } else {
#pragma unroll
    for (int k = 0; k < A::kDepth; k += 16) {
      if ((k % 32 == 0 || k == 80) && k >= depth) break;
      uint32_t left[kMi][4], right[kNj / 2][4];
#pragma unroll
      for (int i = 0; i < kMi; ++i) load_fragment<A, true>(left[i], a, a_row + 16 * i, k);
#pragma unroll
      for (int j = 0; j < kNj / 2; ++j) load_fragment<B, false>(right[j], b, b_row + 16 * j, k);
      multiply_fragments<T>(c, left, right);
    }
  }
}

// c += P B[0 ..]^T: P [16 kMi, 8 kNs] lies in the warp's registers as a product has left it, and is rounded to T;
// B [rows, 8 kNs] is in shared memory. Only the first `rows` of B, rounded as `depth` above, are multiplied.
template <class B, int kMi, int kNs, int kNj>
__device__ __forceinline__ void multiply_held(float (&c)[kMi][kNj][4], const float (&p)[kMi][kNs][4], uint32_t b,
                                              int rows) {
  using T = typename B::Element;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int k = 0; k < 8 * kNs; ++k) {   // lane k % 8 / 2 of the four of a row has its element k
      float left[kMi][2];
#pragma unroll
      for (int i = 0; i < kMi; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          left[i][h] = __shfl_sync(~0u, p[i][k / 8][2 * h + k % 2], lane_id() / 4 * 4 + k % 8 / 2);
#pragma unroll
      for (int j = 0; j < kNj; ++j) {
        if (j % 2 == 0 && 8 * j >= rows) break;
        const float2 right = load_shared_pair(b + B::element(8 * j + lane_id() % 4 * 2, k));
#pragma unroll
        for (int i = 0; i < kMi; ++i)
#pragma unroll
          for (int r = 0; r < 4; ++r) c[i][j][r] += left[i][r / 2] * (r % 2 ? right.y : right.x);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kNs / 2; ++k) {   // two tiles of [16, 8] are one left fragment [16, 16]
      uint32_t left[kMi][4];
#pragma unroll
      for (int i = 0; i < kMi; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          left[i][r] = pack<T>(p[i][2 * k + r / 2][r % 2 * 2], p[i][2 * k + r / 2][r % 2 * 2 + 1]);
#pragma unroll
      for (int j = 0; j < kNj / 2; ++j) {
        if ((j % 2 == 0 || j == 5) && 16 * j >= rows) break;
        uint32_t right[4];
        load_fragment<B, false>(right, b, 16 * j, 16 * k);
#pragma unroll
        for (int i = 0; i < kMi; ++i) {
          mma<T>(c[i][2 * j], left[i], right[0], right[1]);
          mma<T>(c[i][2 * j + 1], left[i], right[2], right[3]);
        }
      }
    }
  }
}

// f(element, row, column) for the warp's elements of a product that begins at (row, column).
template <int kMi, int kNj, class F>
__device__ __forceinline__ void each_element(float (&c)[kMi][kNj][4], int row, int col, const F& f) {
  row += lane_id() / 4, col += lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < kMi; ++i)
#pragma unroll
    for (int j = 0; j < kNj; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) f(c[i][j][r], row + 16 * i + r / 2 * 8, col + 8 * j + r % 2);
}

}  // namespace pyfast
