// Compressed slots to f32 rows, for attention of many queries over the store.
#pragma once

#include <cstdint>

#include "format/block_format.h"

namespace mustafar {

// As unpack_slot (format/pack.h), bit for bit. Reads no byte beyond the slot.
void unpack_slot_avx512(const SlotLayout& layout, const uint8_t* slot, float* out);

}  // namespace mustafar
