#include "format/check_slot.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "mustafar/error.h"

namespace mustafar {
namespace {

// Kept positions of dims [first, first + n) of one row.
int32_t kept_in(const uint8_t* masks, int32_t first, int32_t n) {
  int32_t count = 0;
  for (int32_t dim = first; dim < first + n;) {
    uint32_t word;
    std::memcpy(&word, masks + dim / 32 * 4, 4);
    const int32_t bit = dim % 32, take = std::min(32 - bit, first + n - dim);
    const uint32_t select = take == 32 ? ~0u : ((1u << take) - 1) << bit;
    count += std::popcount(word & select);
    dim += take;
  }
  return count;
}

// The first row whose mask or offsets don't fit the layout; kBlockTokens where all do.
int32_t first_bad_row(const SlotLayout& s, const uint8_t* slot) {
  if (s.dense) return kBlockTokens;
  const auto offset = [&](int32_t row) {
    uint16_t value;
    std::memcpy(&value, slot + s.offsets_offset + row * 2, 2);
    return int32_t{value};
  };
  if (s.ragged && (offset(0) != 0 || offset(kBlockTokens) > ragged_capacity(s))) return 0;
  for (int32_t row = 0; row < kBlockTokens; row++) {
    const uint8_t* masks = slot + int64_t{row} * s.mask_words * 4;
    if (kept_in(masks, s.head_dim, s.mask_words * 32 - s.head_dim) != 0) return row;
    if (s.ragged) {
      if (offset(row + 1) - offset(row) != kept_in(masks, 0, s.head_dim)) return row;
      continue;
    }
    for (int32_t dim = 0; dim < s.head_dim; dim += s.group) {
      if (kept_in(masks, dim, s.group) != s.keep) return row;
    }
  }
  return kBlockTokens;
}

}  // namespace

void check_page(const StoreLayout& layout, const uint8_t* page, const std::string& where) {
  for (int32_t layer = 0; layer < layout.n_layers; layer++) {
    for (int32_t head = 0; head < layout.n_kv_heads; head++) {
      for (const bool key : {true, false}) {
        const uint8_t* slot =
            page + (key ? k_slot_offset(layout, layer, head) : v_slot_offset(layout, layer, head));
        const int32_t row = first_bad_row(slot_of(layout, layer, key), slot);
        if (row == kBlockTokens) continue;
        throw StateError(where + ": the " + (key ? "key" : "value") + " mask of layer " +
                         std::to_string(layer) + ", KV head " + std::to_string(head) + ", row " +
                         std::to_string(row) + " does not fit the layout");
      }
    }
  }
}

}  // namespace mustafar
