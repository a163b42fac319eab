// The innermost matrix product: one packed panel of rows times one packed panel of columns, into a small
// tile of C. A core says how wide its panels are and in which type and layout it wants them.
//
//   Elem                  type of a packed element            Acc       type of C
//   kRows, kCols          sizes of the tile                   kDepth    panels are padded to a multiple of it
//   Session               lives around multiply() calls of a thread
//   multiply(depth, a, b, c, c_stride, accumulate)            c[kRows][kCols] (+)= sum over depth
#pragma once

#include "tiles.h"
#include "vec.h"

namespace pyfast {
namespace {

// Fused multiply-add on whole vectors. a[depth][kRows], b[depth][kCols]: per step two vector loads, kRows
// broadcasts, 2 kRows multiply-adds; the 2 kRows accumulators nearly fill the register file.
template <class A>
struct FmaCore {
  using Elem = A;
  using Acc = A;
  static constexpr int64_t kVectors = 2;
#if defined(__AVX512F__)
  static constexpr int64_t kRows = 14;   // 28 of 32 registers
#else
  static constexpr int64_t kRows = 6;    // 12 of 16
#endif
  static constexpr int64_t kCols = kVectors * kLanes<A>;
  static constexpr int64_t kDepth = 1;
  static constexpr int64_t kAhead = 16;   // steps b is fetched ahead: it streams from L2 (107 -> 125 GFLOP/s measured)
  struct Session {};

  static void multiply(int64_t depth, const A* a, const A* b, A* c, int64_t c_stride, bool accumulate) {
    Vec<A> sum[kRows][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k, a += kRows, b += kCols) {
      __builtin_prefetch(b + kAhead * kCols);
      __builtin_prefetch(b + kAhead * kCols + kLanes<A>);
      const Vec<A> b0 = load(b), b1 = load(b + kLanes<A>);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kRows; ++r) {
        const Vec<A> ar = splat(a[r]);
        sum[r][0] += ar * b0;
        sum[r][1] += ar * b1;
      }
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) {
      A* to = c + r * c_stride;
      if (accumulate) {
        sum[r][0] += load(to);
        sum[r][1] += load(to + kLanes<A>);
      }
      store(to, sum[r][0]);
      store(to + kLanes<A>, sum[r][1]);
    }
  }
};

#ifdef PYFAST_TILES
// AMX: four 16 x 16 tiles of C from two tiles of A and two of B, 32 deep in bfloat16.
// a[depth / 32][2][16 rows][32], b[depth / 32][2][16 pairs of depth][16 columns][2].
struct AmxCore {
  using Elem = bf16;
  using Acc = float;
  static constexpr int64_t kRows = 32, kCols = 32, kDepth = 32;
  static constexpr int64_t kTile = 16 * 32;   // elements of one packed tile
  using Session = TileSession;

  static void multiply(int64_t depth, const bf16* a, const bf16* b, float* c, int64_t c_stride, bool accumulate) {
    const int64_t bytes = c_stride * int64_t(sizeof(float));
    float *c10 = c + 16 * c_stride, *c01 = c + 16, *c11 = c10 + 16;
    if (accumulate) {
      tile_load<0>(c, bytes), tile_load<1>(c01, bytes), tile_load<2>(c10, bytes), tile_load<3>(c11, bytes);
    } else {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    }
    for (int64_t k = 0; k < depth; k += kDepth, a += 2 * kTile, b += 2 * kTile) {
      tile_load<4>(a, 64), tile_load<6>(b, 64), tile_load<7>(b + kTile, 64), tile_load<5>(a + kTile, 64);
      tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>(), tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
    }
    tile_store<0>(c, bytes), tile_store<1>(c01, bytes), tile_store<2>(c10, bytes), tile_store<3>(c11, bytes);
  }
};
#endif

// The core for operands stored as T.
template <class T> struct CoreOf { using type = FmaCore<acc_t<T>>; };
#ifdef PYFAST_TILES
template <> struct CoreOf<bf16> { using type = AmxCore; };
#endif
template <class T> using CoreFor = typename CoreOf<T>::type;

}  // namespace
}  // namespace pyfast
