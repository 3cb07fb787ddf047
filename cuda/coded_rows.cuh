// Coded rows (format/coded.h) on the device: a head's table as kernels want it, and a value of a
// row in f32.
#pragma once

#include "cuda/device_ops.cuh"
#include "format/coded.h"

namespace mustafar::cuda {

// One dim of a coded row.
struct alignas(8) CodeDim {
  float step;      // of its codes, to be multiplied by the row's scale; 0 where the width is 0
  uint32_t place;  // first bit of its code in a row, and the width 16 bits further up

  __device__ __forceinline__ uint32_t first_bit() const { return place & 0xffffu; }
  __device__ __forceinline__ uint32_t width() const { return place >> 16; }
};

// Calls put(d, width, first bit of d's code) for every dim of a table, lane d % 32: by a whole
// warp.
template <typename Put>
__device__ __forceinline__ void for_code_dims(const CodeTable& table, int32_t head_dim, Put&& put) {
  const int lane = lane_id();
  uint32_t before = 0;  // bits of the dims before
  for (int32_t first = 0; first < head_dim; first += kWarpSize) {
    const int32_t d = first + lane;
    const uint32_t width = d < head_dim ? table.widths[d] : 0u;
    uint32_t end = width;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const uint32_t other = shuffle(end, lane - step);
      if (lane >= step) end += other;
    }
    if (d < head_dim) put(d, width, before + end - width);
    before += shuffle(end, kWarpSize - 1);
  }
}

// out: [head_dim]; by a whole warp.
__device__ __forceinline__ void load_code_dims(const CodeTable& table, int32_t head_dim,
                                               CodeDim* out) {
  for_code_dims(table, head_dim, [&](int32_t d, uint32_t width, uint32_t first_bit) {
    const float step = multiply_rounded(coded_step(static_cast<int32_t>(width)), table.sigmas[d]);
    out[d] = {step, first_bit | width << 16};
  });
}

// The value of a dim in a row, row: its first word. Reads up to a word past the row's end, which a
// slot has.
__device__ __forceinline__ float coded_value(const CodeDim& dim, const uint32_t* row, float scale) {
  const uint32_t at = dim.first_bit(), width = dim.width();
  const uint32_t* word = row + at / 32;
  const uint32_t code = funnel_right(word[0], word[1], at % 32) & ((1u << width) - 1u);
  // In halves, so that the middle of the levels is whole.
  const int32_t level = static_cast<int32_t>(2 * code + 1) - static_cast<int32_t>(1u << width);
  return 0.5f * static_cast<float>(level) * dim.step * scale;
}

}  // namespace mustafar::cuda
