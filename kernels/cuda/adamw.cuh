// adamw_step_: the launcher.
#pragma once

#include <cmath>

#include "adamw_update.cuh"

namespace pyfast {

AdamWNumbers adamw_numbers(const double* hyper, bool decoupled, bool maximize, double grad_scale) {
  return numbers_of(hyper, decoupled, maximize, grad_scale);
}

int64_t adamw_chunks(const std::vector<AdamWCudaTensor>& tensors) {
  int64_t chunks = 0;
  for (const auto& t : tensors) chunks += (t.count + kAdamWCudaChunk - 1) / kAdamWCudaChunk;
  return chunks;
}

// f(table, chunks) for every launch: kMost tensors at a time, those of float64 apart, whose code needs more registers.
template <int kMost, bool kDouble, class F>
cudaError_t for_tables(const AdamWCudaArgs& a, const F& f) {
  AdamWTable<kMost> table{};
  table.numbers = a.hyper ? a.numbers : nullptr;
  int64_t chunks = 0;
  cudaError_t error = cudaSuccess;
  const auto flush = [&](int next) {
    if (chunks > 0 && error == cudaSuccess) error = f(table, chunks);
    table.first_chunk += chunks;
    table.first = next;
    table.count = 0;
    chunks = 0;
  };
  for (int i = 0; i < int(a.tensors.size()); ++i) {
    const bool ours = (DType(a.tensors[i].dtype) == DType::float64) == kDouble;
    const int64_t own = (a.tensors[i].count + kAdamWCudaChunk - 1) / kAdamWCudaChunk;
    if (!ours || own == 0) {   // a table holds neighbours of the lists
      flush(i + 1);
      table.first_chunk += own;
      continue;
    }
    if (table.count == kMost) flush(i);
    table.tensors[table.count] = a.tensors[i];
    table.tensors[table.count++].first_chunk = int32_t(chunks);
    chunks += own;
  }
  flush(0);
  return error;
}

template <int kMost, bool kDouble>
cudaError_t launch_norm_of(const AdamWCudaArgs& a, cudaStream_t stream) {
  return for_tables<kMost, kDouble>(a, [&](const AdamWTable<kMost>& table, int64_t chunks) {
    adamw_norm_kernel<kMost, kDouble><<<unsigned(chunks), kAdamWThreads, 0, stream>>>(table, a.partial);
    return cudaGetLastError();
  });
}

template <int kMost, bool kDouble>
cudaError_t launch_update_of(const AdamWCudaArgs& a, bool clips, cudaStream_t stream) {
  return for_tables<kMost, kDouble>(a, [&](const AdamWTable<kMost>& table, int64_t chunks) {
    adamw_update_kernel<kMost, kDouble>
        <<<unsigned(chunks), kAdamWThreads, 0, stream>>>(table, clips ? a.clip : nullptr, a.partial, a.found_inf);
    return cudaGetLastError();
  });
}

template <int kMost>
cudaError_t launch_all(const AdamWCudaArgs& a, cudaStream_t stream) {
  const bool clips = !std::isinf(a.max_norm) || a.found_inf;   // else the norm comes with the update
  const int64_t chunks = adamw_chunks(a.tensors);
  cudaError_t error = cudaSuccess;
  const auto then = [&](auto launch) {
    if (error == cudaSuccess) error = launch();
  };
  const auto finish = [&] {
    unsigned threads = 32;
    while (threads < 1024 && threads < chunks) threads *= 2;
    adamw_final_kernel<<<1, threads, 0, stream>>>(a.partial, chunks, std::fabs(a.grad_scale), a.max_norm, a.norm,
                                                  a.clip);
    return cudaGetLastError();
  };
  if (clips) {   // the norm first
    then([&] { return launch_norm_of<kMost, false>(a, stream); });
    then([&] { return launch_norm_of<kFewTensors, true>(a, stream); });
    then(finish);
  }
  then([&] { return launch_update_of<kMost, false>(a, clips, stream); });
  then([&] { return launch_update_of<kFewTensors, true>(a, clips, stream); });
  if (!clips) then(finish);
  return error;
}

cudaError_t launch_adamw_step(const AdamWCudaArgs& a, cudaStream_t stream) {
  const int count = int(a.tensors.size());
  if (a.hyper && count > 0) {
    adamw_numbers_kernel<<<unsigned((count + 127) / 128), 128, 0, stream>>>(a.numbers, a.hyper, count, a.decoupled,
                                                                            a.maximize, a.grad_scale);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return count <= kFewTensors ? launch_all<kFewTensors>(a, stream) : launch_all<kMostTensors>(a, stream);
}

}  // namespace pyfast
