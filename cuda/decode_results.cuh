// The end of a decode block: its warps' softmaxes become one partial per query head, and the last
// block of a few heads merges the partials of all splits.
#pragma once

#include "cuda/attention.h"
#include "cuda/decode_dense.cuh"
#include "cuda/decode_scores.cuh"
#include "cuda/decode_softmax.cuh"
#include "cuda/decode_stages.cuh"
#include "cuda/device_ops.cuh"
#include "cuda/merge_splits.cuh"

namespace mustafar::cuda {

// The dim of row g of output tile t, and how far that of row g + 8 lies from it.
template <typename Shape>
__device__ __forceinline__ int output_dim(int t, int g) {
  if constexpr (Shape::kDense) return DenseSlots<Shape>::output_dim(t, g);
  return g * Shape::kVDims + 2 * t;
}
template <typename Shape>
constexpr int kPairStep = Shape::kDense ? DenseSlots<Shape>::kPairStep : 1;

// Of the warps' results at the end.
template <typename Shape>
constexpr int merging_bytes() {
  const int of_warps = kDecodeWarps * Shape::kQueries * (Shape::kDim + 2) * 4;
  const int of_splits = 16 + merge_bytes(kDecodeWarps * kWarpSize, Shape::kQueries, Shape::kDim, 1);
  return of_warps > of_splits ? of_warps : of_splits;
}

// Merges the warps and writes the partials of this block's queries. merged: shared, [warp][query]
// [head_dim + 2] f32.
template <typename Shape>
__device__ void write_partials(const AttentionArgs& args, const BlockPlan& plan,
                               Softmax<Shape::kTiles> (&softmax)[Shape::kSets], float* merged) {
  constexpr int kStride = Shape::kDim + 2;
  const int thread = kept(static_cast<int>(threadIdx.x));
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int g = lane >> 2, c = lane & 3;
#pragma unroll
  for (int set = 0; set < Shape::kSets; set++) {
    Softmax<Shape::kTiles>& s = softmax[set];
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int m = 4; m <= 16; m *= 2) s.sum[n] += shuffle_xor(s.sum[n], m);
    }
#pragma unroll
    for (int t = 0; t < Shape::kTiles; t++) {
#pragma unroll
      for (int i = 0; i < 4; i++) s.out[t][i] += shuffle_xor(s.out[t][i], 2);
    }
  }
  sync_block();  // every warp is done with its stages
  if (c < 2) {
#pragma unroll
    for (int i = 0; i < 2 * Shape::kSets; i++) {
      const int n = i % 2;
      const Softmax<Shape::kTiles>& s = softmax[i / 2];
      float* mine = merged + (warp * Shape::kQueries + i / 2 * kSetQueries + 2 * c + n) * kStride;
#pragma unroll
      for (int t = 0; t < Shape::kTiles; t++) {
        float* const at = mine + output_dim<Shape>(t, g);
        if constexpr (kPairStep<Shape> == 1) {
          *reinterpret_cast<float2*>(at) = {s.out[t][n], s.out[t][2 + n]};
        } else {
          at[0] = s.out[t][n];
          at[kPairStep<Shape>] = s.out[t][2 + n];
        }
      }
      if (g == 0) *reinterpret_cast<float2*>(mine + Shape::kDim) = {s.max[n], s.sum[n]};
    }
  }
  sync_block();
#pragma unroll 1
  for (int query = warp; query < plan.n_heads; query += kDecodeWarps) {
    const float* const parts = merged + query * kStride;
    constexpr int kPart = Shape::kQueries * kStride;  // from a warp's to the next
    float2 max_sum[kDecodeWarps];
    float max = -INFINITY;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; w++) {
      max_sum[w] = *reinterpret_cast<const float2*>(parts + w * kPart + Shape::kDim);
      max = fmaxf(max, max_sum[w].x);
    }
    float weight[kDecodeWarps], sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; w++) {  // a warp without tokens: 0
      weight[w] = max_sum[w].x == -INFINITY ? 0.0f : exp2_approx(max_sum[w].x - max);
      sum += weight[w] * max_sum[w].y;
    }
    const int64_t head = int64_t{plan.row} * args.n_heads + plan.first_head + query;
    float* const to = args.partials + (head * args.max_splits + plan.split) * kStride;
#pragma unroll
    for (int d = 2 * lane; d < Shape::kDim; d += 2 * kWarpSize) {
      float2 value = {0.0f, 0.0f};
#pragma unroll
      for (int w = 0; w < kDecodeWarps; w++) {
        const float2 part = *reinterpret_cast<const float2*>(parts + w * kPart + d);
        value.x += weight[w] * part.x;
        value.y += weight[w] * part.y;
      }
      *reinterpret_cast<float2*>(to + d) = value;
    }
    if (lane == 0) *reinterpret_cast<float2*>(to + Shape::kDim) = {max, sum};
  }
}

// Where this block is the last of its heads' n_splits blocks: merges their partials. Which block
// that is differs from run to run, the result does not. shared: as for write_partials.
template <typename Shape>
__device__ void merge_if_last(const AttentionArgs& args, const BlockPlan& plan, float* shared) {
  constexpr int kThreads = kDecodeWarps * kWarpSize;
  fence_device();  // this thread's partials, before the block is counted
  sync_block();
  uint32_t* const before = reinterpret_cast<uint32_t*>(shared);
  if (kept(static_cast<int>(threadIdx.x)) == 0) {
    *before = atomic_count(args.arrivals + int64_t{plan.row} * args.n_heads + blockIdx.y,
                           static_cast<uint32_t>(plan.n_splits));
    fence_device();
  }
  sync_block();
  if (*before != static_cast<uint32_t>(plan.n_splits - 1)) return;
  // One thread a pair of dims: a head's sum does not depend on how many heads the block has.
  merge_splits<kThreads, Shape::kQueries>(args, args.sequences[blockIdx.z], plan.row,
                                          plan.first_head, plan.n_heads, Shape::kDim, plan.n_splits,
                                          1, shared + 4);
}

}  // namespace mustafar::cuda
