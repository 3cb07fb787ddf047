#include "format/pack.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/kernels.h"
#include "core/dtype.h"
#include "format/prune.h"

namespace mustafar {
namespace {

using Config = std::tuple<DType, int32_t, bool, double, bool>;  // dtype, D, group, sparsity, ragged

class PackTest : public ::testing::TestWithParam<Config> {};

// What the slot should hold of x, worked out value by value.
float stored(float x, float scale, DType dtype) {
  if (dtype == DType::kF16) return f16_to_f32(f32_to_f16(x));
  if (dtype == DType::kBF16) return bf16_to_f32(f32_to_bf16(x));
  if (dtype == DType::kF32) return x;
  if (scale == 0) return 0;
  const float limit = dtype == DType::kInt8 ? 127 : 7;
  return std::min(limit, std::max(-limit, std::nearbyint(x / scale))) * scale;
}

TEST_P(PackTest, UnpacksToTheRoundedMaskedRows) {
  const auto [dtype, head_dim, group, sparsity, ragged] = GetParam();
  const SlotLayout layout = make_slot_layout(head_dim, true, sparsity, group, dtype, ragged);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> rows(size_t{64} * head_dim);
  for (float& x : rows) x = normal(random);
  for (int d = 0; d < head_dim; d++) rows[5 * head_dim + d] = 0.0f;  // an all-zero row
  rows[7 * head_dim] = 1000.0f;                                      // an outlier
  std::vector<uint32_t> masks(size_t{64} * layout.mask_words);
  if (layout.ragged) {
    select_per_channel(layout, rows.data(), nullptr, masks.data());
  } else if (!layout.dense) {
    for (int t = 0; t < 64; t++) {
      select_row(layout, &rows[t * head_dim], nullptr, &masks[t * layout.mask_words]);
    }
  }
  std::vector<uint8_t> slot(layout.slot_bytes, 0xff);
  ASSERT_EQ(pack_block(layout, rows.data(), masks.data(), slot.data()), -1);

  std::vector<float> all(size_t{64} * head_dim, NAN), row(head_dim, NAN);
  unpack_slot(layout, slot.data(), all.data());
  for (Isa isa : available_isas()) {
    std::vector<float> fast(all.size(), NAN);
    select_kernels(isa).unpack_slot(layout, slot.data(), fast.data());
    EXPECT_EQ(std::memcmp(fast.data(), all.data(), 4 * all.size()), 0) << isa_name(isa);
  }
  for (int t = 0; t < 64; t++) {
    unpack_row(layout, slot.data(), t, row.data());
    EXPECT_EQ(std::memcmp(row.data(), &all[t * head_dim], 4 * head_dim), 0);
    const auto kept = [&](int d) {
      return layout.dense || (masks[t * layout.mask_words + d / 32] >> d % 32 & 1) != 0;
    };
    float absmax = 0;
    for (int d = 0; d < head_dim; d++) {
      if (kept(d)) absmax = std::max(absmax, std::fabs(rows[t * head_dim + d]));
    }
    const float scale = has_scales(dtype) ? bf16_to_f32(quant_scale(absmax, dtype)) : 0.0f;
    for (int d = 0; d < head_dim; d++) {
      ASSERT_EQ(row[d], kept(d) ? stored(rows[t * head_dim + d], scale, dtype) : 0.0f)
          << "row " << t << " dim " << d;
    }
  }

  // Padding is zero, and every bit matters: a flipped mask bit is seen.
  for (int32_t i = layout.scales_offset + (has_scales(dtype) ? 128 : 0); i < layout.slot_bytes;
       i++) {
    ASSERT_EQ(slot[i], 0);
  }
  if (!layout.dense) {
    slot[2 * layout.mask_words * 4] ^= 1;
    unpack_row(layout, slot.data(), 2, row.data());
    EXPECT_NE(std::memcmp(row.data(), &all[2 * head_dim], 4 * head_dim), 0);
  }
}

std::string name_of_config(const ::testing::TestParamInfo<Config>& info) {
  const auto& [dtype, head_dim, group, sparsity, ragged] = info.param;
  return std::string(dtype_name(dtype)) + "_" + std::to_string(head_dim) +
         (group ? "_group" : "_row") + (ragged ? "_ragged_" : "_") +
         std::to_string(static_cast<int>(sparsity * 100));
}

INSTANTIATE_TEST_SUITE_P(EveryLayout, PackTest,
                         ::testing::Combine(::testing::Values(DType::kF32, DType::kF16,
                                                              DType::kBF16, DType::kInt8,
                                                              DType::kInt4),
                                            ::testing::Values(8, 16, 32, 64, 80, 96, 128, 256),
                                            ::testing::Bool(), ::testing::Values(0.0, 0.55, 0.9),
                                            ::testing::Bool()),
                         name_of_config);

TEST(QuantTest, ScaleIsRoundedUp) {
  for (const DType dtype : {DType::kInt8, DType::kInt4}) {
    const float limit = dtype == DType::kInt8 ? 127 : 7;
    EXPECT_EQ(quant_scale(0.0f, dtype), 0);
    EXPECT_EQ(quant_scale(limit, dtype), 0x3f80);  // exactly 1
    std::mt19937 random(4);
    for (int i = 0; i < 1000; i++) {
      const float absmax =
          std::ldexp(static_cast<float>(random()), static_cast<int>(random() % 64) - 64);
      const uint16_t scale = quant_scale(absmax, dtype);
      EXPECT_GE(bf16_to_f32(scale), absmax / limit);
      EXPECT_LT(bf16_to_f32(static_cast<uint16_t>(scale - 1)), absmax / limit);
      EXPECT_LE(std::abs(quant_code(absmax, bf16_to_f32(scale), dtype)), limit);
    }
  }
}

TEST(QuantTest, CodesRoundHalfToEven) {
  EXPECT_EQ(quant_code(0.5f, 1.0f, DType::kInt8), 0);
  EXPECT_EQ(quant_code(1.5f, 1.0f, DType::kInt8), 2);
  EXPECT_EQ(quant_code(-2.5f, 1.0f, DType::kInt8), -2);
  EXPECT_EQ(quant_code(1e9f, 1.0f, DType::kInt8), 127);
  EXPECT_EQ(quant_code(-1e9f, 1.0f, DType::kInt4), -7);
  EXPECT_EQ(quant_code(1.0f, 0.0f, DType::kInt4), 0);
}

TEST(PackErrorsTest, IntegersRefuseWhatIsNotFinite) {
  for (const DType dtype : {DType::kInt8, DType::kInt4, DType::kF16}) {
    for (const float bad : {INFINITY, -INFINITY, NAN}) {
      for (const bool ragged : {false, true}) {
        const SlotLayout layout = make_slot_layout(32, true, 0.5, true, dtype, ragged);
        std::vector<float> rows(64 * 32, 1.0f);
        rows[37 * 32 + 31] = bad;  // not even kept
        std::vector<uint32_t> masks(64, 0xffffu);
        std::vector<uint8_t> slot(layout.slot_bytes);
        EXPECT_EQ(pack_block(layout, rows.data(), masks.data(), slot.data()),
                  dtype == DType::kF16 ? -1 : 37);
      }
    }
  }
}

TEST(PackErrorsTest, RaggedSlotsRefuseMoreThanTheyHold) {
  const SlotLayout layout = make_slot_layout(32, true, 0.5, true, DType::kF16, true);
  const int32_t capacity = ragged_capacity(layout);
  ASSERT_EQ(capacity, 64 * 16);
  std::vector<float> rows(64 * 32, 1.0f);
  std::vector<uint8_t> slot(layout.slot_bytes);
  std::vector<uint32_t> masks(64, 0);
  for (int t = 0; t < 32; t++) masks[t] = 0xffffffffu;  // half the rows whole: exactly full
  EXPECT_EQ(pack_block(layout, rows.data(), masks.data(), slot.data()), -1);
  masks[63] = 1;
  EXPECT_THROW(pack_block(layout, rows.data(), masks.data(), slot.data()), std::invalid_argument);
}

}  // namespace
}  // namespace mustafar
