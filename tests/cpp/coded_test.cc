// Coded rows: the plain packer, what deals the bits, and AVX-512's packer against the plain one.
#include "format/coded.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "backend/cpu/attention/coded_kernels.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/kernels.h"
#include "core/dtype.h"
#include "support/kv_test_util.h"

namespace mustafar {
namespace {

struct Head {
  SlotLayout layout;
  std::vector<float> sigmas;
  std::vector<uint8_t> widths;

  Head(int32_t head_dim, double bits, std::mt19937& random)
      : layout(make_coded_layout(head_dim, bits)), widths(head_dim) {
    for (int32_t d = 0; d < head_dim; d++) {
      sigmas.push_back(std::exp(1.5f * testing::random_normal(random)));
    }
    deal_widths(sigmas.data(), head_dim, layout.row_bytes, widths.data());
  }
  CodeTable table() const { return {widths.data(), sigmas.data()}; }
};

// Rows of a tail type: normal, one of zeros, tiny and huge ones, and outliers.
std::vector<float> rows_of(const Head& head, DType tail, std::mt19937& random) {
  const int32_t n = head.layout.head_dim;
  std::vector<float> rows(size_t{kBlockTokens} * n);
  for (int32_t i = 0; i < kBlockTokens * n; i++) {
    float x = testing::random_normal(random) * head.sigmas[i % n];
    const int32_t t = i / n;
    if (t == 3) x = 0;
    if (t == 4) x *= 1e-5f;
    if (t == 5) x *= 100;
    if (t == 6 && i % n == 2) x *= 300;
    rows[i] = testing::rounded(x, tail);
  }
  return rows;
}

TEST(CodedTest, RowsTakeTheBytesAskedForInWholeWords) {
  EXPECT_EQ(coded_row_bytes(64, 3.0), 24);
  EXPECT_EQ(coded_row_bytes(128, 3.0), 48);
  EXPECT_EQ(coded_row_bytes(64, 3.01), 28);  // never fewer
  EXPECT_EQ(coded_row_bytes(64, 2.5), 20);
  const SlotLayout layout = make_coded_layout(64, 3.0);
  EXPECT_EQ(layout.slot_bytes, 64 * 26);
  EXPECT_EQ(layout.mask_words, 0);
}

TEST(CodedTest, BitsGoWhereTheEnergyIs) {
  std::mt19937 random(1);
  for (const int32_t head_dim : {8, 64, 80, 128}) {
    for (const double bits : {1.0, 2.5, 3.0, 6.0, 7.0}) {
      const Head head(head_dim, bits, random);
      const int32_t total = std::accumulate(head.widths.begin(), head.widths.end(), 0);
      EXPECT_EQ(total, std::min(8 * head.layout.row_bytes, 7 * head_dim));
      for (int32_t a = 0; a < head_dim; a++) {
        EXPECT_LE(head.widths[a], kMaxWidth);
        for (int32_t b = 0; b < head_dim; b++) {
          if (head.sigmas[a] > head.sigmas[b]) {
            EXPECT_GE(head.widths[a], head.widths[b]);
          }
        }
      }
    }
  }
  // Equal energies: the first dims get what is left over.
  const std::vector<float> equal(64, 1.0f);
  std::vector<uint8_t> widths(64);
  deal_widths(equal.data(), 64, 20, widths.data());
  for (int32_t d = 0; d < 64; d++) EXPECT_EQ(widths[d], d < 32 ? 3 : 2);
}

TEST(CodedTest, ValuesComeBackWithinHalfAStep) {
  std::mt19937 random(2);
  for (const int32_t head_dim : {16, 64, 72, 128}) {
    for (const double bits : {2.0, 4.0, 7.0}) {
      const Head head(head_dim, bits, random);
      const std::vector<float> rows = rows_of(head, DType::kF32, random);
      std::vector<uint8_t> slot(head.layout.slot_bytes, 0xff);
      ASSERT_EQ(pack_coded_block(head.layout, head.table(), rows.data(), slot.data()), -1);
      std::vector<float> out(rows.size());
      unpack_coded_slot(head.layout, head.table(), slot.data(), out.data());
      for (int32_t i = 0; i < kBlockTokens * head_dim; i++) {
        const int32_t width = head.widths[i % head_dim];
        uint16_t scale_bits;
        std::memcpy(&scale_bits, slot.data() + head.layout.scales_offset + i / head_dim * 2, 2);
        const float step = coded_step(width) * head.sigmas[i % head_dim] * bf16_to_f32(scale_bits);
        const float outermost = (std::ldexp(1.0f, width) * 0.5f - 0.5f) * step;
        if (width == 0) {
          EXPECT_EQ(out[i], 0.0f);
        } else if (std::fabs(rows[i]) <= outermost) {
          EXPECT_LE(std::fabs(out[i] - rows[i]), 0.5001f * step) << i;
        } else {
          EXPECT_NEAR(out[i], std::copysign(outermost, rows[i]), 1e-5f * outermost) << i;
        }
      }
    }
  }
}

TEST(CodedTest, EveryInstructionSetUnpacksTheSame) {
  std::mt19937 random(5);
  for (const int32_t head_dim : {16, 64, 80, 128, 192}) {
    for (const double bits : {1.0, 3.0, 4.3, 7.0}) {
      const Head head(head_dim, bits, random);
      const std::vector<float> rows = rows_of(head, DType::kF32, random);
      std::vector<uint8_t> slot(head.layout.slot_bytes);
      ASSERT_EQ(pack_coded_block(head.layout, head.table(), rows.data(), slot.data()), -1);
      std::vector<float> plain(rows.size()), fast(rows.size());
      unpack_coded_slot(head.layout, head.table(), slot.data(), plain.data());
      for (const Isa isa : available_isas()) {
        std::memset(fast.data(), 0xff, fast.size() * 4);
        select_kernels(isa).unpack_coded_slot(head.layout, head.table(), slot.data(), fast.data());
        EXPECT_EQ(std::memcmp(plain.data(), fast.data(), plain.size() * 4), 0)
            << isa_name(isa) << " " << head_dim << " " << bits;
      }
    }
  }
}

TEST(CodedTest, RowsThatAreNotFiniteAreRefused) {
  std::mt19937 random(3);
  const Head head(64, 3.0, random);
  std::vector<uint8_t> slot(head.layout.slot_bytes);
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    std::vector<float> rows = rows_of(head, DType::kF32, random);
    rows[9 * 64 + 63] = bad;
    EXPECT_EQ(pack_coded_block(head.layout, head.table(), rows.data(), slot.data()), 9);
  }
}

TEST(CodedTest, Avx512PacksTheSameBytes) {
#if defined(__x86_64__)
  if (detect_isa() < Isa::kAvx512) GTEST_SKIP() << "no AVX-512 here";
  std::mt19937 random(4);
  for (const DType tail : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const int32_t head_dim : {16, 48, 64, 80, 128, 256}) {
      for (const double bits : {1.0, 2.3, 3.0, 4.0, 7.0}) {
        const Head head(head_dim, bits, random);
        std::vector<float> rows = rows_of(head, tail, random);
        std::vector<uint8_t> stored(rows.size() * 4);
        const uint8_t* addresses[kBlockTokens];
        const auto store = [&] {
          for (size_t i = 0; i < rows.size(); i++) store_float(stored.data(), tail, i, rows[i]);
        };
        store();
        for (int32_t t = 0; t < kBlockTokens; t++) {
          addresses[t] = stored.data() + dtype_bytes(tail, int64_t{t} * head_dim);
        }
        std::vector<float> memory(5 * head_dim);
        const CodeRow row = make_code_row(head.table(), head_dim, memory.data());
        std::vector<uint8_t> plain(head.layout.slot_bytes, 1), fast(head.layout.slot_bytes, 2);
        ASSERT_EQ(pack_coded_block(head.layout, head.table(), rows.data(), plain.data()), -1);
        ASSERT_EQ(pack_coded_rows_avx512(head.layout, head.widths.data(), row, tail, addresses,
                                         fast.data()),
                  -1);
        EXPECT_EQ(plain, fast) << dtype_name(tail) << " " << head_dim << " " << bits;
        rows[7 * head_dim + 1] = NAN;
        store();
        EXPECT_EQ(pack_coded_rows_avx512(head.layout, head.widths.data(), row, tail, addresses,
                                         fast.data()),
                  7);
      }
    }
  }
#else
  GTEST_SKIP() << "no AVX-512 here";
#endif
}

}  // namespace
}  // namespace mustafar
