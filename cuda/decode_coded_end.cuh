// The end of a split of coded rows: sums of bits become a partial per query head.
#pragma once

#include <type_traits>

#include "cuda/coded_rows.cuh"
#include "cuda/decode_coded_shape.cuh"
#include "cuda/device_ops.cuh"

namespace mustafar::cuda {

// Where a split's result goes: query i's output, max and sum to `to` + i * stride, the first
// n_queries of them.
struct PartialRows {
  float* to;
  int32_t stride;
  int n_queries;
};

// Turns a split's sums of bits into sums of dims. A thread has one dim of kThreadQueries queries.
// dims: the values' table; area: kSumsBytes. The whole block has passed a barrier since it read
// the area or `exchange` at a split's end before.
template <typename Shape>
__device__ __forceinline__ void write_coded_split(CodedSums<Shape>& sums, const CodeDim* dims,
                                                  uint8_t* area, typename Shape::Exchange& exchange,
                                                  const PartialRows& rows) {
  const uint32_t thread = static_cast<uint32_t>(kept(static_cast<int>(threadIdx.x)));
  const uint32_t lane = thread % kWarpSize, warp = thread / kWarpSize;
  const uint32_t g = lane >> 2, c = lane & 3, odd = c >> 1;
#pragma unroll
  for (int set = 0; set < Shape::kSets; set++) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      float &sum = sums.sum[set][n], &p_sum = sums.p_sum[set][n];
#pragma unroll
      for (int m = 2; m <= 16; m *= 2) {
        sum += shuffle_xor(sum, m);
        p_sum += shuffle_xor(p_sum, m);
      }
      if (lane >= 2) continue;
      const uint32_t query = set * kSetQueries + 2 * lane + n;
      exchange.sum[warp][query] = sum;
      exchange.p_sum[warp][query] = p_sum;
      if (warp == 0) exchange.max[query] = sums.max[set][n];
    }
  }
  // With one set lanes c and c + 2 have the same: one gives row g, the other row g + 8.
  uint8_t* const mine = area + 2 * g * 9 * Shape::kSumBytes + 2 * c % Shape::kQueries * 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const auto give = [&](uint32_t half, int first) {
      const uint32_t bit = 2 * warp + i;
      const float unit = BitMasks::unit(bit + 8 * half);
      uint8_t* const to = mine + (half * 9 + bit) * Shape::kSumBytes;
#pragma unroll
      for (int n = 0; n < Shape::kChunks; n++) {
        const auto& out = sums.out[2 * n + i];
        const float two[2] = {first >= 0 ? out[first]
                              : odd == 0 ? out[0]
                                         : out[2],
                              first >= 0 ? out[first + 1]
                              : odd == 0 ? out[1]
                                         : out[3]};
        *reinterpret_cast<float2*>(to + n * 16 * 9 * Shape::kSumBytes) = {two[0] * unit,
                                                                          two[1] * unit};
      }
    };
    if constexpr (Shape::kSets == 1) {
      give(odd, -1);
    } else {
      give(0, 0);
      give(1, 2);
    }
  }
  sync_block();
  if (thread < static_cast<uint32_t>(rows.n_queries)) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; w++) sum += exchange.sum[w][thread];
    *reinterpret_cast<float2*>(rows.to + static_cast<int32_t>(thread) * rows.stride +
                               Shape::kDim) = {exchange.max[thread], sum};
  }
  constexpr int kThreadQueries = Shape::kQueries * Shape::kDim / (kDecodeWarps * kWarpSize);
  constexpr int kLoaded = kThreadQueries < 4 ? kThreadQueries : 4;
  using Floats = std::conditional_t<kLoaded == 4, float4, float2>;
  const uint32_t d = thread % Shape::kDim;
  const int first_query = static_cast<int>(thread / Shape::kDim) * kThreadQueries;
  const auto load = [&](const void* from, float(&to)[kThreadQueries]) {
    const float* const mine = static_cast<const float*>(from) + first_query;
#pragma unroll
    for (int q = 0; q < kThreadQueries; q += kLoaded) {
      const Floats vector = *reinterpret_cast<const Floats*>(mine + q);
      to[q] = vector.x;
      to[q + 1] = vector.y;
      if constexpr (kLoaded == 4) {
        to[q + 2] = vector.z;
        to[q + 3] = vector.w;
      }
    }
  };
  float p_sum[kThreadQueries], value[kThreadQueries] = {};
  load(exchange.p_sum[0], p_sum);
#pragma unroll
  for (int w = 1; w < kDecodeWarps; w++) {
    float of_warp[kThreadQueries];
    load(exchange.p_sum[w], of_warp);
#pragma unroll
    for (int q = 0; q < kThreadQueries; q++) p_sum[q] += of_warp[q];
  }
  const CodeDim dim = dims[d];
  uint32_t bit = dim.first_bit() + dim.width();
#pragma unroll 1
  while (bit > dim.first_bit()) {  // from the highest down
    bit--;
    float of_bit[kThreadQueries];
    load(area + (bit + bit / 8) * Shape::kSumBytes, of_bit);
    const float still = bit % 16 == 15 ? 0.5f : 0.0f;
#pragma unroll
    for (int q = 0; q < kThreadQueries; q++) {
      value[q] = 2.0f * value[q] + of_bit[q] + still * p_sum[q];
    }
  }
  const float middle = 0.5f - 0.5f * static_cast<float>(1u << dim.width());
  float* to = rows.to + first_query * rows.stride + d;
#pragma unroll
  for (int q = 0; q < kThreadQueries; q++) {
    if (first_query + q < rows.n_queries) *to = (value[q] + middle * p_sum[q]) * dim.step;
    to += rows.stride;
  }
}

}  // namespace mustafar::cuda
