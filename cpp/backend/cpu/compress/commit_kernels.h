// What commit.cc asks of an instruction set's file: per-token magnitude pruning and packing of a
// block.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "format/block_format.h"

namespace mustafar {

// The longest rows that the packer below has scratch for.
inline constexpr int32_t kMaxPackedDims = 512;

// Whether the function below packs rows of this tail type into this layout: 16-bit tails stored as
// they are or as integers, ranked without weights in groups of 16 or 32, or dense.
[[maybe_unused]] static inline bool packs_fast(const SlotLayout& layout, DType tail) {
  if (tail == DType::kF32 || layout.ragged || layout.head_dim % 32 != 0 ||
      layout.head_dim > kMaxPackedDims) {
    return false;
  }
  if (layout.dtype == DType::kCoded) return false;
  if (layout.dtype != tail && !has_scales(layout.dtype)) return false;
  return layout.dense || layout.group == 16 || layout.group == 32;
}

// Writes a whole slot, byte for byte as pack_block does. rows: [64] addresses of head_dim values of
// the tail type. Returns the first row that can't be quantised, or -1.
int32_t pack_rows_avx512(const SlotLayout& layout, DType tail, const uint8_t* const* rows,
                         uint8_t* slot);

}  // namespace mustafar
