// Two matrices as one operand of a GEMM: what the two halves of a gated linear unit are multiplied by at once.
#pragma once

#include "gemm.cuh"

namespace pyfast {

// The rows of two matrices [rows, depth] of stride 1 in the depth by turns, eight of the first and eight of the second:
// neighbouring tiles [16, 8] of a product have the same columns of both, in the same places of the same threads.
template <class T>
struct PairedRows {
  const T *first, *second;
  int64_t first_stride, second_stride;
  int rows;       // of each
  bool aligned;   // both

  static constexpr int kTurn = 8;
  static __host__ __device__ constexpr int paired(int rows) { return (rows + kTurn - 1) / kTurn * 2 * kTurn; }
};

template <class X, int kRows, int kThreads, class T>
__device__ __forceinline__ void copy_operand(uint32_t to, const PairedRows<T>& o, int row, int, int k, int depth) {
  static_assert(X::kMajor == Major::depth, "rows take turns along the lines");
  constexpr int kStep = kThreads / X::kChunks, kTurn = PairedRows<T>::kTurn;   // lines at once; the same XOR for all
  constexpr bool kTurns = kStep % (2 * kTurn) != 0;   // a thread comes to both matrices
  static_assert(kStep % kTurn == 0 && X::kLines % kStep == 0, "threads share a tile evenly");
  const int chunk = threadIdx.x % X::kChunks, first = threadIdx.x / X::kChunks;
  const int bytes = min(max((depth - chunk * X::kPack) * int(sizeof(T)), 0), 16);
  const int own = row / 2 + (kTurns ? first : first / (2 * kTurn) * kTurn + first % kTurn);
  const auto copy = [&](int line, auto&& put) {   // line: of all the rows of the tile
    const bool second = (kTurns ? line / kTurn : first / kTurn) % 2 != mutant(121);
    const int source = own + line / (2 * kTurn) * kTurn;
    const T* const from = second ? o.second + source * o.second_stride : o.first + source * o.first_stride;
    const uint32_t tile = to + line / X::kRows * X::kBytes + line % X::kRows * X::kChunks * 16;
    put(tile + X::offset(first, chunk), from + k + chunk * X::kPack, source < o.rows || mutant(122) ? bytes : 0);
  };
  if (o.aligned) {
#pragma unroll
    for (int line = 0; line < kRows; line += kStep)
      copy(line, [](uint32_t place, const T* from, int count) { cp_async(place, from, count); });
  } else {
#pragma unroll 1
    for (int line = 0; line < kRows; line += kStep)
      copy(line, [](uint32_t place, const T* from, int count) { store_shared(place, gather(from, count)); });
  }
}

constexpr int kDepthStep = 64;   // the longest of a tile along the depth

// Two matrices of the same rows, one after the other along the depth. `begin`, where the second does, is a multiple of
// the step of every tile; from `depth`, where the first ends, up to it there are zeros.
template <class T>
struct PairedDepth {
  const T *first, *second;
  int64_t first_stride, second_stride;
  int depth, begin;
  bool aligned;   // both
};

template <class X, int kRows, int kThreads, class T>
__device__ __forceinline__ void copy_operand(uint32_t to, const PairedDepth<T>& o, int row, int rows, int k,
                                             int depth) {
  const bool second = k >= o.begin;
  const int at = second && !mutant(124) ? k - o.begin : k;
  const GemmOperand<T> one{second ? o.second : o.first, second ? o.second_stride : o.first_stride, o.aligned};
  copy_operand<X, kRows, kThreads>(to, one, row, rows, at, min(depth, o.depth - at));
}

}  // namespace pyfast
