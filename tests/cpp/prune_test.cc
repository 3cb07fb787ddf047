#include "format/prune.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace mustafar {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<int> kept(const SlotLayout& layout, const std::vector<float>& x,
                      const float* weight = nullptr) {
  std::vector<uint32_t> mask(layout.mask_words, 0xffffffffu);
  select_row(layout, x.data(), weight, mask.data());
  std::vector<int> dims;
  for (int i = 0; i < layout.mask_words * 32; i++) {
    if (mask[i / 32] >> (i % 32) & 1) dims.push_back(i);
  }
  return dims;
}

SlotLayout row_layout(int32_t head_dim, int32_t keep) {
  return make_slot_layout(head_dim, true, 1.0 - keep / static_cast<double>(head_dim), false,
                          DType::kF32);
}

TEST(PruneTest, TiesKeepTheLowerIndex) {
  EXPECT_EQ(kept(row_layout(8, 3), {0, 0, 0, 0, 0, 0, 0, 0}), (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(kept(row_layout(8, 3), {1, -2, 2, 1, 1, 0, -1, 0}), (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(kept(row_layout(8, 3), {-0.0f, 0, 0, 1, 0, 0, 0, 0}), (std::vector<int>{0, 1, 3}));
}

TEST(PruneTest, NanRanksAboveInfinity) {
  EXPECT_EQ(kept(row_layout(8, 2), {kInf, 1, kNan, 2, -kInf, 0, -kNan, 0}),
            (std::vector<int>{2, 6}));
  EXPECT_EQ(kept(row_layout(8, 3), {kInf, 1, kNan, 2, -kInf, 0, -kNan, 0}),
            (std::vector<int>{0, 2, 6}));
  std::vector<float> quiet(8, kNan);  // every NaN alike, whatever its payload
  quiet[7] = std::bit_cast<float>(0x7fffffffu);
  EXPECT_EQ(kept(row_layout(8, 2), quiet), (std::vector<int>{0, 1}));
}

TEST(PruneTest, WeightsMultiplyTheMagnitude) {
  const std::vector<float> weight = {1, 1, 1, 10, 1, 1, 0, 1};
  EXPECT_EQ(kept(row_layout(8, 2), {1, 2, 3, 0.5, -4, 0, 100, 0}, weight.data()),
            (std::vector<int>{3, 4}));
}

TEST(PruneTest, EveryGroupKeepsItsOwnLargest) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const int32_t head_dim : {16, 64, 80, 128, 256}) {
    for (const bool is_key : {true, false}) {
      const SlotLayout layout = make_slot_layout(head_dim, is_key, 0.625, true, DType::kF16);
      std::vector<float> x(head_dim);
      for (float& value : x) value = normal(random);
      const std::vector<int> dims = kept(layout, x);
      ASSERT_EQ(static_cast<int32_t>(dims.size()), layout.row_keep);
      for (int32_t g = 0; g < head_dim; g += layout.group) {
        int count = 0;
        float least = kInf, largest_pruned = 0;
        for (int32_t i = g; i < g + layout.group; i++) {
          const bool is_kept = std::find(dims.begin(), dims.end(), i) != dims.end();
          count += is_kept;
          if (is_kept) least = std::min(least, std::fabs(x[i]));
          if (!is_kept) largest_pruned = std::max(largest_pruned, std::fabs(x[i]));
        }
        EXPECT_EQ(count, layout.keep);
        EXPECT_GE(least, largest_pruned);
      }
    }
  }
}

class BlockPolicyTest : public ::testing::Test {
 protected:
  BlockPolicyTest() : layout_(make_slot_layout(32, true, 0.75, true, DType::kF16, true)) {
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    for (float& x : rows_) x = normal(random);
  }
  bool is_kept(int t, int d) const { return masks_[t] >> d & 1; }
  int channel_count(int d) const {
    int n = 0;
    for (int t = 0; t < 64; t++) n += is_kept(t, d);
    return n;
  }

  SlotLayout layout_;
  std::vector<float> rows_ = std::vector<float>(64 * 32);
  std::vector<uint32_t> masks_ = std::vector<uint32_t>(64, 0xffffffffu);
};

TEST_F(BlockPolicyTest, PerChannelKeepsTheLargestTokens) {
  std::vector<float> token_weight(64, 1.0f);
  token_weight[5] = 1000.0f;
  token_weight[6] = 0.0f;
  select_per_channel(layout_, rows_.data(), token_weight.data(), masks_.data());
  for (int d = 0; d < 32; d++) {
    EXPECT_EQ(channel_count(d), 16);
    EXPECT_TRUE(is_kept(5, d));
    EXPECT_FALSE(is_kept(6, d));
  }
}

TEST_F(BlockPolicyTest, InBlockKeepsTheLargestOfAll) {
  std::vector<float> weight(32, 1.0f);
  weight[3] = 1000.0f;
  select_in_block(layout_, rows_.data(), weight.data(), masks_.data());
  int total = 0;
  float least = kInf, largest_pruned = 0;
  for (int t = 0; t < 64; t++) {
    for (int d = 0; d < 32; d++) {
      const float rank = std::fabs(rows_[t * 32 + d]) * weight[d];
      total += is_kept(t, d);
      if (is_kept(t, d)) least = std::min(least, rank);
      if (!is_kept(t, d)) largest_pruned = std::max(largest_pruned, rank);
    }
  }
  EXPECT_EQ(total, 32 * 16);
  EXPECT_GE(least, largest_pruned);
  EXPECT_EQ(channel_count(3), 64);
}

TEST_F(BlockPolicyTest, StructuredKeepsWholeChannels) {
  std::vector<float> weight(32, 1.0f);
  weight[7] = 50.0f;
  weight[8] = 0.0f;
  select_whole_channels(layout_, rows_.data(), weight.data(), masks_.data());
  int channels = 0;
  for (int d = 0; d < 32; d++) {
    EXPECT_TRUE(channel_count(d) == 0 || channel_count(d) == 64);
    channels += channel_count(d) == 64;
  }
  EXPECT_EQ(channels, 8);
  EXPECT_EQ(channel_count(7), 64);
  EXPECT_EQ(channel_count(8), 0);
}

}  // namespace
}  // namespace mustafar
