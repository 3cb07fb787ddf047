// The merge of a row's splits: partial softmaxes of several heads become their attention output.
#pragma once

#include "cuda/attention.h"
#include "cuda/device_ops.cuh"
#include "cuda/row_transform.cuh"

namespace mustafar::cuda {

// Bytes of shared memory that merge_splits takes.
MUSTAFAR_HOST_DEVICE constexpr int merge_bytes(int threads, int n_heads, int head_dim,
                                               int n_parts) {
  return (n_heads * (kMaxSplits + n_parts * head_dim) +
          transform_scratch(threads, n_heads, head_dim)) *
         4;
}

// Heads [first_head, first_head + n) of row `row` of sequence s, which have one KV head, by a block
// of kThreads. Two neighbouring dims of a head are summed by n_parts threads, each taking every
// n_parts-th split. shared: weights [n][kMaxSplits], then partial sums [n_parts][n][head_dim], then
// transform_rows' scratch. n: at most kMaxHeads.
template <int kThreads, int kMaxHeads>
__device__ __forceinline__ void merge_splits(const AttentionArgs& args, const SequenceView& s,
                                             int32_t row, int32_t first_head, int n, int head_dim,
                                             int32_t n_splits, int n_parts, float* shared) {
  const int stride = head_dim + 2;  // even, as head_dim: pairs are aligned
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int64_t head_stride = int64_t{args.max_splits} * stride;
  const float* const partials =
      args.partials + (int64_t{row} * args.n_heads + first_head) * head_stride;
  float* const weights = shared;
  float* const merged = shared + n * kMaxSplits;

#pragma unroll 1
  for (int head = thread / kWarpSize; head < n; head += kThreads / kWarpSize) {
    const float* const max_sum = partials + head * head_stride + head_dim;
    float2 split[kMaxSplits / kWarpSize];
    float max = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxSplits / kWarpSize; i++) {
      const int at = i * kWarpSize + lane;
      split[i] = at < n_splits ? *reinterpret_cast<const float2*>(max_sum + at * stride)
                               : float2{-INFINITY, 0.0f};
      max = fmaxf(max, split[i].x);
    }
    max = warp_max(max);
    const float shift = max == -INFINITY ? 0.0f : max;
#pragma unroll
    for (int i = 0; i < kMaxSplits / kWarpSize; i++) {
      split[i].x = exp2_approx(split[i].x - shift);
      sum += split[i].x * split[i].y;
    }
    const float inverse = 1.0f / warp_sum(sum);
#pragma unroll
    for (int i = 0; i < kMaxSplits / kWarpSize; i++) {
      weights[head * kMaxSplits + i * kWarpSize + lane] = split[i].x * inverse;
    }
  }
  sync_block();
  const int pairs = head_dim / 2, items = n * pairs;
#pragma unroll 1
  for (int i = thread; i < n_parts * items; i += kThreads) {
    const int part = i / items, head = i % items / pairs, d = i % pairs * 2;
    const float* const from = partials + head * head_stride + d;
    float2 value = {0.0f, 0.0f};
#pragma unroll 8
    for (int32_t at = part; at < n_splits; at += n_parts) {
      const float2 two = *reinterpret_cast<const float2*>(from + at * stride);
      value.x += weights[head * kMaxSplits + at] * two.x;
      value.y += weights[head * kMaxSplits + at] * two.y;
    }
    merged[(part * n + head) * head_dim + d] = value.x;
    merged[(part * n + head) * head_dim + d + 1] = value.y;
  }
  sync_block();
  if (n_parts > 1) {
    for (int i = thread; i < n * head_dim; i += kThreads) {
      float value = merged[i];
      for (int part = 1; part < n_parts; part++) value += merged[part * n * head_dim + i];
      merged[i] = value;
    }
    sync_block();
  }
  float* const out = args.out + (int64_t{row} * args.n_heads + first_head) * head_dim;
  const int32_t kv_head = first_head / (args.n_heads / args.n_kv_heads);
  const bool has_matrix = s.transform.v_backward != nullptr;
  if (has_matrix && args.undoes_values) {
    transform_rows<kThreads, kMaxHeads>(
        merged, n,
        s.transform.v_backward +
            head_index(args.layer, args.n_kv_heads, kv_head) * head_dim * head_dim,
        head_dim, merged + n_parts * n * head_dim,
        [&](int head, int d, float value) { out[head * head_dim + d] = value; });
    return;
  }
#pragma unroll 1
  for (int i = thread; i < n * head_dim; i += kThreads) {
    const int d = i % head_dim;
    out[i] = merged[i - d + stored_index(d, has_matrix ? 1 : s.transform.v_groups, head_dim)];
  }
}

}  // namespace mustafar::cuda
