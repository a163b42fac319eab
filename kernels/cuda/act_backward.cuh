// dpre = dy * act'(saved) [M, N] in one elementwise pass, and the column sums of dpre on the way: the bias gradient.
// Bound by bytes: dy and saved are read and dpre is written once. A derivative with erf or exp is made here, once for
// each element; inside the products it would be made again for every tile beside the first.
#pragma once

#include "chunk.cuh"
#include "column_sums.cuh"

namespace pyfast {

constexpr int kActWarps = 8;          // of a block, each with every 8th row of it
constexpr int kActBlocks = 512;       // wanted: enough for every multiprocessor to hold several
constexpr int kActLeastRows = 32;     // of a block: its partial sums must stay few beside what it reads

template <class T>
struct ActBackwardArgs {
  const T *dy, *saved;   // [m, n], contiguous; saved is null for no activation
  T* dpre;               // [m, n] or null
  float* partial;        // [blocks of rows, padded(n)] or null
  int64_t m;
  int n;
  Act act;
  bool aligned;          // rows begin at multiples of 16 bytes
};

// A lane has the same 16 bytes of columns in every row that its warp takes.
template <class T>
__global__ void __launch_bounds__(32 * kActWarps) act_backward_kernel(ActBackwardArgs<T> g) {
  constexpr int kSize = Chunk<T>::kSize;
  constexpr int kPitch = 32 + 32 / kSize;   // neither lanes nor columns side by side share a bank
  __shared__ float sums[kActWarps][kSize * kPitch];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int col = (blockIdx.x * 32 + lane) * kSize, count = min(g.n - col, kSize);
  const bool aligned = g.aligned && count == kSize;
  float total[kSize] = {};
  if (count > 0)
    dispatch_act(g.act, [&](auto act) {
      const int64_t step = int64_t(gridDim.y) * kActWarps * (1 + mutant(109));
      for (int64_t row = int64_t(blockIdx.y) * kActWarps + warp; row < g.m; row += step) {
        const int64_t at = row * g.n + col;
        Chunk<T> d = load_chunk(g.dy + at, count, aligned), s = d;
        if (decltype(act)::value != Act::none) s = load_chunk(g.saved + at, count, aligned);
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const float v = float(d.part[e]) * activate_grad<decltype(act)::value>(float(s.part[e]));
          total[e] += v;
          d.part[e] = T(v);
        }
        if (!g.dpre) continue;
        if (aligned)
          *reinterpret_cast<uint4*>(g.dpre + at) = d.whole;
        else
#pragma unroll
          for (int e = 0; e < kSize; ++e)
            if (e < count) g.dpre[at + e] = d.part[e];
      }
    });
  if (!g.partial) return;
#pragma unroll
  for (int e = 0; e < kSize; ++e) sums[warp][e * kPitch + lane] = total[e];
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * kSize; i += 32 * kActWarps) {
    const int to = blockIdx.x * 32 * kSize + i;
    if (to >= g.n) continue;
    float sum = 0.0f;
    for (int w = 0; w < kActWarps; ++w) sum += sums[w][i % kSize * kPitch + i / kSize];
    g.partial[int64_t(blockIdx.y) * padded(g.n) + to] = sum;
  }
}

// Blocks of rows: the rows of the workspace `partial`.
template <class T>
int act_backward_blocks(int64_t m, int64_t n) {
  const int64_t across = (n + 32 * Chunk<T>::kSize - 1) / (32 * Chunk<T>::kSize);
  const int64_t most = (m + kActLeastRows - 1) / kActLeastRows, wanted = (kActBlocks + across - 1) / across;
  return int(most < wanted ? most : wanted);
}

template <class T>
cudaError_t launch_act_backward(const ActBackwardArgs<T>& g, cudaStream_t stream) {
  const dim3 grid(unsigned((g.n + 32 * Chunk<T>::kSize - 1) / (32 * Chunk<T>::kSize)),
                  unsigned(act_backward_blocks<T>(g.m, g.n)));
  act_backward_kernel<T><<<grid, 32 * kActWarps, 0, stream>>>(g);
  return cudaGetLastError();
}

}  // namespace pyfast
