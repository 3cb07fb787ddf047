// Rows into slots and back: the plain definition of the block format (block_format.h) that every
// faster packer and kernel must agree with.
#pragma once

#include <cstdint>

#include "format/block_format.h"

namespace mustafar {

// Scale of an int8 or int4 row whose largest kept magnitude is absmax: absmax / 127 (or 7) in f32,
// rounded up to bf16 so that no code is clamped by its rounding. Returns the bf16 bits.
uint16_t quant_scale(float absmax, DType dtype);

// clamp(round-half-even(x / scale), +-127 or +-7); 0 where the scale is 0.
int32_t quant_code(float x, float scale, DType dtype);

// Writes row `row` of a slot that is not ragged. x: [head_dim]; mask: [mask_words], ignored when
// dense. Returns false, with the row undefined, where the value type is an integer and x is not
// finite throughout.
bool pack_row(const SlotLayout& layout, const float* x, const uint32_t* mask, uint8_t* slot,
              int32_t row);

// Writes a whole slot, every byte of it. rows: [64][head_dim]; masks: [64][mask_words], null when
// dense. Returns the first row that can't be quantised (then the slot is undefined), or -1. Throws
// std::invalid_argument where masks hold more values than a ragged slot.
int32_t pack_block(const SlotLayout& layout, const float* rows, const uint32_t* masks,
                   uint8_t* slot);

// out: [head_dim], zero where pruned.
void unpack_row(const SlotLayout& layout, const uint8_t* slot, int32_t row, float* out);

// out: [64][head_dim].
void unpack_slot(const SlotLayout& layout, const uint8_t* slot, float* out);

}  // namespace mustafar
