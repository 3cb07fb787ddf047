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

// Bytes of shared memory that a warp's results of a set of queries take.
template <typename Shape>
constexpr int kMergingBytes = kSetQueries * kPartialFloats<Shape> * 4;

// Where a block merges its warps' results, set of queries after set: a warp's part is
// [kSetQueries][kPartialFloats] f32.
struct MergingArea {
  uint8_t* parts;       // warp 0's
  int32_t part_bytes;   // from a warp's to the next
  const float* before;  // one part more, of the queries of all sets; null: none
};

// Bytes of the block's shared memory up to the end of the stages.
template <typename Shape>
MUSTAFAR_HOST_DEVICE constexpr int32_t stages_end(int32_t stage_bytes) {
  return Shape::kStagesAt + kDecodeWarps * (kStages * stage_bytes + kStageSlack);
}

// A split's results are merged in the stages of its last tile where these are large enough, else in
// an area behind the stages: copies into the other stages go on. Coded rows have an area of their
// own before.
template <typename Shape>
MUSTAFAR_HOST_DEVICE constexpr bool merges_in_stage(int32_t stage_bytes) {
  return !Shape::kCoded && stage_bytes >= kMergingBytes<Shape>;
}
template <typename Shape>
MUSTAFAR_HOST_DEVICE constexpr int32_t own_merging_bytes(int32_t stage_bytes) {
  return Shape::kCoded || merges_in_stage<Shape>(stage_bytes) ? 0
                                                              : kDecodeWarps * kMergingBytes<Shape>;
}

// shared: the block's; used: bytes from a warp's first stage to the one of its last tile, with
// which it is done.
template <typename Shape>
__device__ __forceinline__ MergingArea merging_area(uint8_t* shared, int32_t stage_bytes,
                                                    int32_t used) {
  if constexpr (Shape::kCoded) {
    return {shared + Shape::kMergeAt, kMergingBytes<Shape>, nullptr};
  } else if (merges_in_stage<Shape>(stage_bytes)) {
    return {shared + Shape::kStagesAt + used, kStages * stage_bytes + kStageSlack, nullptr};
  } else {
    return {shared + stages_end<Shape>(stage_bytes), kMergingBytes<Shape>, nullptr};
  }
}

// Merges the warps and writes the partials of this block's queries for a split, counted from the
// block's first. A barrier must come before the area is written otherwise, none before this call.
template <typename Shape>
__device__ __forceinline__ void write_partials(const AttentionArgs& args, const BlockPlan& plan,
                                               int split,
                                               Softmax<Shape::kTiles> (&softmax)[Shape::kSets],
                                               const MergingArea& area) {
  constexpr int kStride = kPartialFloats<Shape>;
  constexpr int kParts = kDecodeWarps + (Shape::kCoded ? 1 : 0);
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
#pragma unroll
  for (int set = 0; set < Shape::kSets; set++) {
    const Softmax<Shape::kTiles>& s = softmax[set];
    sync_block();  // every warp is done with its stage, and with the parts of before
    if (c < 2) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        float* const mine =
            reinterpret_cast<float*>(area.parts + warp * area.part_bytes) + (2 * c + n) * kStride;
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
    static_assert(kSetQueries == kDecodeWarps);
    if (set * kSetQueries + warp >= plan.n_heads) continue;
    const auto part = [&](int w) {
      if (Shape::kCoded && w == kDecodeWarps) {
        return area.before + (set * kSetQueries + warp) * kStride;
      }
      return reinterpret_cast<const float*>(area.parts + w * area.part_bytes) + warp * kStride;
    };
    const int n_parts = Shape::kCoded && area.before == nullptr ? kDecodeWarps : kParts;
    float2 max_sum[kParts];
    float max = -INFINITY;
#pragma unroll
    for (int w = 0; w < kParts; w++) {
      max_sum[w] = w < n_parts ? *reinterpret_cast<const float2*>(part(w) + Shape::kDim)
                               : float2{-INFINITY, 0.0f};
      max = fmaxf(max, max_sum[w].x);
    }
    float weight[kParts], sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kParts; w++) {  // a part without tokens: 0
      weight[w] = max_sum[w].x == -INFINITY ? 0.0f : exp2_approx(max_sum[w].x - max);
      sum += weight[w] * max_sum[w].y;
    }
    float* const to = partial_of<Shape>(args, plan, split, set * kSetQueries + warp);
#pragma unroll
    for (int d = 2 * lane; d < Shape::kDim; d += 2 * kWarpSize) {
      float2 value = {0.0f, 0.0f};
#pragma unroll
      for (int w = 0; w < kParts; w++) {
        if (w >= n_parts) continue;
        const float2 two = *reinterpret_cast<const float2*>(part(w) + d);
        value.x += weight[w] * two.x;
        value.y += weight[w] * two.y;
      }
      *reinterpret_cast<float2*>(to + d) = value;
    }
    if (lane == 0) *reinterpret_cast<float2*>(to + Shape::kDim) = {max, sum};
  }
}

template <int kTiles, int kSets>
__device__ __forceinline__ void reset(Softmax<kTiles> (&softmax)[kSets]) {
#pragma unroll
  for (int set = 0; set < kSets; set++) softmax[set] = {};
}

// Writes the partials of a split whose tiles are done, and starts anew.
template <typename Shape>
__device__ __forceinline__ void finish_split(const AttentionArgs& args, const BlockPlan& plan,
                                             int split, uint8_t* shared, int32_t stage_bytes,
                                             int32_t used,
                                             Softmax<Shape::kTiles> (&softmax)[Shape::kSets]) {
  write_partials<Shape>(args, plan, split, softmax, merging_area<Shape>(shared, stage_bytes, used));
  if (merges_in_stage<Shape>(stage_bytes)) sync_block();  // the stage is refilled next
  reset(softmax);
}

}  // namespace mustafar::cuda
