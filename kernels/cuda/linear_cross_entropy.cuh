// Cross entropy of x weight^T + bias, whose logits exist as tiles only: how it is cut into launches.
//
// Forward: the rows that count are gathered, and every tile of their logits leaves a maximum and sums for each row,
// 1/32 of the bytes of logits in 16 bits; a second kernel puts them together. Backward, slab after slab of classes: the
// tiles again, from them their gradient dL in the dtype, dX += dL W in float32, and dW = dL^T X, which is finished with
// its slab and rounded once. All sums are added in an order that the sizes decide.
#pragma once

#include "linear_cross_entropy.h"
#include "logit_rows.cuh"
#include "products.cuh"
#include "weight_gradient.h"

namespace pyfast {

constexpr int kLeastSlabTiles = 256;   // of logits, that are never too many: they fill a GPU twice
constexpr int kSlabStep = 256;         // classes

template <class T>
using LossTile = std::conditional_t<sizeof(T) == 4, FloatTile, LargeTile>;
template <class T>
constexpr int kLossColumns = LossTile<T>::kN;               // that leave one set of numbers
template <class T>
constexpr int kLossStep = sizeof(T) == 4 ? FloatTile::kK : 64;   // slices of a depth are multiples of it

// Products with large tiles: vocabularies fill a GPU with them however few the rows are. On capability 9.0 tiles of
// kCols by tensor maps; where those cannot read the weight, mma.sync: an epilogue that keeps a tile in registers leaves
// none beside wgmma for two blocks.
template <int kCols, Major kB, class T, class Epilogue>
cudaError_t launch_large(int capability, const GemmArgs<T>& g, int slices, const Epilogue& epilogue,
                         cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    cudaError_t status = cudaSuccess;
    if (capability == 9 &&
        launch_gemm_tma<T, TmaTile<kCols>, Major::depth, kB, false>(&status, g, slices, epilogue, stream))
      return status;
  }
  return launch_gemm_async<T, LossTile<T>, Major::depth, kB, false>(g, slices, epilogue, stream);
}

// Hands out the workspace; without memory it only counts.
struct Pieces {
  char* base;
  int64_t used = 0;

  template <class P>
  P* take(int64_t count) {
    P* const piece = base ? reinterpret_cast<P*>(base + used) : nullptr;
    used += ceil_div(count * int64_t(sizeof(P)), 256) * 256;
    return piece;
  }
};

// What both directions begin with: the rows that count.
template <class T>
struct GatheredRows {
  CountedRows counted;
  int pitch;   // elements; at least one load, so that there is a column to multiply the gradient of a bias by
  T* x;        // [rows, pitch]

  GatheredRows(const LinearLossOperands& in, Pieces& pieces) {
    counted.count = pieces.take<int>(1);
    counted.index = pieces.take<int>(in.rows);
    counted.place = pieces.take<int>(in.rows);
    pitch = int(ceil_div(in.depth > 0 ? in.depth : 1, Chunk<T>::kSize) * Chunk<T>::kSize);
    x = pieces.take<T>(in.rows * pitch);
  }

  cudaError_t launch(const LinearLossOperands& in, cudaStream_t stream) const {
    count_rows_kernel<><<<1, kCountThreads, 0, stream>>>(counted, in.target, in.rows, in.classes, in.ignore_index);
    const auto from = operand<T>(in.x, in.x_stride);
    gather_rows_kernel<T><<<unsigned(ceil_div(in.rows, kGatherWarps)), 32 * kGatherWarps, 0, stream>>>(
        x, pitch, from.data, from.stride, in.rows, int(in.depth), counted, from.aligned);
    return cudaGetLastError();
  }

  // The product that makes the logits of the classes [first, first + n).
  GemmArgs<T> logits(const LinearLossOperands& in, int64_t first, int64_t n) const {
    const T* const weight = static_cast<const T*>(in.weight) + first * in.weight_stride;
    GemmArgs<T> g{operand<T>(x, pitch), operand<T>(weight, in.weight_stride), int(in.rows), int(n), int(in.depth),
                  int(in.depth), nullptr, 0};
    g.rows_there = counted.count;
    return g;
  }
};

// ---- forward ----

template <class T>
struct LinearLossPlan {
  Pieces pieces;
  GatheredRows<T> rows;
  int tiles;   // of a row
  float2* partial;
  float *spread, *at_target, *tile_weights;

  LinearLossPlan(const LinearLossOperands& in, void* workspace)
      : pieces{static_cast<char*>(workspace)}, rows(in, pieces) {
    tiles = int(ceil_div(in.classes, kLossColumns<T>));
    const bool smooth = in.label_smoothing > 0;
    partial = pieces.take<float2>(tiles * in.rows);
    spread = pieces.take<float>(smooth ? tiles * in.rows : 0);
    at_target = pieces.take<float>(in.rows);
    tile_weights = pieces.take<float>(smooth && in.class_weight ? tiles : 0);
    if (!smooth) spread = nullptr;
    if (!smooth || !in.class_weight) tile_weights = nullptr;
  }
};

int64_t linear_cross_entropy_workspace(const LinearCrossEntropyCudaArgs& a) {
  return dispatch_element(a.in.dtype, [&](auto e) {
    return LinearLossPlan<typename decltype(e)::type>(a.in, nullptr).pieces.used;
  });
}

template <class T>
cudaError_t launch_losses(const LinearCrossEntropyCudaArgs& a, cudaStream_t stream) {
  const LinearLossOperands& in = a.in;
  const LinearLossPlan<T> plan(in, a.workspace);
  cudaError_t status = plan.rows.launch(in, stream);
  if (status != cudaSuccess) return status;
  const TileLossEpilogue<T> epilogue{static_cast<const T*>(in.bias), in.class_weight, plan.rows.counted.place,
                                     plan.partial, plan.spread, plan.at_target, in.rows};
  status = launch_large<256, Major::depth>(in.capability, plan.rows.logits(in, 0, in.classes), 1, epilogue, stream);
  if (status != cudaSuccess) return status;
  if (plan.tile_weights)
    tile_weights_kernel<><<<unsigned(ceil_div(plan.tiles, kGatherWarps)), 32 * kGatherWarps, 0, stream>>>(
        plan.tile_weights, in.class_weight, plan.tiles, kLossColumns<T>, int(in.classes));
  join_tiles_kernel<><<<unsigned(ceil_div(in.rows, 32)), 32 * kJoinWarps, 0, stream>>>(
      {plan.partial, plan.spread, plan.at_target, plan.tile_weights, in.class_weight, plan.rows.counted, a.loss, a.lse,
       in.rows, int(in.classes), plan.tiles, kLossColumns<T>, in.label_smoothing});
  return cudaGetLastError();
}

cudaError_t launch_linear_cross_entropy(const LinearCrossEntropyCudaArgs& a, cudaStream_t stream) {
  const LinearLossOperands& in = a.in;
  if (in.rows > 0) {
    const cudaError_t status = dispatch_element(
        in.dtype, [&](auto e) { return launch_losses<typename decltype(e)::type>(a, stream); });
    if (status != cudaSuccess) return status;
  }
  if (a.total)
    reduce_loss_kernel<><<<1, total_threads(in.rows), 0, stream>>>(a.total, a.loss, in.target, in.class_weight, in.rows,
                                                                  in.classes, in.ignore_index, in.mean);
  return cudaGetLastError();
}

// ---- backward ----

// Elements from a row of dL to the next are a multiple of it: rows begin where the widest loads can.
constexpr int kSlabPitch = 64;

template <class T>
struct LinearLossBackwardPlan {
  Pieces pieces;
  GatheredRows<T> rows;
  int64_t slab, stride;      // classes of a slab; elements from a row of dL to the next
  int slices, split_k;       // of the product dX along a slab, each with float32 sums of its own
  int64_t sums_stride, slice;
  float* totals;
  RowFactors* factors;
  T *dlogits, *column;       // [rows, stride]; [slab, one load], where a bias has a gradient and its weight none
  float *sums, *scratch;     // [slices, rows, sums_stride]; of the weight gradient

  LinearLossBackwardPlan(const LinearCrossEntropyBackwardCudaArgs& a, void* workspace)
      : pieces{static_cast<char*>(workspace)}, rows(a.in, pieces) {
    const LinearLossOperands& in = a.in;
    sums_stride = padded(in.depth), slice = in.rows * sums_stride;
    using Tile = LossTile<T>;
    const int64_t tiles = std::max<int64_t>(gemm_tiles<Tile>(in.rows, in.depth), 1);
    const int64_t most = std::max<int64_t>(std::min<int64_t>(2 * kFullGrid / tiles, kMostSlices), 1);
    slab = slab_classes(in, kLeastSlabTiles * Tile::kM * Tile::kN, a.grad_x ? most * slice : 0);
    const int64_t steps = ceil_div(slab, kLossStep<T>), wanted = std::min<int64_t>(most, steps / kLeastSteps);
    split_k = int(ceil_div(steps, std::max<int64_t>(wanted, 1)) * kLossStep<T>);
    stride = ceil_div(slab, kSlabPitch) * kSlabPitch;
    slices = int(ceil_div(slab, split_k));
    totals = pieces.take<float>(2);
    factors = pieces.take<RowFactors>(in.rows);
    dlogits = pieces.take<T>(in.rows * stride);
    column = pieces.take<T>(a.grad_weight ? 0 : slab * Chunk<T>::kSize);
    sums = pieces.take<float>(a.grad_x ? slices * slice : 0);
    const int64_t last = in.classes - (in.classes - 1) / slab * slab;   // of fewer classes in more slices
    scratch = pieces.take<float>(std::max(weight_gradient_floats(weight_gradient(a, 0, slab)),
                                          weight_gradient_floats(weight_gradient(a, 0, last))));
  }

  // So many that the workspace is about an eighth of the logits, `sums` floats and what is taken already among it; or
  // of `least` logits.
  int64_t slab_classes(const LinearLossOperands& in, int64_t least, int64_t sums) const {
    const int64_t whole = in.rows * in.classes * int64_t(sizeof(T));
    const int64_t left = whole / 8 - pieces.used - sums * int64_t(sizeof(float));
    const int64_t fits = std::max(left / int64_t(sizeof(T)), least) / in.rows / kSlabStep * kSlabStep;
    return std::min(in.classes, std::max<int64_t>(fits, kSlabStep));
  }

  // Of n classes from `first` on; of no weight gradient a few columns are made, and the sums beside them are wanted.
  WeightGradientArgs weight_gradient(const LinearCrossEntropyBackwardCudaArgs& a, int64_t first, int64_t n) const {
    const auto from = [](void* grad, int64_t at) { return grad ? static_cast<T*>(grad) + at : nullptr; };
    WeightGradientArgs w{a.in.capability, a.in.dtype, n, a.grad_weight ? a.in.depth : Chunk<T>::kSize, a.in.rows};
    w.a = dlogits, w.a_stride = stride;
    w.b = rows.x, w.b_stride = rows.pitch;
    w.out = a.grad_weight ? from(a.grad_weight, first * a.in.depth) : column;
    w.sums = from(a.grad_bias, first);
    w.depth_there = rows.counted.count;
    w.workspace = scratch;
    return w;
  }
};

int64_t linear_cross_entropy_backward_workspace(const LinearCrossEntropyBackwardCudaArgs& a) {
  return dispatch_element(a.in.dtype, [&](auto e) {
    return LinearLossBackwardPlan<typename decltype(e)::type>(a, nullptr).pieces.used;
  });
}

// The gradients of n classes from `first` on.
template <class T>
cudaError_t launch_slab(const LinearCrossEntropyBackwardCudaArgs& a, const LinearLossBackwardPlan<T>& plan,
                        int64_t first, int64_t n, cudaStream_t stream) {
  const LinearLossOperands& in = a.in;
  const T* const bias = static_cast<const T*>(in.bias);
  const bool smooth = in.label_smoothing > 0;
  const SlabEpilogue<T> slab{plan.dlogits, plan.stride, bias ? bias + first : nullptr,
                             in.class_weight && smooth ? in.class_weight + first : nullptr, plan.factors, int(first)};
  cudaError_t status = launch_large<256, Major::depth>(in.capability, plan.rows.logits(in, first, n), 1, slab, stream);
  if (status == cudaSuccess && a.grad_x) {
    const T* const weight = static_cast<const T*>(in.weight) + first * in.weight_stride;
    GemmArgs<T> g{operand<T>(plan.dlogits, plan.stride), operand<T>(weight, in.weight_stride), int(in.rows),
                  int(in.depth), int(n), plan.split_k, nullptr, 0};
    g.rows_there = plan.rows.counted.count;
    const AddEpilogue add{plan.sums, plan.sums_stride, plan.slice, first == 0};
    status = launch_large<128, Major::rows>(in.capability, g, plan.slices, add, stream);
  }
  if (status == cudaSuccess && (a.grad_weight || a.grad_bias))
    status = launch_weight_gradient(plan.weight_gradient(a, first, n), stream);
  return status;
}

template <class T>
cudaError_t launch_loss_gradients(const LinearCrossEntropyBackwardCudaArgs& a, cudaStream_t stream) {
  const LinearLossOperands& in = a.in;
  const LinearLossBackwardPlan<T> plan(a, a.workspace);
  const CountedRows& counted = plan.rows.counted;
  if (!a.gathered)
    if (const cudaError_t status = plan.rows.launch(in, stream); status != cudaSuccess) return status;
  const bool smooth_weights = in.label_smoothing > 0 && in.class_weight;
  const unsigned threads = total_threads(smooth_weights ? std::max(in.classes, in.rows) : in.rows);
  if (in.mean || smooth_weights)
    class_totals_kernel<><<<1, threads, 0, stream>>>(
        plan.totals, in.target, in.class_weight, in.rows, in.classes, in.ignore_index);
  row_factors_kernel<><<<unsigned(ceil_div(in.rows, 256)), 256, 0, stream>>>(
      plan.factors, counted, in.rows, int(in.classes), a.grad_loss, a.grad_loss_stride, a.lse, plan.totals,
      in.class_weight, in.label_smoothing, in.mean);
  clear_rows_kernel<><<<64 / kGatherWarps, 32 * kGatherWarps, 0, stream>>>(
      reinterpret_cast<uint4*>(plan.dlogits), plan.stride * int64_t(sizeof(T)) / 16, in.rows, counted);
  cudaError_t status = cudaGetLastError();
  for (int64_t first = 0; first < in.classes && status == cudaSuccess; first += plan.slab)
    status = launch_slab(a, plan, first, std::min(plan.slab, in.classes - first), stream);
  if (status != cudaSuccess || !a.grad_x) return status;
  scatter_rows_kernel<T><<<unsigned(ceil_div(in.rows, kGatherWarps)), 32 * kGatherWarps, 0, stream>>>(
      static_cast<T*>(a.grad_x), int(in.depth), plan.sums, plan.sums_stride, plan.slice, plan.slices, in.rows, counted);
  return cudaGetLastError();
}

cudaError_t launch_linear_cross_entropy_backward(const LinearCrossEntropyBackwardCudaArgs& a, cudaStream_t stream) {
  return dispatch_element(a.in.dtype,
                          [&](auto e) { return launch_loss_gradients<typename decltype(e)::type>(a, stream); });
}

}  // namespace pyfast
