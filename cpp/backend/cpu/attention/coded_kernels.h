// Packing and unpacking of coded rows (format/coded.h) by the files of instruction sets.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "format/coded.h"

namespace mustafar {

// The longest rows that the functions below have scratch for.
inline constexpr int32_t kMaxCodedDims = 512;

[[maybe_unused]] static inline bool packs_coded_fast(const SlotLayout& layout) {
  return layout.head_dim % 16 == 0 && layout.head_dim <= kMaxCodedDims;
}

// Writes a whole slot, byte for byte as pack_coded_block does, where packs_coded_fast says so.
// rows: [64] addresses of head_dim values of the tail type; widths: [head_dim]. Returns the first
// row that can't be coded, or -1.
int32_t pack_coded_rows_avx512(const SlotLayout& layout, const uint8_t* widths, const CodeRow& row,
                               DType tail, const uint8_t* const* rows, uint8_t* slot);

// As unpack_coded_slot, bit for bit. Reads no byte beyond the slot.
void unpack_coded_slot_avx512(const SlotLayout& layout, const CodeTable& table, const uint8_t* slot,
                              float* out);

}  // namespace mustafar
