// Which rows, and which columns of them, a team of layer_norm or rms_norm has; and what it gathers by rows and columns.
#pragma once

#include "mutant.cuh"
#include "norm.h"
#include "rows.cuh"

namespace pyfast {

// Columns [cols] of weight or bias in shared memory, each at its place in the team's window, zeros around them.
template <class A, class Slice>
__device__ __forceinline__ void stage_columns(float* stage, const Slice& slice, const A* from) {
  for (int place = threadIdx.x; place < slice.kElements * int(blockDim.x); place += blockDim.x)
    stage[staged(place)] = slice.has(place - slice.shift) ? float(from[place - slice.shift]) : 0;
  team_barrier();
}

// Where the thread's own element of the window is.
template <class Slice>
__device__ __forceinline__ float& own(float* stage, const Slice& slice, int element) {
  constexpr int kSize = Slice::kSize;
  return stage[staged(slice.first(element / kSize) + slice.shift) + element % kSize];
}

// Weight or bias as the thread holds them of every row; by way of shared memory, since a lane's own elements are far
// apart where a row's packs are not those of the columns.
template <class A, class Slice>
__device__ __forceinline__ void load_columns(float (&to)[Slice::kElements], const Slice& slice, const A* from,
                                             float* stage) {
  const auto pack = reinterpret_cast<uintptr_t>(from - slice.shift) % 16;
  if (pack == 0) return slice.load(to, from, 0, slice.cols);
  stage_columns(stage, slice, from);
#pragma unroll
  for (int i = 0; i < slice.kElements; ++i) to[i] = own(stage, slice, i);
  team_barrier();
}

// f(pointer) with weight or bias from column `begin` on as what it is: of x's dtype, or float32.
template <class T, class F>
__device__ __forceinline__ void with_affine(const void* from, DType dtype, int begin, const F& f) {
  if (dtype == DType::float32) f(static_cast<const float*>(from) + begin);
  else f(static_cast<const T*>(from) + begin);
}

// The rows of a team: `count` of them, `period` apart. The first decides how far all are from a sector.
struct NormRows {
  unsigned set;   // of all teams' of the grid
  int64_t first;
  int period, count, most;   // most: that a team of this block has

  __device__ __forceinline__ NormRows(int64_t rows, int64_t each, int period)
      : set(blockIdx.x * blockDim.y + threadIdx.y),
        first(set / period * (each * period) + set % period),
        period(period),
        count(within(rows - first, each)),
        most(within(rows - first + threadIdx.y, each)) {}

  __device__ __forceinline__ int within(int64_t left, int64_t each) const {
    left = (left + period - 1) / period;
    return int(left < each ? (left < 0 ? 0 : left) : each);
  }

  // Teams go along side by side, so that a sector of two rows is still in a cache for the second.
  __device__ __forceinline__ bool next(int row) const {
    if (blockDim.y > 1) __syncthreads();
    return row < count;
  }
};

// The columns of a row that a block has: all, or a window of them, counted from the sector that the row begins in.
constexpr int kAllColumns = -1;

// Elements from the sector that a row begins in to the row.
template <class Slice>
__device__ __forceinline__ int row_shift(int64_t row, int cols) {
  constexpr int kWhole = kSector / (16 / Slice::kSize);
  return int(unsigned(row % kWhole) * unsigned(cols % kWhole) % kWhole);
}

template <class Slice>
struct NormStrip {
  int begin = 0;
  Slice slice;   // of the row from column `begin` on

  __device__ __forceinline__ NormStrip(int64_t row, int cols, int strip) {
    const int shift = row_shift<Slice>(row, cols);
    slice = {cols, shift};
    if (strip == kAllColumns) return;
    const int window = Slice::kElements * int(blockDim.x), from = strip * window - shift;
    begin = min(max(from, 0), cols);
    slice = {min(from + window, cols) - begin, strip == 0 ? shift : 0};
  }
};

// The other way round: to[column] = the sum of the column over the teams of a block, of which this one has rows from
// `first` on. `stages`: of all teams.
template <class Slice>
__device__ __forceinline__ void sum_columns(float* to, const Slice& slice, const float (&from)[Slice::kElements],
                                            float* stages, int64_t first, int cols) {
  const int window = int(staged_floats(Slice::kElements * blockDim.x)), teams = int(blockDim.y);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < slice.kElements; ++i) own(stages + threadIdx.y * window, slice, i) = from[i];   // past the row 0
  if (!mutant(1)) __syncthreads();
  for (int col = int(threadIdx.y * blockDim.x + threadIdx.x); col < slice.cols; col += int(blockDim.x) * teams) {
    float sum = 0;
    for (int t = 0; t < teams; ++t) {
      const int64_t row = first - int(threadIdx.y) + t;
      const int shift = teams == 1 ? slice.shift : row_shift<Slice>(row, cols);
      sum += stages[t * window + staged(col + shift)];
    }
    to[col] = sum;
  }
}

// As many elements as may be read beside a row, for the pack at its edge.
template <class T>
__device__ __forceinline__ int within_pack(int64_t elements) {
  return int(min(elements, int64_t(kPack<T>)));
}

template <bool kTwo>
using NormMeetings = BlockReduction<kTwo ? 2 : 1, float, true>;

// Two numbers of each of the next rows of all teams in shared memory, most often mean and rstd. They move for many rows
// at once, in the order of the rows: one by one, each would cost a sector.
struct NormStatistics {
  static constexpr int kRows = 32;   // of a team
  float mean[kRows * kNormTeams], rstd[kRows * kNormTeams];

  static __device__ __forceinline__ int place(int i) { return i % kRows * int(blockDim.y) + int(threadIdx.y); }

  // f(place, row) for each of them from the teams' row `begin` on, by the whole block.
  template <class F>
  static __device__ __forceinline__ void each(const NormRows& rows, int64_t all, int begin, const F& f) {
    const int teams = int(blockDim.y), count = min(rows.most - begin, kRows) * teams;
    const int64_t first = rows.first - threadIdx.y + int64_t(begin) * rows.period;
    __syncthreads();
    for (int i = int(threadIdx.y * blockDim.x + threadIdx.x); i < count; i += int(blockDim.x) * teams) {
      const int64_t row = first + int64_t(i / teams) * rows.period + i % teams;
      if (row < all) f(i, row);
    }
    if (!mutant(4)) __syncthreads();
  }

  // From and to an array by rows each; null means absent.
  __device__ __forceinline__ void load(const float* means, const float* rstds, const NormRows& rows, int64_t all,
                                       int begin) {
    each(rows, all, begin, [&](int i, int64_t row) {
      if (means) mean[i] = means[row];
      rstd[i] = rstds[row];
    });
  }
  __device__ __forceinline__ void store(float* means, float* rstds, const NormRows& rows, int64_t all,
                                        int begin) const {
    each(rows, all, begin, [&](int i, int64_t row) {
      if (means) means[row] = mean[i];
      rstds[row] = rstd[i];
    });
  }
};

}  // namespace pyfast
