// What becomes of tiles of logits: the numbers of a log-sum-exp, or a slab of their gradient. They never reach memory.
#pragma once

#include "counted_rows.cuh"
#include "epilogue.cuh"
#include "gemm.cuh"

namespace pyfast {

// Of every row of a tile the maximum, the sum of exp(x - maximum) and, where `spread` is, that of w (x - maximum) with
// w the class weights; and the logit of the row's target.
template <class T>
struct TileLossEpilogue {
  const T* bias;               // [classes] or null
  const float* class_weight;   // [classes] or null
  const int* place;            // [rows]: the class of the target
  float2* partial;             // [tiles of columns, rows]: as wide as the tile, or 128
  float *spread, *at_target;   // [tiles of columns, rows] or null, [rows]
  int64_t rows;
};

// The numbers of a row of the tile that is at `at` in the planes.
template <class T>
__device__ __forceinline__ void store_row(const TileLossEpilogue<T>& to, int64_t at, float peak, float2 sums) {
  to.partial[at] = make_float2(peak, sums.x);
  if (to.spread) to.spread[at] = sums.y;
}

template <class V>
__device__ __forceinline__ V over_four(V v, V (*f)(V, V)) {   // lanes, that share a row of the accumulators
  v = f(v, __shfl_xor_sync(kFullWarp, v, 1));
  return f(v, __shfl_xor_sync(kFullWarp, v, 2));
}
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float sum(float a, float b) { return a + b; }

// (the sum of exp(x - peak), that of w (x - peak)) over the warp's columns of a row: a lane has those of registers 2h
// and 2h + 1, in columns first + 8j + w.
template <int kNj, class T>
__device__ __forceinline__ float2 row_sums(const float (&z)[kNj][4], int h, float peak, int first, int n,
                                           const TileLossEpilogue<T>& to) {
  float total = 0, spread = 0;
#pragma unroll
  for (int j = 0; j < kNj; ++j)
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const float x = z[j][2 * h + w] - peak;
      total += exp_approx(x);
      const int col = first + 8 * j + w;
      if (to.spread && col < n) spread += to.class_weight ? to.class_weight[col] * x : x;
    }
  return make_float2(over_four(total, sum), to.spread ? over_four(spread, sum) : 0);
}

// The warps that share the block's rows meet in shared memory, twice: all sums of a row are made from one maximum.
template <class Tile, class T>
__device__ __forceinline__ void store_tile(const float (&acc)[Tile::kMi][Tile::kNj][4], uint32_t staging, int row,
                                           int col, int m, int n, const TileLossEpilogue<T>& to) {
  constexpr int kWarps = Tile::kWarpsN, kRows = Tile::kM;
  const int lane = lane_id(), warp = threadIdx.x / 32, across = warp % kWarps, first = col + lane % 4 * 2;
  const int down = kWarps > 1 ? warp / kWarps * Tile::kRowsOfWarp : 0;   // from the block's first row
  const uint32_t peaks = staging - warp * Tile::kPassRows * Tile::kColsOfWarp * 4, sums = peaks + kWarps * kRows * 4;
  const int64_t tile = int64_t(col / Tile::kN) * to.rows;
  float z[Tile::kMi][Tile::kNj][4], peak[Tile::kMi][2];   // the registers of acc: the biases take none beside them
#pragma unroll
  for (int j = 0; j < Tile::kNj; ++j)
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const int c = first + 8 * j + w;
      const float bias = c < n || mutant(132) ? (to.bias && c < n ? float(to.bias[c]) : 0.0f) : -INFINITY;
#pragma unroll
      for (int i = 0; i < Tile::kMi; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) z[i][j][2 * h + w] = acc[i][j][2 * h + w] + bias;
    }
#pragma unroll
  for (int i = 0; i < Tile::kMi; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = 16 * i + 8 * h + lane / 4, place = row + own < m ? to.place[row + own] - first : -1;
      float top = kLowest;
#pragma unroll
      for (int j = 0; j < Tile::kNj; ++j)
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          top = fmaxf(top, z[i][j][2 * h + w]);
          if (place == 8 * j + w) to.at_target[row + own] = z[i][j][2 * h + w];
        }
      peak[i][h] = over_four(top, larger);
      if (kWarps > 1 && lane % 4 == 0)
        store_shared(peaks + (across * kRows + down + own) * 4, __float_as_uint(peak[i][h]));
    }
  if (kWarps > 1 && !mutant(133)) __syncthreads();
#pragma unroll
  for (int i = 0; i < Tile::kMi; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = 16 * i + 8 * h + lane / 4, place = down + own;
      if (kWarps > 1)
#pragma unroll
        for (int w = 0; w < kWarps; ++w) peak[i][h] = fmaxf(peak[i][h], load_shared(peaks + (w * kRows + place) * 4));
      const float2 both = row_sums(z[i], h, peak[i][h], first, n, to);
      if (lane % 4 != 0) continue;
      if (kWarps > 1)
        store_shared(sums + (across * kRows + place) * 8, both);
      else if (row + own < m)
        store_row(to, tile + row + own, peak[i][h], both);
    }
  if (kWarps == 1) return;
  __syncthreads();
  const int own = threadIdx.x, at = row - down + own;
  if (own >= kRows || at >= m) return;
  float top = kLowest;
  float2 both = make_float2(0, 0);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float2 other = load_shared_pair(sums + (w * kRows + own) * 8);
    top = fmaxf(top, load_shared(peaks + (w * kRows + own) * 4));
    both.x += other.x, both.y += other.y;
  }
  store_row(to, tile + at, top, both);
}

// As tiles of 128 columns, of a warp that has rows of 128 or 256.
template <class Tile, class T>
__device__ __forceinline__ void store_columns(const float (&acc)[Tile::kN / 8][4], uint32_t, int row, int col, int m,
                                              int n, const TileLossEpilogue<T>& to) {
  using Warp = GemmTile<128, 128, 64, 16, 128, 1>;
#pragma unroll
  for (int part = 0; part < Tile::kN / 128; ++part) {
    float own[1][16][4];
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) own[0][j][r] = acc[16 * part + j][r];
    if (col + 128 * part < n) store_tile<Warp>(own, 0, row, col + 128 * part, m, n, to);
  }
}

// What the gradient of a row's logits is made of, in the order of the rows that count; as of cross_entropy.
struct RowFactors {
  float top, log_total, scale, picked;
  float uniform;
  int place;   // the class of the target, or -1
  int padding[2];
};

// dL [rows, columns of a slab]: scale softmax(x)_c - uniform w_c - [c = t] picked.
template <class T>
struct SlabEpilogue {
  T* out;
  int64_t stride;
  const T* bias;               // of the slab's classes, or null
  const float* class_weight;   // of the slab's classes, or null
  const RowFactors* rows;
  int first;                   // class of the slab

  struct Column {
    const SlabEpilogue& to;
    int col, count;
    float bias[4], weight[4];
    __device__ __forceinline__ void operator()(int64_t row, float (&v)[4]) const {
      const float4 f = reinterpret_cast<const float4*>(to.rows + row)[0];
      const float2 g = reinterpret_cast<const float2*>(to.rows + row)[2];
      const int place = __float_as_int(g.y) - to.first - col;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        v[e] = f.z * exp_approx((v[e] + bias[e] - f.x) - f.y) - g.x * weight[e];
        if (e == place) v[e] -= mutant(134) ? 0 : f.w;
      }
      store_four(to.out + row * to.stride + col, v, count, count == 4);   // rows begin at multiples of 16 bytes
    }
  };
  __device__ __forceinline__ Column column(int col, int count) const {
    Column column{*this, col, count, {}, {}};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      column.bias[e] = bias && e < count ? float(bias[col + e]) : 0;
      column.weight[e] = class_weight ? (e < count ? class_weight[col + e] : 0) : 1;
    }
    return column;
  }
};

// sums [slices, rows, stride] += acc, or = acc of the first slab; rows are whole packs of four.
struct AddEpilogue {
  float* sums;
  int64_t stride, slice;
  bool first;

  struct Column {
    float* sums;
    int64_t stride;
    bool first;
    __device__ __forceinline__ void operator()(int64_t row, float (&v)[4]) const {
      float4* const at = reinterpret_cast<float4*>(sums + row * stride);
      if (!first) {
        const float4 before = *at;
        v[0] += before.x, v[1] += before.y, v[2] += before.z, v[3] += before.w;
      }
      *at = make_float4(v[0], v[1], v[2], v[3]);
    }
  };
  __device__ __forceinline__ Column column(int col, int) const {
    return {sums + blockIdx.y * slice + col, stride, first};
  }
};

}  // namespace pyfast
