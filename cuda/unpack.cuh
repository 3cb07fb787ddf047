// One compressed row of any layout to f32, by a warp: the plain counterpart of expand.cuh.
#pragma once

#include "cuda/coded_rows.cuh"
#include "cuda/device_ops.cuh"
#include "format/block_format.h"

namespace mustafar::cuda {

// Value `index` of a run of stored values.
__device__ __forceinline__ float stored_value(const uint8_t* values, DType dtype, int index,
                                              float scale) {
  if (dtype == DType::kInt8) return static_cast<float>(static_cast<int8_t>(values[index])) * scale;
  if (dtype == DType::kInt4) {
    const int nibble = values[index / 2] >> (index % 2 * 4) & 0xf;
    return static_cast<float>((nibble ^ 8) - 8) * scale;
  }
  return load_element(values, dtype, index);
}

// Scale of a row; 1 for float values.
__device__ __forceinline__ float stored_scale(const SlotLayout& layout, const uint8_t* slot,
                                              int row) {
  return has_scales(layout.dtype)
             ? bf16_float(reinterpret_cast<const uint16_t*>(slot + layout.scales_offset)[row])
             : 1.0f;
}

// put(d, value) for this lane's dims of row `row`; zero where pruned. Integer values and codes
// times scale. codes: [head_dim] of coded slots.
template <typename Put>
__device__ __forceinline__ void unpack_row_to(const SlotLayout& layout, const uint8_t* slot,
                                              const CodeDim* codes, int row, float scale,
                                              Put&& put) {
  const uint8_t* values = slot + layout.values_offset;
  if (layout.dtype == DType::kCoded) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(values + row * layout.row_bytes);
    for (int d = lane_id(); d < layout.head_dim; d += kWarpSize) {
      put(d, coded_value(codes[d], words, scale));
    }
    return;
  }
  int next = 0;
  if (layout.ragged) {
    next = reinterpret_cast<const uint16_t*>(slot + layout.offsets_offset)[row];
  } else {
    values += row * layout.row_bytes;
  }
  const uint32_t* masks = reinterpret_cast<const uint32_t*>(slot) + row * layout.mask_words;
  for (int first = 0; first < layout.head_dim; first += kWarpSize) {
    const int d = first + lane_id();
    if (layout.dense) {
      if (d < layout.head_dim) put(d, stored_value(values, layout.dtype, d, scale));
      continue;
    }
    const uint32_t mask = masks[first / kWarpSize];
    const bool kept = (mask >> lane_id() & 1u) != 0;
    if (d < layout.head_dim) {
      const int index = next + popcount(mask & ((1u << lane_id()) - 1u));
      put(d, kept ? stored_value(values, layout.dtype, index, scale) : 0.0f);
    }
    next += popcount(mask);
  }
}

__device__ __forceinline__ void unpack_row(const SlotLayout& layout, const uint8_t* slot,
                                           const CodeDim* codes, int row, float* out) {
  unpack_row_to(layout, slot, codes, row, stored_scale(layout, slot, row),
                [out](int d, float x) { out[d] = x; });
}

}  // namespace mustafar::cuda
