// The end of a decode block: its warps' softmaxes become one partial per query head.
#pragma once

#include "cuda/attention.h"
#include "cuda/decode_dense.cuh"
#include "cuda/decode_scores.cuh"
#include "cuda/decode_softmax.cuh"
#include "cuda/decode_stages.cuh"
#include "cuda/device_ops.cuh"

namespace mustafar::cuda {

// The dim of row g of output tile t, and how far that of row g + 8 lies from it.
template <typename Shape>
__device__ __forceinline__ int output_dim(int t, int g) {
  if constexpr (Shape::kDense) return DenseSlots<Shape>::output_dim(t, g);
  return g * Shape::kVDims + 2 * t;
}
template <typename Shape>
constexpr int kPairStep = Shape::kDense ? DenseSlots<Shape>::kPairStep : 1;

// Bytes of shared memory that the warps' results take at the end.
template <typename Shape>
constexpr int merging_bytes = kDecodeWarps * Shape::kQueries * (Shape::kDim + 2) * 4;

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

}  // namespace mustafar::cuda
