// out = act(gate + gate_bias) * (up + up_bias) of a product whose columns are those of PairedRows.
#pragma once

#include "epilogue.cuh"
#include "gemm.cuh"

namespace pyfast {

template <class T>
struct GluEpilogue {
  T *out, *gate, *up;                // [m, n]; gate and up, what goes into act and beside it, may be null
  const T *gate_bias, *up_bias;      // [n] or null
  int n;
  Act act;
  bool aligned;                      // rows begin at multiples of four elements

  // Four columns of a row.
  __device__ __forceinline__ void operator()(int64_t row, int col, int count, float (&g)[4], float (&u)[4],
                                             const float (&gate_bias4)[4], const float (&up_bias4)[4]) const {
    const int64_t at = row * n + col;
    const bool whole = aligned && count == 4;
#pragma unroll
    for (int e = 0; e < 4; ++e) g[e] += gate_bias4[e], u[e] += up_bias4[e];
    if (gate) store_four(gate + at, g, count, whole), store_four(up + at, u, count, whole);
    dispatch_act(act, [&](auto tag) {
#pragma unroll
      for (int e = 0; e < 4; ++e) u[e] *= activate<decltype(tag)::value>(g[e]);
    });
    store_four(out + at, u, count, whole);
  }

  static __device__ __forceinline__ void load(float (&to)[4], const T* bias, int col, int count) {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = bias && e < count ? float(bias[col + e]) : 0;
  }
};

// As of any epilogue, through shared memory of the warp's own; of a row first the gates, then the ups beside them.
template <class Tile, class T>
__device__ __forceinline__ void store_tile(const float (&acc)[Tile::kMi][Tile::kNj][4], uint32_t staging, int row,
                                           int col, int m, int, const GluEpilogue<T>& epilogue) {
  constexpr int kPieces = Tile::kColsOfWarp / 8, kRowsAtOnce = 32 / kPieces;   // pieces: four columns of the output
  // XORed so that neither the four rows that half a warp writes at once, nor those it reads, share a bank.
  const auto place = [&](int r, int piece) {
    return staging + (r * 2 * kPieces + (piece ^ (r % 2 * 4 + r / 2 % 2 * 2))) * 16;
  };
  const int lane = lane_id(), piece = lane % kPieces, from = col / 2 + piece * 4, count = min(epilogue.n - from, 4);
  float gate_bias[4], up_bias[4];
  epilogue.load(gate_bias, epilogue.gate_bias, from, count);
  epilogue.load(up_bias, epilogue.up_bias, from, count);
#pragma unroll
  for (int pass = 0; pass < 16 * Tile::kMi / Tile::kPassRows; ++pass) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Tile::kPassRows / 16; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kNj; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto& c = acc[Tile::kPassRows / 16 * pass + i][j];
          store_shared(place(16 * i + 8 * h + lane / 4, j % 2 * kPieces + j / 2 * 2 + lane % 4 / 2) + lane % 2 * 8,
                       make_float2(c[2 * h], c[2 * h + 1]));
        }
    if (!mutant(123)) __syncwarp();
    const int rows = min(m - row - pass * Tile::kPassRows, Tile::kPassRows);
    if (count <= 0) continue;
#pragma unroll 1
    for (int r = lane / kPieces; r < rows; r += kRowsAtOnce) {
      float g[4], u[4];
      load_shared(g, place(r, piece));
      load_shared(u, place(r, kPieces + piece));
      epilogue(row + pass * Tile::kPassRows + r, from, count, g, u, gate_bias, up_bias);
    }
  }
}

}  // namespace pyfast
