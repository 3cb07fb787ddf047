// The check of compressed blocks from outside: 4 bytes choose a layout, the rest patches a valid
// page, as (offset, byte) in 3 bytes each. What passes the check is unpacked from a buffer of
// exactly a page.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "format/check_slot.h"
#include "format/pack.h"
#include "fuzz_input.h"
#include "mustafar/error.h"

using namespace mustafar;

namespace {

constexpr int32_t kDims[] = {2, 8, 16, 48, 64, 80, 128, 256};
constexpr DType kTypes[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kInt8, DType::kInt4};
constexpr double kSparsities[] = {0.0, 0.3, 0.5, 0.75, 0.97};

// A page of some rows, its masks as the layout wants them.
void fill(const SlotLayout& s, uint8_t* slot) {
  std::vector<float> rows(size_t{kBlockTokens} * s.head_dim);
  for (size_t i = 0; i < rows.size(); i++) rows[i] = std::sin(static_cast<float>(i));
  std::vector<uint32_t> masks(size_t{kBlockTokens} * s.mask_words);
  for (int32_t row = 0; row < kBlockTokens && !s.dense; row++) {
    const int32_t group = s.ragged ? s.head_dim : s.group;
    const int32_t keep = s.ragged ? s.head_dim * s.keep / kBlockTokens : s.keep;
    for (int32_t dim = 0; dim < s.head_dim; dim++) {
      if ((dim + row) % group < keep) masks[row * s.mask_words + dim / 32] |= 1u << dim % 32;
    }
  }
  pack_block(s, rows.data(), s.dense ? nullptr : masks.data(), slot);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 4) return 0;
  const int32_t dim = kDims[data[0] % std::size(kDims)];
  const DType type = kTypes[data[1] % std::size(kTypes)];
  const bool group = data[3] & 1, ragged = data[3] & 2;
  const auto layout_of = [&](bool key, uint8_t sparsity) {
    return make_slot_layout(dim, key, kSparsities[sparsity % std::size(kSparsities)], group, type,
                            ragged);
  };
  const StoreLayout layout =
      make_store_layout(1, 1, layout_of(true, data[2]), layout_of(false, data[2] / 5));
  const auto page = std::make_unique<uint8_t[]>(layout.page_bytes);  // watched at both ends
  fill(layout.k, page.get() + k_slot_offset(layout, 0, 0));
  fill(layout.v, page.get() + v_slot_offset(layout, 0, 0));
  try {
    check_page(layout, page.get(), "a packed page");
  } catch (const StateError& error) {
    std::fprintf(stderr, "a packed page is refused: %s\n", error.what());
    std::abort();
  }
  for (size_t at = 4; at + 3 <= size; at += 3) {
    page[(data[at] | data[at + 1] << 8) % layout.page_bytes] = data[at + 2];
  }
  fuzz::expect_only<StateError>([&] {
    check_page(layout, page.get(), "page");
    std::vector<float> rows(size_t{kBlockTokens} * dim);
    for (const bool key : {true, false}) {
      const SlotLayout& s = key ? layout.k : layout.v;
      // A slot's own bytes, so that reading past them is seen.
      const std::vector<uint8_t> slot(
          page.get() + (key ? 0 : v_slot_offset(layout, 0, 0)),
          page.get() + (key ? 0 : v_slot_offset(layout, 0, 0)) + s.slot_bytes);
      unpack_slot(s, slot.data(), rows.data());
    }
  });
  return 0;
}
