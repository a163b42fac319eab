// dgate = dy up act'(gate) and dup = dy act(gate) [M, N] side by side, in one elementwise pass that leaves the sums of
// their columns on its way: the bias gradients. Bound by bytes: three matrices are read and two are written, once.
#pragma once

#include "act_backward.cuh"

namespace pyfast {

template <class T>
struct GluBackwardArgs {
  const T *dy, *gate, *up;   // [m, n], contiguous
  T* pair;                   // [m, 2 * begin]: dgate, zeros up to begin, and dup from there on; or null
  float *gate_partial, *up_partial;   // [blocks of rows, padded(n)], or both null
  int64_t m;
  int n, begin;
  Act act;
  bool aligned;              // rows of [m, n] begin at multiples of 16 bytes
};

// As act_backward_kernel: a lane has the same 16 bytes of columns in every row that its warp takes.
template <class T>
__global__ void __launch_bounds__(32 * kActWarps) glu_backward_kernel(GluBackwardArgs<T> g) {
  constexpr int kSize = Chunk<T>::kSize;
  constexpr int kPitch = 32 + 32 / kSize;   // neither lanes nor columns side by side share a bank
  __shared__ float sums[2][kActWarps][kSize * kPitch];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int col = (blockIdx.x * 32 + lane) * kSize, count = min(max(g.n - col, 0), kSize);
  const bool aligned = g.aligned && count == kSize;
  float gate_total[kSize] = {}, up_total[kSize] = {};
  if (col < g.begin)
    dispatch_act(g.act, [&](auto act) {
      constexpr Act kAct = decltype(act)::value;
      for (int64_t row = int64_t(blockIdx.y) * kActWarps + warp; row < g.m; row += int64_t(gridDim.y) * kActWarps) {
        const int64_t at = row * g.n + col;
        Chunk<T> dy = load_chunk(g.dy + at, count, aligned), gate = load_chunk(g.gate + at, count, aligned);
        Chunk<T> up = load_chunk(g.up + at, count, aligned);   // zeros past the row
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const float d = float(dy.part[e]), z = float(gate.part[e]), y = activate<kAct>(z);
          const float dgate = d * float(up.part[e]) * activate_grad<kAct>(grad_from_output(kAct) ? y : z);
          const float dup = d * y;
          gate_total[e] += dgate, up_total[e] += dup;
          gate.part[e] = T(dgate), up.part[e] = T(dup);
        }
        if (!g.pair) continue;
        T* const to = g.pair + row * 2 * g.begin + col;
        *reinterpret_cast<uint4*>(to) = gate.whole;
        *reinterpret_cast<uint4*>(to + g.begin) = up.whole;
      }
    });
  if (!g.gate_partial) return;
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    sums[0][warp][e * kPitch + lane] = gate_total[e];
    sums[1][warp][e * kPitch + lane] = up_total[e];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * kSize; i += 32 * kActWarps) {
    const int which = i / (32 * kSize), own = i % (32 * kSize), to = blockIdx.x * 32 * kSize + own;
    if (to >= g.n) continue;
    float sum = 0.0f;
    for (int w = 0; w < kActWarps; ++w) sum += sums[which][w][own % kSize * kPitch + own / kSize];
    (which ? g.up_partial : g.gate_partial)[int64_t(blockIdx.y) * padded(g.n) + to] = sum;
  }
}

template <class T>
cudaError_t launch_glu_pass(const GluBackwardArgs<T>& g, cudaStream_t stream) {
  const int cols = g.pair ? g.begin : g.n, width = 32 * Chunk<T>::kSize;
  const dim3 grid(unsigned((cols + width - 1) / width), unsigned(act_backward_blocks<T>(g.m, g.n)));
  glu_backward_kernel<T><<<grid, 32 * kActWarps, 0, stream>>>(g);
  return cudaGetLastError();
}

}  // namespace pyfast
