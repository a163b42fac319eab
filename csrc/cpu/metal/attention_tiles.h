// What the passes of attention share. Scores are kept transposed: a tile has a row per key and a column per
// query, kCols queries wide. Softmax is then arithmetic between rows (no sums across lanes), and the tile is,
// as it stands, the packed right operand of the next product: V^T P^T and K^T dS^T.
#pragma once

#include "attention.h"
#include "gemm_pack.h"
#include "vecmath.h"

namespace pyfast {
namespace {

constexpr double kLog2e = 1.4426950408889634;

// Keys of a block: at least 128, in whole panels, so that 512 keys are four blocks.
template <class Core> constexpr int64_t kBlockKeys = round_up(128, Core::kRows);

// 2^(x unit) for x unit <= 127: exactly 1 at 0 and 0 at -inf; relative error below 1e-7. Results below 2^-125, about,
// become 0. x is the difference of two scores: only that goes to base 2, for of large scores changing each would round
// away what the difference is made of.
inline VecF exp2(VecF x, float unit) {
  constexpr float kRound = 12582912.f;   // 1.5 * 2^23: adding it rounds to an integer
  const VecF n = (x * unit + kRound) - kRound, r = x * unit - n;
  VecF p = r * 0.00015353361959569156f + 0.0013398873852565885f;
  p = p * r + 0.00961843691766262f;
  p = p * r + 0.055503323674201965f;
  p = p * r + 0.24022647738456726f;
  p = p * r + 0.6931471824645996f;
  p = p * r + 1.f;
#ifdef __AVX512F__
  return (VecF)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)n, _mm512_set1_ps(-125.f), _CMP_NLT_UQ), (__m512)p,
                                      (__m512)n);
#else
  const VecI whole = __builtin_convertvector(n >= -125.f ? n : VecF{}, VecI);
  return n < -125.f ? VecF{} : p * power_of_two(whole);
#endif
}
inline VecD exp2(VecD x, double unit) {
  return each_lane(x * unit, [](double v) { return __builtin_exp2(v); });
}

// A score times what apply_masks() returned, rounded as in lse: contracted into the subtraction of lse it would not
// give 0 where lse is that score.
template <class A>
inline Vec<A> scaled(Vec<A> score, A factor) {
  return __builtin_assoc_barrier(score * factor);
}

// f(TypeTag<T>) for the storage types whose products run on Core.
template <class Core, class F>
void dispatch_storage(DType dtype, const F& f) {
  if constexpr (Core::kDepth > 1) return f(TypeTag<bf16>{});
  else if constexpr (sizeof(typename Core::Acc) == 8) return f(TypeTag<double>{});
  else if (dtype == DType::float32) return f(TypeTag<float>{});
  else if (dtype == DType::float16) return f(TypeTag<f16>{});
  else return f(TypeTag<bf16>{});
}

// f(TypeTag<Core>) with the core for a dtype. Pairs of bfloat16 in tiles of 16 x 16: of 64 features and 2048 positions
// nothing is padded, and no part of a block goes to waste where it is transposed.
template <class F>
void dispatch_core(DType dtype, const F& f) {
#if defined(PYFAST_TILES)
  f(TypeTag<AmxCore>{});
#elif defined(PYFAST_BF16_CORE)
  f(TypeTag<PairTile<16, 1>>{});
#else
  dtype == DType::float64 ? f(TypeTag<FmaCore<double>>{}) : f(TypeTag<FmaCore<float>>{});
#endif
}

// ---- workspaces ----------------------------------------------------------------------------------
class Carver {
 public:
  explicit Carver(void* base) : base_(reinterpret_cast<uintptr_t>(base)), at_(base_) {}
  template <class X>
  X* take(int64_t count) {
    const uintptr_t at = at_;
    at_ += round_up(count * int64_t(sizeof(X)), 64);
    return reinterpret_cast<X*>(at);
  }
  int64_t used() const { return int64_t(at_ - base_); }

 private:
  uintptr_t base_, at_;
};

// A Buffers(Carver&, sizes...) in the scratch memory of this thread: measured first, then carved.
template <class Buffers, class... Sizes>
Buffers carve(const Sizes&... sizes) {
  Carver measure(nullptr);
  Buffers(measure, sizes...);
  Carver carver(scratch<char>(0, measure.used()));
  return Buffers(carver, sizes...);
}

// ---- who does what -------------------------------------------------------------------------------
// The blocks of one of `of` workers, dealt out in alternating direction: under a causal mask, where the work of
// a block grows with its number, all get the same.
struct Share {
  int64_t index, of, blocks;

  int64_t count() const {
    const int64_t rounds = blocks / of;
    return rounds + (id(rounds) < blocks);
  }
  int64_t id(int64_t j) const { return j * of + (j % 2 ? of - 1 - index : index); }
};

// Workers per group: the fewest, from `least` on, that keep 90% of the threads busy, else the best there is.
inline int64_t share_count(int64_t groups, int64_t least, int64_t most) {
  const int64_t threads = thread_count();
  int64_t best = least;
  double best_use = 0;
  for (int64_t n = least; n <= most && n <= least + 4 * threads; ++n) {
    const double use = double(groups * n) / double(threads * ceil_div(groups * n, threads));
    if (use > best_use + 1e-9) best = n, best_use = use;
    if (use >= 0.9) break;
  }
  return best;
}

// ---- operands ------------------------------------------------------------------------------------
template <class T, class Data>
inline T* at(const Heads<Data>& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head + t * x.time;
}

// Into L2: the rows of a head lie apart, and are not fetched by themselves.
template <class T>
inline void fetch_rows(const T* row, int64_t stride, int64_t count, int64_t features) {
  for (int64_t i = 0; i < count; ++i, row += stride)
    for (int64_t j = 0; j < features; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + j, 0, 2);
}

// Panels of `count` positions from t on, as rows or columns of a product over the features; or, `across`, of
// the features, for a product over the positions. As many positions that follow are fetched meanwhile.
template <class Core, bool kRows, bool kAcross>
__attribute__((noinline)) void pack_heads(DType dtype, typename Core::Elem* to, const Heads<const void>& x, int64_t b,
                                          int64_t h, int64_t t, int64_t count, int64_t features) {
  constexpr int64_t width = kRows ? Core::kRows : Core::kCols;
  dispatch_storage<Core>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* data = at<const T>(x, b, h, t);
    fetch_rows(data + count * x.time, x.time, count, features);
    const Operand<T> whole = kAcross ? Operand<T>{data, 1, x.time, features, count}
                                     : Operand<T>{data, x.time, 1, count, features};
    const int64_t depth = padded_depth<Core>(whole.depth);
    for (int64_t lane = 0; lane < whole.lanes; lane += width, to += width * depth) {
      if constexpr (kRows) pack_row_panel<Core>(to, whole.from(lane, 0));
      else pack_col_panel<Core>(to, whole.from(lane, 0));
    }
  });
}

// c[rows][kCols] (+)= row panels times one column panel.
template <class Core>
__attribute__((noinline)) void multiply_rows(int64_t rows, int64_t depth, const typename Core::Elem* a,
                                             const typename Core::Elem* b, typename Core::Acc* c, bool accumulate) {
  const int64_t padded = padded_depth<Core>(depth);
  for (int64_t i = 0; i < rows; i += Core::kRows)
    Core::multiply(padded, a + i * padded, b, c + i * Core::kCols, Core::kCols, accumulate);
}

// The tile as a packed right operand: itself, or its conversion in `packed`.
template <class Core>
const typename Core::Elem* as_columns(const typename Core::Acc* tile, int64_t keys, typename Core::Elem* packed) {
  if constexpr (Core::kDepth == 1) return tile;
  else {
    pack_col_panel<Core>(packed, Operand<float>{tile, 1, Core::kCols, Core::kCols, keys});
    return packed;
  }
}

// out[lane][i] = tile[i][lane] * factor[lane]: back from a column per query to a row per query.
template <class Core, class T>
__attribute__((noinline)) void store_transposed(const typename Core::Acc* tile, const typename Core::Acc* factor,
                                                T* out, int64_t stride, int64_t lanes, int64_t features) {
  using A = typename Core::Acc;
  constexpr int64_t n = kLanes<A>;
  for (int64_t lane = 0; lane < lanes; lane += n) {
    const Vec<A> scale = load(factor + lane);
    for (int64_t i = 0; i < features; i += n) {
      const int64_t wide = min_of(n, features - i), high = min_of(n, lanes - lane);
      Vec<A> block[n];
      for (int64_t j = 0; j < n; ++j)
        block[j] = j < wide ? load(tile + (i + j) * Core::kCols + lane) * scale : Vec<A>{};
      transpose(block);
      for (int64_t j = 0; j < high; ++j) {
        T* to = out + (lane + j) * stride + i;
        wide == n ? store(to, block[j]) : store_part(to, block[j], wide);
      }
    }
  }
}

}  // namespace
}  // namespace pyfast
