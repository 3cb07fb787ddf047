#include "format/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/dtype.h"

namespace mustafar {
namespace {

int32_t largest_code(DType dtype) { return dtype == DType::kInt8 ? 127 : 7; }

// Value `index` of a run of values.
void put_value(uint8_t* values, DType dtype, int32_t index, float x, float scale) {
  if (is_float(dtype)) {
    store_float(values, dtype, index, x);
    return;
  }
  const int32_t code = quant_code(x, scale, dtype);
  if (dtype == DType::kInt8) {
    values[index] = static_cast<uint8_t>(code);
    return;
  }
  const int32_t shift = index % 2 * 4;
  values[index / 2] =
      static_cast<uint8_t>((values[index / 2] & ~(0xf << shift)) | (code & 0xf) << shift);
}

float get_value(const uint8_t* values, DType dtype, int32_t index, float scale) {
  if (is_float(dtype)) return load_float(values, dtype, index);
  if (dtype == DType::kInt8) return static_cast<float>(static_cast<int8_t>(values[index])) * scale;
  const int32_t nibble = values[index / 2] >> index % 2 * 4 & 0xf;
  return static_cast<float>((nibble ^ 8) - 8) * scale;
}

// Writes the kept values of one row from value `first` of `values` on, and its scale. Returns the
// index after the last, or -1 where the row can't be quantised.
int32_t put_row(const SlotLayout& layout, const float* x, const uint32_t* mask, uint8_t* slot,
                int32_t row, uint8_t* values, int32_t first) {
  const auto kept = [&](int32_t i) { return layout.dense || (mask[i / 32] >> i % 32 & 1) != 0; };
  float scale = 0.0f;
  if (has_scales(layout.dtype)) {
    float absmax = 0.0f;
    for (int32_t i = 0; i < layout.head_dim; i++) {
      if (!std::isfinite(x[i])) return -1;
      if (kept(i)) absmax = std::max(absmax, std::fabs(x[i]));
    }
    const uint16_t bits = quant_scale(absmax, layout.dtype);
    std::memcpy(slot + layout.scales_offset + row * 2, &bits, 2);
    scale = bf16_to_f32(bits);
  }
  for (int32_t i = 0; i < layout.head_dim; i++) {
    if (kept(i)) put_value(values, layout.dtype, first++, x[i], scale);
  }
  return first;
}

uint16_t row_offset(const SlotLayout& layout, const uint8_t* slot, int32_t row) {
  uint16_t offset;
  std::memcpy(&offset, slot + layout.offsets_offset + row * 2, 2);
  return offset;
}

}  // namespace

uint16_t quant_scale(float absmax, DType dtype) {
  const uint32_t bits = bits_of(absmax / static_cast<float>(largest_code(dtype)));
  return static_cast<uint16_t>((bits >> 16) + ((bits & 0xffffu) != 0 ? 1 : 0));
}

int32_t quant_code(float x, float scale, DType dtype) {
  if (scale == 0.0f) return 0;
  const float limit = static_cast<float>(largest_code(dtype));
  return static_cast<int32_t>(std::clamp(std::nearbyint(x / scale), -limit, limit));
}

bool pack_row(const SlotLayout& layout, const float* x, const uint32_t* mask, uint8_t* slot,
              int32_t row) {
  if (!layout.dense) {
    std::memcpy(slot + row * layout.mask_words * 4, mask, sizeof(uint32_t) * layout.mask_words);
  }
  uint8_t* values = slot + layout.values_offset + row * layout.row_bytes;
  std::memset(values, 0, layout.row_bytes);
  return put_row(layout, x, mask, slot, row, values, 0) >= 0;
}

int32_t pack_block(const SlotLayout& layout, const float* rows, const uint32_t* masks,
                   uint8_t* slot) {
  std::memset(slot, 0, layout.slot_bytes);
  if (!layout.ragged) {
    for (int32_t t = 0; t < kBlockTokens; t++) {
      const uint32_t* mask = layout.dense ? nullptr : masks + t * layout.mask_words;
      if (!pack_row(layout, rows + t * layout.head_dim, mask, slot, t)) return t;
    }
    return -1;
  }
  int32_t total = 0;
  for (int32_t w = 0; w < kBlockTokens * layout.mask_words; w++) {
    total += __builtin_popcount(masks[w]);
  }
  if (total > ragged_capacity(layout)) {
    throw std::invalid_argument("masks keep " + std::to_string(total) +
                                " values of a block, its slot holds " +
                                std::to_string(ragged_capacity(layout)));
  }
  std::memcpy(slot, masks, sizeof(uint32_t) * kBlockTokens * layout.mask_words);
  int32_t first = 0;
  for (int32_t t = 0; t <= kBlockTokens; t++) {
    const uint16_t offset = static_cast<uint16_t>(first);
    std::memcpy(slot + layout.offsets_offset + t * 2, &offset, 2);
    if (t == kBlockTokens) break;
    first = put_row(layout, rows + t * layout.head_dim, masks + t * layout.mask_words, slot, t,
                    slot + layout.values_offset, first);
    if (first < 0) return t;
  }
  return -1;
}

void unpack_row(const SlotLayout& layout, const uint8_t* slot, int32_t row, float* out) {
  float scale = 0.0f;
  if (has_scales(layout.dtype)) {
    uint16_t bits;
    std::memcpy(&bits, slot + layout.scales_offset + row * 2, 2);
    scale = bf16_to_f32(bits);
  }
  const uint8_t* values = slot + layout.values_offset;
  if (layout.dense) {
    values += row * layout.row_bytes;
    for (int32_t i = 0; i < layout.head_dim; i++) {
      out[i] = get_value(values, layout.dtype, i, scale);
    }
    return;
  }
  int32_t next = 0;
  if (layout.ragged) {
    next = row_offset(layout, slot, row);
  } else {
    values += row * layout.row_bytes;
  }
  std::fill_n(out, layout.head_dim, 0.0f);
  for (int32_t w = 0; w < layout.mask_words; w++) {
    uint32_t bits;
    std::memcpy(&bits, slot + (row * layout.mask_words + w) * 4, 4);
    for (; bits != 0; bits &= bits - 1) {
      out[w * 32 + __builtin_ctz(bits)] = get_value(values, layout.dtype, next++, scale);
    }
  }
}

void unpack_slot(const SlotLayout& layout, const uint8_t* slot, float* out) {
  for (int32_t t = 0; t < kBlockTokens; t++) {
    unpack_row(layout, slot, t, out + t * layout.head_dim);
  }
}

}  // namespace mustafar
