// The start of a decode block of coded rows: what the queries weigh every bit of a key, and which
// bits are a value's dims.
#pragma once

#include "cuda/attention.h"
#include "cuda/coded_rows.cuh"
#include "cuda/decode_scores.cuh"
#include "cuda/device_ops.cuh"

namespace mustafar::cuda {

// The number of bits of the dims before this lane's, of which there are kLaneDims neighbours.
template <int kLaneDims>
__device__ __forceinline__ uint32_t bits_before(const uint32_t (&widths)[kLaneDims]) {
  const int lane = lane_id();
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < kLaneDims; i++) mine += widths[i];
  uint32_t end = mine;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const uint32_t other = shuffle(end, lane - step);
    if (lane >= step) end += other;
  }
  return end - mine;
}

// Bit weights, scales and offsets of the queries, and the values' table. A score is (scale * 8
// times the weighted sum of bits + offset) * the key's scale. Lane (g, c) reads a set's weights 16
// bytes at a time: of its n-th word the bits 0 and 1 of every byte's half, then 2 and 3, four
// bytes' weights in a word. The second terms are kSecondTerm further on, another set's
// kWeightBytes. scaled: scratch, [kQueries][kDim] f32; dim_of: scratch, a word for every bit;
// scales: [kQueries], then as many offsets. By the whole block; ends with a barrier.
template <typename Shape>
__device__ __forceinline__ void weigh_bits(const CodeTable& keys, const CodeTable& values,
                                           const BlockQueries<Shape>& queries, CodeDim* value_dims,
                                           float* scaled, uint16_t* dim_of, uint8_t* weights,
                                           float* scales) {
  constexpr int kLaneDims = Shape::kDim / kWarpSize, kBits = Shape::kRowBytes * 8;
  constexpr int kSecondTerm = 4 * kSetQueries * 16;
  const float softmax_scale = kLog2E / sqrtf(static_cast<float>(Shape::kDim));
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = lane_id();
  const int first = lane * kLaneDims;
  static_assert(kMaxWidth < 8);
  const float lane_step = coded_step(lane & 7);
  const auto step_of = [&](uint32_t width, float sigma) {
    return multiply_rounded(shuffle(lane_step, static_cast<int>(width & 7)), sigma);
  };
  uint32_t widths[kLaneDims];
  float sigmas[kLaneDims], steps[kLaneDims];
#pragma unroll
  for (int i = 0; i < kLaneDims; i++) {
    widths[i] = keys.widths[first + i];
    sigmas[i] = keys.sigmas[first + i];
  }
#pragma unroll
  for (int i = 0; i < kLaneDims; i++) steps[i] = softmax_scale * step_of(widths[i], sigmas[i]);
  // Queries `warp` of every set, by their warp; x: weights of the lowest bits.
#pragma unroll
  for (int set = 0; set < Shape::kSets; set++) {
    const int query = set * kSetQueries + warp;
    float x[kLaneDims], largest = 0.0f, offset = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneDims; i++) {
      x[i] = query < queries.n ? queries.from[query * Shape::kDim + first + i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kLaneDims; i++) {
      x[i] *= steps[i];
      const float half = 0.5f * static_cast<float>(1u << widths[i]);
      largest = fmaxf(largest, fabsf(x[i]) * half);
      offset += x[i] * (0.5f - half);
    }
    largest = warp_max(largest);
    offset = warp_sum(offset);
    const float inverse = largest > 0.0f ? kTopWhole / largest : 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneDims; i++) scaled[query * Shape::kDim + first + i] = x[i] * inverse;
    if (lane == 0) {
      scales[query] = 0.125f * largest / kTopWhole;
      scales[Shape::kQueries + query] = offset;
    }
  }
  if (warp == 0) {
    uint32_t bit = bits_before(widths);
#pragma unroll
    for (int i = 0; i < kLaneDims; i++) {
#pragma unroll
      for (uint32_t b = 0; b < kMaxWidth; b++) {
        if (b < widths[i]) dim_of[bit + b] = static_cast<uint16_t>((first + i) | b << 8);
      }
      bit += widths[i];
    }
  } else if (warp == 1) {
#pragma unroll
    for (int i = 0; i < kLaneDims; i++) {
      widths[i] = values.widths[first + i];
      sigmas[i] = values.sigmas[first + i];
    }
    uint32_t bit = bits_before(widths);
#pragma unroll
    for (int i = 0; i < kLaneDims; i++) {
      value_dims[first + i] = {step_of(widths[i], sigmas[i]), bit | widths[i] << 16};
      bit += widths[i];
    }
  }
  sync_block();
  // A bit of every chunk a thread, for all queries: bit lane of word `warp`.
  uint8_t* const to = weights + lane % 4 / 2 * kWarpSize * 16 + warp * 16 +
                      (lane % 2 * 2 + lane % 8 / 4) * 4 + lane / 8;
#pragma unroll
  for (int n = 0; n < Shape::kChunks; n++) {
    const int bit = n * kDecodeWarps * kWarpSize + thread;
    const uint32_t place = bit < kBits ? dim_of[bit] : 0u;
    const float power = bit < kBits ? bits_float((127 + (place >> 8)) << 23) : 0.0f;
#pragma unroll
    for (int query = 0; query < Shape::kQueries; query++) {
      const TwoTerms terms = two_terms(scaled[query * Shape::kDim + (place & 0xff)] * power);
      uint8_t* const at = to + query / kSetQueries * Shape::kWeightBytes + n * 2 * kWarpSize * 16 +
                          query % kSetQueries * 4 * 16;
      at[0] = terms.first;
      at[kSecondTerm] = terms.second;
    }
  }
  sync_block();
}

}  // namespace mustafar::cuda
