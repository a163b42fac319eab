// The rows whose target counts, side by side before the others, and how many they are: known to the device only.
// Products over them have grids for all rows, and blocks past the last one leave at once.
#pragma once

#include "chunk.cuh"
#include "class_weights.cuh"
#include "epilogue.cuh"

namespace pyfast {

constexpr int kCountThreads = 1024;
constexpr int kGatherWarps = 8;     // of a block; each takes a row

// In the order of counted rows: where each came from, and its class, -1 if it is none. Behind them, backwards, the rows
// that do not count.
struct CountedRows {
  int *count, *index, *place;
};

// One block: a prefix sum by votes of warps, as many rows at a time as it has threads.
template <class = void>
__global__ void __launch_bounds__(kCountThreads) count_rows_kernel(CountedRows to, const int64_t* target, int64_t rows,
                                                                   int64_t classes, int64_t ignore_index) {
  __shared__ int votes_of[2][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0, turn = 0;   // rows that count in the pieces before this one; two places, so one barrier is enough
  for (int64_t first = 0; first < rows; first += kCountThreads, turn ^= 1) {
    const int64_t row = first + threadIdx.x;
    const int64_t wanted = row < rows ? target[row] : 0;
    const bool counts = row < rows && wanted != ignore_index;
    const unsigned votes = __ballot_sync(kFullWarp, counts);
    if (lane == 0) votes_of[turn][warp] = __popc(votes);
    __syncthreads();
    int upto = votes_of[turn][lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, upto, step);
      if (lane >= step) upto += other;
    }
    const int others = __shfl_sync(kFullWarp, upto, max(warp - 1, 0)), all = __shfl_sync(kFullWarp, upto, 31);
    const int64_t rank = before + (warp ? others : 0) + __popc(votes & ((1u << lane) - 1));
    if (counts) {
      to.index[rank] = int(row);
      to.place[rank] = wanted >= 0 && wanted < classes ? int(wanted) : -1;
    } else if (row < rows) {
      to.index[rows - 1 - (row - rank)] = int(row);
    }
    before += all;
  }
  if (threadIdx.x == 0) *to.count = before;
}

// Products take whole steps of 64 rows, and find zeros in those that do not count.
__device__ __forceinline__ int64_t whole_steps(int count) { return (int64_t(count) + 63) / 64 * 64; }

// to [rows, pitch] = the rows of x that count, with zeros up to the pitch and to whole steps; a warp takes a row.
template <class T>
__global__ void __launch_bounds__(32 * kGatherWarps) gather_rows_kernel(T* to, int pitch, const T* x, int64_t stride,
                                                                        int64_t rows, int depth, CountedRows counted,
                                                                        bool aligned) {
  constexpr int kSize = Chunk<T>::kSize;
  const int64_t row = int64_t(blockIdx.x) * kGatherWarps + threadIdx.x / 32;
  const int there = *counted.count;
  if (row >= rows || row >= whole_steps(there)) return;
  const T* const from = x + (mutant(131) ? row : counted.index[row]) * stride;
  for (int col = threadIdx.x % 32 * kSize; col < pitch; col += 32 * kSize) {
    const int count = row < there ? max(min(depth - col, kSize), 0) : 0;
    const Chunk<T> chunk = load_chunk(from + col, count, aligned && count == kSize);
    *reinterpret_cast<uint4*>(to + row * pitch + col) = chunk.whole;
  }
}

// Zeros in the rows [.., chunks of 16 bytes] past those that count, up to whole steps; a warp takes a row.
template <class = void>
__global__ void __launch_bounds__(32 * kGatherWarps) clear_rows_kernel(uint4* to, int64_t chunks, int64_t rows,
                                                                       CountedRows counted) {
  const int there = *counted.count;
  const int64_t row = there + int64_t(blockIdx.x) * kGatherWarps + threadIdx.x / 32;
  if (row >= rows || row >= whole_steps(there)) return;
  for (int64_t c = threadIdx.x % 32; c < chunks; c += 32) to[row * chunks + c] = make_uint4(0, 0, 0, 0);
}

// dx = the sums of the slices in order, each row where it came from; zeros in rows that do not count.
template <class T>
__global__ void __launch_bounds__(32 * kGatherWarps) scatter_rows_kernel(T* dx, int depth, const float* sums,
                                                                         int64_t stride, int64_t slice, int slices,
                                                                         int64_t rows, CountedRows counted) {
  const int64_t row = int64_t(blockIdx.x) * kGatherWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const bool counts = row < *counted.count;
  T* const to = dx + counted.index[row] * int64_t(depth);
  for (int col = threadIdx.x % 32 * 4; col < depth; col += 128) {
    float v[4] = {};
    for (int s = 0; counts && s < slices; ++s) {   // what lies past the depth, up to the stride, is not used
      const float4 part = *reinterpret_cast<const float4*>(sums + s * slice + row * stride + col);
      v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
    }
    store_four(to + col, v, min(depth - col, 4), depth % 4 == 0);
  }
}

// sums[t] = the class weights of `width` classes from t * width on; a warp takes a tile.
template <class = void>
__global__ void __launch_bounds__(32 * kGatherWarps) tile_weights_kernel(float* sums, const float* class_weight,
                                                                         int tiles, int width, int classes) {
  const int tile = blockIdx.x * kGatherWarps + threadIdx.x / 32;
  if (tile >= tiles) return;
  float sum = 0;
  for (int c = threadIdx.x % 32; c < width; c += 32)
    if (tile * width + c < classes) sum += class_weight[tile * width + c];
  sum = over_lanes(sum, Add{});
  if (threadIdx.x % 32 == 0) sums[tile] = sum;
}

}  // namespace pyfast
