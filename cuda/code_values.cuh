// The weights that codes stand for, as values.
#pragma once

#include "cuda/device_ops.cuh"
#include "cuda/linear.h"

namespace mustafar::cuda {

constexpr int kCodeColumns = 8;  // of a lane

// Values of columns [column, column + 8) of a row; column: a multiple of 8.
__device__ __forceinline__ void load_values(const LinearPart& part, int64_t cols, int64_t row,
                                            int64_t column, float (&values)[kCodeColumns]) {
  const int64_t tile = row / kTileRows, lane = row % kTileRows;
  const int64_t inner = (cols + kInnerStep - 1) / kInnerStep * kInnerStep;
  const int64_t n_groups = (cols + part.group - 1) / part.group;
  const bool wide = part.dtype == DType::kInt8;
  const uint8_t* const lines = static_cast<const uint8_t*>(part.weights) +
                               tile * inner * (wide ? kTileRows : kTileRows / 2) + lane * 4 +
                               column / 8 * (wide ? 128 : 64);
  const uint32_t low = *reinterpret_cast<const uint32_t*>(lines);
  const uint32_t high = wide ? *reinterpret_cast<const uint32_t*>(lines + 64) : low >> 4;
  const int64_t at = (tile * n_groups + column / part.group) * kTileRows + lane;
  const float scale = load_element(part.scales, part.scale_dtype, at);
  const bool minimums = part.offset == Offset::kMinimums;
  const float minimum = minimums ? load_element(part.offsets, part.scale_dtype, at) : 0.0f;
  const int32_t zero = part.offset == Offset::kZeros ? static_cast<const uint8_t*>(part.offsets)[at]
                       : minimums                    ? 0
                       : wide                        ? 128
                                                     : 8;
#pragma unroll
  for (int j = 0; j < kCodeColumns; j++) {
    const uint32_t code = (j < 4 ? low : high) >> (8 * (j % 4)) & (wide ? 255u : 15u);
    values[j] = fmaf(scale, static_cast<float>(static_cast<int32_t>(code) - zero), minimum);
  }
}

}  // namespace mustafar::cuda
