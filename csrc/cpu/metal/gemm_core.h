// The innermost matrix product: one packed panel of rows times one packed panel of columns, into a small
// tile of C. A core says how wide its panels are and in which type and layout it wants them.
//
//   Elem                  type of a packed element            Acc       type of C
//   kRows, kCols          sizes of the tile                   kDepth    panels are padded to a multiple of it
//   kBlockRows            rows of A that share a panel of B on its way from memory
//   Session               lives around multiply() calls of a thread
//   multiply(depth, a, b, c, c_stride, accumulate, next)      c[kRows][kCols] (+)= sum over depth
//                         next: what to bring into L2 meanwhile, an eighth of the size of b; may be left out
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
  static constexpr int64_t kDepth = 1, kBlockRows = 96;
  static constexpr int64_t kAhead = 16;   // steps b is fetched ahead: it streams from L2 (107 -> 125 GFLOP/s measured)
  struct Session {};

  static void multiply(int64_t depth, const A* a, const A* b, A* c, int64_t c_stride, bool accumulate,
                       const A* next = nullptr) {
    Vec<A> sum[kRows][kVectors] = {};
    if (!next) next = b;
    for (int64_t k = 0; k < depth; ++k, a += kRows, b += kCols, next += kCols / 8) {
      __builtin_prefetch(next, 0, 2);
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

  // For products of another shape: a step of the depth of as many lanes as fill a vector, or of one lane in all.
  using Step = Vec<A>;
  static Step side_by_side(const A* b) { return load(b); }
  static Step spread(const A* a) { return splat(*a); }
  static void add_product(Vec<A>& sum, Step a, Step b) { sum += a * b; }
};

#if defined(PYFAST_TILES)
#define PYFAST_BF16_CORE
// AMX: four 16 x 16 tiles of C from two tiles of A and two of B, 32 deep in bfloat16.
// a[depth / 32][2][16 rows][32], b[depth / 32][2][16 pairs of depth][16 columns][2].
struct AmxCore {
  using Elem = bf16;
  using Acc = float;
  static constexpr int64_t kRows = 32, kCols = 32, kDepth = 32;
  // A core multiplies 512 pairs a cycle: B must come into L2 at 1024 / kBlockRows bytes a cycle, and A at 4. With 96
  // rows that would be 15 together, more than level 3 has for a core.
  static constexpr int64_t kBlockRows = 256;
  static constexpr int64_t kTile = 16 * 32;   // elements of one packed tile
  using Session = TileSession;

  static void multiply(int64_t depth, const bf16* a, const bf16* b, float* c, int64_t c_stride, bool accumulate,
                       const bf16* next = nullptr) {
    if (!next) next = b;
    const int64_t bytes = c_stride * int64_t(sizeof(float));
    float *c10 = c + 16 * c_stride, *c01 = c + 16, *c11 = c10 + 16;
    if (accumulate) {
      tile_load<0>(c, bytes), tile_load<1>(c01, bytes), tile_load<2>(c10, bytes), tile_load<3>(c11, bytes);
    } else {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    }
    for (int64_t k = 0; k < depth; k += kDepth, a += 2 * kTile, b += 2 * kTile, next += kDepth * kCols / 8) {
      for (int64_t i = 0; i < kDepth * kCols / 8; i += 32) __builtin_prefetch(next + i, 0, 2);
      tile_load<4>(a, 64), tile_load<6>(b, 64), tile_load<7>(b + kTile, 64), tile_load<5>(a + kTile, 64);
      tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>(), tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
    }
    tile_store<0>(c, bytes), tile_store<1>(c01, bytes), tile_store<2>(c10, bytes), tile_store<3>(c11, bytes);
  }
};
using Bf16Core = AmxCore;

#elif defined(__AVX512BF16__)
#define PYFAST_BF16_CORE
// Pairs of bfloat16 that are neighbours in depth, a pair in the place of FmaCore's float: VDPBF16PS adds both products
// to a float, twice the operations of a multiply-add. a[depth / 2][kRows][2], b[depth / 2][kCols][2].
template <int64_t kHigh, int64_t kWide>
struct PairTile {
  using Elem = bf16;
  using Acc = float;
  static constexpr int64_t kVectors = kWide, kRows = kHigh, kCols = kVectors * kLanes<float>, kDepth = 2;
  static constexpr int64_t kBlockRows = 96;
  static constexpr int64_t kAhead = 32;   // as in FmaCore
  struct Session {};

  static void multiply(int64_t depth, const bf16* a, const bf16* b, float* c, int64_t c_stride, bool accumulate,
                       const bf16* next = nullptr) {
    VecF sum[kRows][kVectors] = {};
    if (!next) next = b;
    for (int64_t k = 0; k < depth; k += kDepth, a += kDepth * kRows, b += kDepth * kCols, next += kDepth * kCols / 8) {
      __builtin_prefetch(next, 0, 2);
      __builtin_prefetch(b + kAhead * kCols);
      if (kVectors > 1) __builtin_prefetch(b + kAhead * kCols + 32);
      Step lanes[kVectors];
#pragma GCC unroll 2
      for (int64_t v = 0; v < kVectors; ++v) lanes[v] = side_by_side(b + 32 * v);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kRows; ++r) {
        const Step ar = spread(a + kDepth * r);
#pragma GCC unroll 2
        for (int64_t v = 0; v < kVectors; ++v) add_product(sum[r][v], ar, lanes[v]);
      }
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int64_t v = 0; v < kVectors; ++v) {
        float* to = c + r * c_stride + v * kLanes<float>;
        store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
      }
  }

  using Step = __m512bh;   // as in FmaCore
  static Step side_by_side(const bf16* b) { return (__m512bh)_mm512_loadu_si512(b); }
  static Step spread(const bf16* a) {
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static void add_product(VecF& sum, Step a, Step b) { sum = (VecF)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
using PairCore = PairTile<12, 2>;
using Bf16Core = PairCore;
#endif

#ifdef PYFAST_BF16_CORE
// f(TypeTag<T>) for the storage types an object has kernels for: bfloat16 alone at the levels that multiply it.
template <class F>
inline void dispatch_matmul_dtype(DType, const F& f) {
  f(TypeTag<bf16>{});
}
#else
template <class F>
inline void dispatch_matmul_dtype(DType dtype, const F& f) {
  dispatch_dtype(dtype, f);
}
#endif

// The core for operands stored as T.
template <class T> struct CoreOf { using type = FmaCore<acc_t<T>>; };
#ifdef PYFAST_BF16_CORE
template <> struct CoreOf<bf16> { using type = Bf16Core; };
#endif
template <class T> using CoreFor = typename CoreOf<T>::type;

}  // namespace
}  // namespace pyfast
