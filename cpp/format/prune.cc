#include "format/prune.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "core/dtype.h"

namespace mustafar {
namespace {

// Larger is kept first. The bits of a non-negative float order as the float does, NaN above Inf.
uint32_t magnitude_bits(float x) { return std::min(bits_of(x) & 0x7fffffffu, 0x7f800001u); }

uint64_t rank_key(float x, float weight, uint32_t index) {
  // A NaN stays one under any weight; Inf * 0 is one of arithmetic, not of the row: it ranks last.
  float ranked = x * weight;
  if (std::isnan(ranked) && !std::isnan(x)) ranked = 0.0f;
  return uint64_t{magnitude_bits(ranked)} << 32 | (0xffffffffu - index);
}

uint32_t index_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// Calls set(index) for the `keep` largest keys.
template <typename Set>
void keep_largest(std::vector<uint64_t>& keys, int64_t keep, Set&& set) {
  if (keep < static_cast<int64_t>(keys.size())) {
    std::nth_element(keys.begin(), keys.begin() + keep, keys.end(), std::greater<>());
  }
  const int64_t n = std::min(keep, static_cast<int64_t>(keys.size()));
  for (int64_t i = 0; i < n; i++) set(index_of(keys[i]));
}

void set_bit(uint32_t* mask, uint32_t i) { mask[i / 32] |= uint32_t{1} << (i % 32); }

}  // namespace

void select_row(const SlotLayout& layout, const float* x, const float* weight, uint32_t* mask) {
  std::memset(mask, 0, sizeof(uint32_t) * layout.mask_words);
  thread_local std::vector<uint64_t> keys;
  for (int32_t g = 0; g < layout.head_dim; g += layout.group) {
    keys.clear();
    for (int32_t i = g; i < g + layout.group; i++) {
      keys.push_back(rank_key(x[i], weight != nullptr ? weight[i] : 1.0f, i));
    }
    keep_largest(keys, layout.keep, [&](uint32_t i) { set_bit(mask, i); });
  }
}

void select_per_channel(const SlotLayout& layout, const float* rows, const float* token_weight,
                        uint32_t* masks) {
  std::memset(masks, 0, sizeof(uint32_t) * kBlockTokens * layout.mask_words);
  std::vector<uint64_t> keys;
  for (int32_t d = 0; d < layout.head_dim; d++) {
    keys.clear();
    for (int32_t t = 0; t < kBlockTokens; t++) {
      const float weight = token_weight != nullptr ? token_weight[t] : 1.0f;
      keys.push_back(rank_key(rows[t * layout.head_dim + d], weight, t));
    }
    keep_largest(keys, layout.keep, [&](uint32_t t) { set_bit(masks + t * layout.mask_words, d); });
  }
}

void select_in_block(const SlotLayout& layout, const float* rows, const float* channel_weight,
                     uint32_t* masks) {
  std::memset(masks, 0, sizeof(uint32_t) * kBlockTokens * layout.mask_words);
  const uint32_t dim = layout.head_dim;
  std::vector<uint64_t> keys;
  for (uint32_t i = 0; i < kBlockTokens * dim; i++) {
    keys.push_back(
        rank_key(rows[i], channel_weight != nullptr ? channel_weight[i % dim] : 1.0f, i));
  }
  keep_largest(keys, int64_t{layout.head_dim} * layout.keep,
               [&](uint32_t i) { set_bit(masks + i / dim * layout.mask_words, i % dim); });
}

void select_whole_channels(const SlotLayout& layout, const float* rows, const float* channel_weight,
                           uint32_t* masks) {
  std::memset(masks, 0, sizeof(uint32_t) * kBlockTokens * layout.mask_words);
  std::vector<uint64_t> keys;
  for (int32_t d = 0; d < layout.head_dim; d++) {
    double squares = 0;
    for (int32_t t = 0; t < kBlockTokens; t++) {
      const double x = rows[t * layout.head_dim + d];
      squares += x * x;
    }
    const float weight = channel_weight != nullptr ? channel_weight[d] : 1.0f;
    keys.push_back(rank_key(static_cast<float>(std::sqrt(squares)), weight, d));
  }
  keep_largest(keys, layout.row_keep, [&](uint32_t d) {
    for (int32_t t = 0; t < kBlockTokens; t++) set_bit(masks + t * layout.mask_words, d);
  });
}

}  // namespace mustafar
