#include "format/block_format.h"

#include <gtest/gtest.h>

namespace mustafar {
namespace {

struct FirstClass {
  DType dtype;
  double k_sparsity, v_sparsity;
  double k_bytes, v_bytes;  // per row of 128 dims, masks and scales included
};

class FirstClassTest : public ::testing::TestWithParam<FirstClass> {};

TEST_P(FirstClassTest, BytesPerRowAreThoseOfTheFormat) {
  const FirstClass& c = GetParam();
  const SlotLayout k = make_slot_layout(128, true, c.k_sparsity, true, c.dtype);
  const SlotLayout v = make_slot_layout(128, false, c.v_sparsity, true, c.dtype);
  EXPECT_EQ(k.slot_bytes, 64 * c.k_bytes);
  EXPECT_EQ(v.slot_bytes, 64 * c.v_bytes);
}

INSTANTIATE_TEST_SUITE_P(BlockFormat, FirstClassTest,
                         ::testing::Values(FirstClass{DType::kF16, 0, 0, 256, 256},
                                           FirstClass{DType::kBF16, .5, .5, 144, 144},
                                           FirstClass{DType::kBF16, .625, .75, 112, 80},
                                           FirstClass{DType::kInt8, 0, 0, 130, 130},
                                           FirstClass{DType::kInt8, .625, .75, 66, 50},
                                           FirstClass{DType::kInt4, 0, 0, 66, 66},
                                           FirstClass{DType::kInt4, .5, .5, 50, 50}));

TEST(BlockFormatTest, GroupsFollowHeadDim) {
  EXPECT_EQ(default_group(128, true), 32);
  EXPECT_EQ(default_group(256, true), 32);
  EXPECT_EQ(default_group(64, true), 16);
  EXPECT_EQ(default_group(96, true), 16);
  EXPECT_EQ(default_group(80, true), 16);
  EXPECT_EQ(default_group(128, false), 16);
  EXPECT_EQ(default_group(8, true), 8);
  EXPECT_EQ(default_group(72, false), 72);
}

TEST(BlockFormatTest, KeepNeverPrunesMoreThanAsked) {
  for (const int32_t group : {8, 16, 32, 80, 128}) {
    for (int percent = 1; percent < 100; percent++) {
      for (const DType dtype : {DType::kF32, DType::kF16, DType::kInt8, DType::kInt4}) {
        const double sparsity = percent / 100.0;
        const int32_t row = keep_of(group, sparsity, dtype, false);
        EXPECT_GE(row, group * (1 - sparsity) - 1e-6);
        EXPECT_LT(row, std::max(1.0, group * (1 - sparsity)) + 1);
        const int32_t words = keep_of(group, sparsity, dtype, true);
        EXPECT_GE(words, row);
        EXPECT_LE(words, group);
        EXPECT_TRUE(words == group || dtype_bytes(dtype, words) % 4 == 0);
      }
    }
  }
  EXPECT_EQ(keep_of(10, 0.7, DType::kF32, false), 3);  // not 4: 10 * 0.3 is just above 3
}

TEST(BlockFormatTest, FieldsDoNotOverlapAndSlotsAreAligned) {
  for (const int32_t head_dim : {8, 16, 32, 64, 80, 96, 128, 256}) {
    for (const double sparsity : {0.0, 0.3, 0.5, 0.7, 0.99}) {
      for (const DType dtype :
           {DType::kF32, DType::kF16, DType::kBF16, DType::kInt8, DType::kInt4}) {
        for (const bool ragged : {false, true}) {
          const SlotLayout s = make_slot_layout(head_dim, true, sparsity, true, dtype, ragged);
          EXPECT_EQ(s.slot_bytes % kSlotAlignment, 0);
          EXPECT_EQ(s.offsets_offset, 64 * 4 * s.mask_words);
          EXPECT_EQ(s.values_offset, s.offsets_offset + (s.ragged ? 132 : 0));
          EXPECT_EQ(s.scales_offset, s.values_offset + 64 * s.row_bytes);
          EXPECT_GE(s.slot_bytes, s.scales_offset + (has_scales(dtype) ? 128 : 0));
          EXPECT_GE(s.row_bytes, dtype_bytes(dtype, s.row_keep));
          EXPECT_EQ(s.row_bytes % 4, 0);
          if (s.ragged) {
            EXPECT_GE(ragged_capacity(s), head_dim * s.keep);
            EXPECT_GE(ragged_capacity(s), kBlockTokens * s.row_keep);
            EXPECT_LT(ragged_capacity(s), 1 << 16);  // offsets are uint16
          }
        }
      }
    }
  }
}

TEST(BlockFormatTest, SlotsOfAPageTileIt) {
  const StoreLayout layout =
      make_store_layout(3, 2, make_slot_layout(64, true, 0.5, true, DType::kF16),
                        make_slot_layout(64, false, 0.75, true, DType::kInt8));
  int64_t at = 0;
  for (int layer = 0; layer < 3; layer++) {
    for (int head = 0; head < 2; head++) {
      EXPECT_EQ(k_slot_offset(layout, layer, head), at);
      at += layout.k.slot_bytes;
      EXPECT_EQ(v_slot_offset(layout, layer, head), at);
      at += layout.v.slot_bytes;
    }
  }
  EXPECT_EQ(layout.page_bytes, at);
}

TEST(BlockFormatTest, SlotsOfLayersThatDifferTileAPage) {
  LayerSlots layers[3];
  for (int i = 0; i < 3; i++) {
    layers[i] = {make_coded_slot(64, 4 + 8 * i), make_coded_slot(64, 56 - 4 * i)};
  }
  const StoreLayout layout = make_store_layout(layers, 2);
  int64_t at = 0;
  for (int layer = 0; layer < 3; layer++) {
    EXPECT_EQ(slot_of(layout, layer, true).row_bytes, 4 + 8 * layer);
    EXPECT_EQ(slot_of(layout, layer, false).row_bytes, 56 - 4 * layer);
    for (int head = 0; head < 2; head++) {
      EXPECT_EQ(k_slot_offset(layout, layer, head), at);
      at += kBlockTokens * (4 + 8 * layer + 2);
      EXPECT_EQ(v_slot_offset(layout, layer, head), at);
      at += kBlockTokens * (56 - 4 * layer + 2);
    }
  }
  EXPECT_EQ(layout.page_bytes, at);
  EXPECT_EQ(layout.n_layers, 3);
  for (int i = 0; i < 3; i++) layers[i] = {make_coded_layout(64, 3), make_coded_layout(64, 2)};
  const StoreLayout alike = make_store_layout(layers, 2);
  const StoreLayout uniform = make_store_layout(3, 2, layers[0].k, layers[0].v);
  EXPECT_EQ(alike.page_bytes, uniform.page_bytes);
  EXPECT_EQ(v_slot_offset(alike, 2, 1), v_slot_offset(uniform, 2, 1));
}

TEST(BlockFormatTest, StoreHoldsWholeBlocksBetweenSinksAndWindow) {
  EXPECT_EQ(compressed_tokens(95, 0, 32), 0);
  EXPECT_EQ(compressed_tokens(96, 0, 32), 64);
  EXPECT_EQ(compressed_tokens(99, 4, 32), 0);
  EXPECT_EQ(compressed_tokens(100, 4, 32), 64);
  EXPECT_EQ(compressed_tokens(10, 4, 32), 0);
  EXPECT_EQ(compressed_tokens(1024, 0, 0), 1024);
}

}  // namespace
}  // namespace mustafar
