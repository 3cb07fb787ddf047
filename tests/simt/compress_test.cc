// The compress kernels against format/pack.h and format/prune.h, byte for byte.
#include "cuda/compress.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "attention_fixture.h"
#include "device_memory.h"
#include "format/coded.h"
#include "format/pack.h"
#include "format/prune.h"
#include "mustafar/kv_config.h"
#include "support/kv_test_util.h"

namespace mustafar::cuda {
namespace {

using testing::random_normal;

struct Case {
  int32_t head_dim;
  DType tail, values;
  double sparsity;
  bool group_pattern;
  bool many = false;  // several blocks at once, and more left than fills their place
  double k_bits = 3.0, v_bits = 2.5;  // coded
};

// Two sequences of different lengths, two layers and KV heads, tokens in both dense and fresh.
constexpr int32_t kHeads = 1;

class Fixture {
 public:
  explicit Fixture(const Case& c, uint32_t seed) : case_(c), random_(seed) {
    const auto slot = [&](bool is_key) {
      if (c.values == DType::kCoded) {
        return make_coded_layout(c.head_dim, is_key ? c.k_bits : c.v_bits);
      }
      return make_slot_layout(c.head_dim, is_key, c.sparsity, c.group_pattern, c.values);
    };
    layout_ = make_store_layout(2, kHeads, slot(true), slot(false));
    row_bytes_ = dtype_bytes(c.tail, c.head_dim);
    if (c.values == DType::kCoded) {
      codes_ = std::make_unique<testing::RandomCodes>(layout_, seed);
      device_codes_.emplace(codes_->tables, 2 * kHeads * c.head_dim);
    }
    for (int s = 0; s < 2; s++) {
      Sequence& q = sequences_[s];
      q.dense_tokens = s == 1 ? 5 : c.many ? 300 : 100;
      q.fresh_tokens = s == 0 ? 0 : c.many ? 260 : 90;
      q.n_new_blocks = s == 1 && c.many ? 3 : 1;
      q.capacity = c.many ? 320 : 160;
      q.n_sinks = s == 0 ? 3 : 0;
      q.dense = fill(2 * 2 * kHeads * q.capacity);
      q.fresh = fill(2 * kHeads * (q.fresh_tokens + 1));
      q.pages = std::make_unique<DeviceMemory>(layout_.page_bytes * q.n_new_blocks, "the pages");
      std::vector<uint8_t*> addresses;
      for (int b = 0; b < q.n_new_blocks; b++) {
        addresses.push_back(q.pages->device() + b * layout_.page_bytes);
      }
      q.addresses = std::make_unique<DeviceArray<uint8_t*>>(addresses);
    }
  }

  // Compresses unless only_move, then moves.
  void run(int32_t first_layer, int32_t n_layers, bool in_place = true, bool only_move = false) {
    std::vector<CommitView> steps(2);
    for (int s = 0; s < 2; s++) {
      Sequence& q = sequences_[s];
      CommitView& step = steps[s];
      step.sequence.dense = q.dense->device();
      step.sequence.fresh = q.fresh->device();
      q.dense->upload();  // with what set() changed
      q.fresh->upload();
      step.sequence.dense_capacity = q.capacity;
      step.sequence.fresh_capacity = q.fresh_tokens + 1;
      step.sequence.n_sinks = q.n_sinks;
      if (device_codes_) step.sequence.codes = device_codes_->tables();
      step.new_pages = q.addresses->device();
      step.dense_tokens = q.dense_tokens;
      step.fresh_tokens = q.fresh_tokens;
      step.n_new_blocks = q.n_new_blocks;
      step.end_pos = 1000;
      if (!in_place) q.out = std::make_unique<DeviceMemory>(q.dense->bytes(), "dense_out");
      step.dense_out = in_place ? q.dense->device() : q.out->device();
    }
    const DeviceArray<CommitView> steps_copy(steps, "the steps");
    DeviceArray<int32_t> bad(std::vector<int32_t>{bad_row}, "bad_row");
    CompressArgs args;
    args.steps = steps_copy.device();
    args.n_steps = 2;
    args.max_new_blocks = case_.many ? 3 : 1;
    args.layout = layout_;
    args.first_layer = first_layer;
    args.n_layers = n_layers;
    args.tail_dtype = case_.tail;
    args.bad_row = bad.device();
    if (!only_move) compress(args, nullptr);
    move_rest(args, nullptr);
    bad.download();
    bad_row = *bad.host();
    for (Sequence& q : sequences_) {
      q.pages->download();
      q.dense->download();
      if (!in_place) q.out->download();
    }
  }

  // Row `index` of the run dense ++ fresh, as it was at first.
  const uint8_t* row(int s, int32_t layer, int kind, int32_t head, int32_t index) const {
    const Sequence& q = sequences_[s];
    if (index < q.dense_tokens) {
      return q.dense->host() +
             (((layer * 2 + kind) * kHeads + head) * q.capacity + index) * row_bytes_;
    }
    return q.fresh->host() +
           ((kind * kHeads + head) * (q.fresh_tokens + 1) + index - q.dense_tokens) * row_bytes_;
  }

  std::vector<uint8_t> expected_slot(int s, int32_t layer, int kind, int32_t head,
                                     int32_t block) const {
    const SlotLayout& slot = kind == 0 ? layout_.k : layout_.v;
    std::vector<float> rows(64 * case_.head_dim);
    std::vector<uint32_t> masks(64 * ((case_.head_dim + 31) / 32));
    for (int t = 0; t < 64; t++) {
      const uint8_t* from =
          row(s, layer, kind, head, sequences_[s].n_sinks + block * kBlockTokens + t);
      for (int d = 0; d < case_.head_dim; d++) {
        rows[t * case_.head_dim + d] = load_float(from, case_.tail, d);
      }
      if (!slot.dense) {
        select_row(slot, &rows[t * case_.head_dim], nullptr, &masks[t * slot.mask_words]);
      }
    }
    std::vector<uint8_t> out(slot.slot_bytes);
    if (codes_ != nullptr) {
      const CodeTable table = code_table(codes_->tables, layout_, layer, head, kind == 0);
      EXPECT_EQ(pack_coded_block(slot, table, rows.data(), out.data()), -1);
      return out;
    }
    pack_block(slot, rows.data(), masks.data(), out.data());
    return out;
  }

  const uint8_t* slot(int s, int32_t layer, int kind, int32_t head, int32_t block) const {
    return sequences_[s].pages->host() + block * layout_.page_bytes +
           (kind == 0 ? k_slot_offset(layout_, layer, head) : v_slot_offset(layout_, layer, head));
  }

  void set(int s, int32_t layer, int kind, int32_t head, int32_t index, int32_t d, float x) {
    store_float(const_cast<uint8_t*>(row(s, layer, kind, head, index)), case_.tail, d, x);
  }

  struct Sequence {
    int32_t dense_tokens, fresh_tokens, n_new_blocks, capacity, n_sinks;
    std::unique_ptr<DeviceMemory> dense, fresh, pages, out;
    std::unique_ptr<DeviceArray<uint8_t*>> addresses;  // of the pages
  };
  Sequence sequences_[2];
  StoreLayout layout_;
  int64_t row_bytes_;
  int32_t bad_row = kAllFinite;

 private:
  std::unique_ptr<DeviceMemory> fill(int64_t rows) {
    auto memory = std::make_unique<DeviceMemory>(rows * row_bytes_, "rows");
    for (int64_t i = 0; i < rows * case_.head_dim; i++) {
      // Ties and zeros are common.
      const float x = random_normal(random_);
      const float value = random_() % 4 == 0 ? std::round(x) : x;
      store_float(memory->host(), case_.tail, i, value);
    }
    return memory;
  }

  Case case_;
  std::mt19937 random_;
  std::unique_ptr<testing::RandomCodes> codes_;
  std::optional<DeviceCodes> device_codes_;
};

class CompressTest : public ::testing::TestWithParam<Case> {};

TEST_P(CompressTest, EqualsTheCpuPackerByteForByte) {
  const uint32_t seed = static_cast<uint32_t>(GetParam().head_dim);
  {
    Fixture f(GetParam(), seed);
    if (is_float(GetParam().values)) {  // NaN ranks above Inf, all of them alike
      f.set(0, 1, 0, 0, 3 + 7, 1, NAN);
      f.set(0, 1, 0, 0, 3 + 7, 0, -INFINITY);
      f.set(0, 1, 0, 0, 3 + 7, 3, INFINITY);
      f.set(0, 1, 1, kHeads - 1, 3 + 8, 5, -NAN);
    }
    std::vector<std::vector<uint8_t>> expected;
    const auto each = [&](auto visit) {
      for (int s = 0; s < 2; s++) {
        for (int b = 0; b < f.sequences_[s].n_new_blocks; b++) {
          for (int kind = 0; kind < 2; kind++) {
            for (int head = 0; head < kHeads; head++) visit(s, kind, head, b);
          }
        }
      }
    };
    each([&](int s, int kind, int head, int b) {
      expected.push_back(f.expected_slot(s, 1, kind, head, b));
    });
    set_schedule(seed);
    f.run(1, 1, /*in_place=*/false);
    size_t i = 0;
    each([&](int s, int kind, int head, int b) {
      EXPECT_EQ(std::memcmp(f.slot(s, 1, kind, head, b), expected[i].data(), expected[i].size()), 0)
          << "sequence " << s << " kind " << kind << " head " << head << " block " << b;
      i++;
    });
    EXPECT_EQ(f.bad_row, kAllFinite);
    EXPECT_EQ(f.slot(0, 0, 0, 0, 0)[0], 0xff) << "a layer outside the range was written";
  }
}

TEST_P(CompressTest, MovesTheRest) {
  for (const bool in_place : {true, false}) {
    Fixture f(GetParam(), 9);
    std::vector<std::vector<uint8_t>> expected;
    const auto each = [&](auto visit) {
      for (int s = 0; s < 2; s++) {
        const Fixture::Sequence& q = f.sequences_[s];
        const int stored = q.n_new_blocks * 64;
        for (int i = 0; i < q.dense_tokens + q.fresh_tokens - stored; i++) {
          for (int plane = 0; plane < 2 * kHeads; plane++) {
            visit(s, plane / kHeads, plane % kHeads, i, i < q.n_sinks ? i : i + stored);
          }
        }
      }
    };
    each([&](int s, int kind, int head, int, int from) {
      const uint8_t* row = f.row(s, 0, kind, head, from);
      expected.emplace_back(row, row + f.row_bytes_);
    });
    f.run(0, 1, in_place, /*only_move=*/true);
    size_t n = 0;
    each([&](int s, int kind, int head, int i, int) {
      const Fixture::Sequence& q = f.sequences_[s];
      const uint8_t* base = in_place ? q.dense->host() : q.out->host();
      const uint8_t* row = base + ((kind * kHeads + head) * q.capacity + i) * f.row_bytes_;
      ASSERT_EQ(std::memcmp(row, expected[n].data(), expected[n].size()), 0)
          << "sequence " << s << " kind " << kind << " row " << i << " in place " << in_place;
      n++;
    });
  }
}

std::string name_of_case(const ::testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  return std::string(dtype_name(c.tail)) + "_" + dtype_name(c.values) + "_" +
         std::to_string(c.head_dim) + (c.group_pattern ? "_group_" : "_row_") +
         std::to_string(
             static_cast<int>((c.values == DType::kCoded ? c.k_bits : c.sparsity) * 1000)) +
         (c.many ? "_many" : "");
}

constexpr DType kF32 = DType::kF32, kF16 = DType::kF16, kBF16 = DType::kBF16;
constexpr DType kInt8 = DType::kInt8, kInt4 = DType::kInt4;
INSTANTIATE_TEST_SUITE_P(
    Layouts, CompressTest,
    ::testing::Values(Case{128, kBF16, kBF16, 0.7, true}, Case{128, kF16, kF16, 0.625, true},
                      Case{128, kBF16, kInt8, 0.7, true}, Case{128, kF16, kInt4, 0.5, true},
                      Case{128, kBF16, kBF16, 0.7, false}, Case{64, kF16, kInt8, 0.5, true},
                      Case{64, kBF16, kF16, 0.0, true}, Case{128, kBF16, kInt8, 0.0, true},
                      Case{8, kF32, kF32, 0.5, false}, Case{80, kBF16, kInt4, 0.5, true},
                      Case{96, kF16, kF16, 0.7, false}, Case{256, kBF16, kBF16, 0.7, true},
                      Case{80, kF32, kF32, 0.3, false}, Case{128, kF32, kInt8, 0.7, true}),
    name_of_case);
INSTANTIATE_TEST_SUITE_P(ManyBlocks, CompressTest,
                         ::testing::Values(Case{128, kF16, kF16, 0.625, true, true},
                                           Case{128, kBF16, kInt8, 0.75, true, true},
                                           Case{24, kF32, kInt4, 0.5, true, true}),
                         name_of_case);

constexpr DType kCoded = DType::kCoded;
INSTANTIATE_TEST_SUITE_P(Coded, CompressTest,
                         ::testing::Values(Case{128, kBF16, kCoded, 0, true, false, 3.0, 3.0},
                                           Case{64, kF16, kCoded, 0, true, false, 4.0, 3.0},
                                           Case{64, kBF16, kCoded, 0, true, true, 2.3, 1.0},
                                           Case{80, kF32, kCoded, 0, true, false, 4.3, 7.0},
                                           Case{24, kF32, kCoded, 0, true, true, 1.0, 5.0},
                                           Case{256, kBF16, kCoded, 0, true, false, 7.0, 3.0}),
                         name_of_case);

#if !defined(MUSTAFAR_SIMT)
// Every tail with every kind of values at the head sizes that models have; on the harness those
// above stand for them.
std::vector<Case> every_case() {
  std::vector<Case> cases;
  for (const int32_t head_dim : {64, 80, 128, 256}) {
    for (const DType tail : {kF16, kBF16}) {
      for (const DType values : {tail, kInt8, kInt4}) {
        for (const bool group : {true, false}) {
          for (const double sparsity : {0.0, 0.5, 0.75}) {
            if (sparsity > 0 || group) cases.push_back({head_dim, tail, values, sparsity, group});
          }
        }
      }
      for (const double bits : {1.0, 2.5, 3.0, 4.0, 7.0}) {
        cases.push_back({head_dim, tail, kCoded, 0, true, false, bits, bits});
      }
    }
  }
  return cases;
}
INSTANTIATE_TEST_SUITE_P(Every, CompressTest, ::testing::ValuesIn(every_case()), name_of_case);
#endif

TEST(Compress, NonFiniteRowsAreNamed) {
  Fixture f({64, kBF16, kInt8, 0.5, true}, 1);
  f.set(0, 1, 1, 0, 3 + 20, 9, INFINITY);
  f.set(0, 1, 1, kHeads - 1, 3 + 30, 9, NAN);
  f.run(0, 2);
  // 100 tokens end at position 1000: row 23 is position 923.
  EXPECT_EQ(f.bad_row, (1 * 2 + 1) * kBadRowPositions + 923);
}

TEST(Compress, CodedRowsThatHaveNoScaleAreNamed) {
  Fixture f({64, kBF16, kCoded, 0, true}, 1);
  f.set(0, 1, 0, 0, 3 + 30, 9, NAN);
  f.set(0, 1, 0, 0, 3 + 20, 63, 3e38f);  // finite, its square is not
  f.set(0, 1, 1, 0, 3 + 10, 9, INFINITY);
  f.run(0, 2);
  EXPECT_EQ(f.bad_row, 1 * 2 * kBadRowPositions + 923);
}

// Rows of zeros, tiny ones, and ones with outliers: the scales differ by many powers of two.
TEST(Compress, CodedRowsOfEverySize) {
  Fixture f({128, kF32, kCoded, 0, true, false, 3.0, 4.0}, 2);
  for (int kind = 0; kind < 2; kind++) {
    for (int d = 0; d < 128; d++) {
      f.set(0, 0, kind, 0, 3 + 5, d, 0.0f);
      f.set(0, 0, kind, 0, 3 + 6, d, 1e-30f * static_cast<float>(d - 40));
      f.set(0, 0, kind, 0, 3 + 7, d, 1e-36f * static_cast<float>(d - 40));
      f.set(0, 0, kind, 0, 3 + 8, d, 1e12f * static_cast<float>(d - 70));
    }
    f.set(0, 0, kind, 0, 3 + 9, 77, -500.0f);
  }
  std::vector<std::vector<uint8_t>> expected;
  for (int kind = 0; kind < 2; kind++) expected.push_back(f.expected_slot(0, 0, kind, 0, 0));
  f.run(0, 1, /*in_place=*/false);
  for (int kind = 0; kind < 2; kind++) {
    EXPECT_EQ(std::memcmp(f.slot(0, 0, kind, 0, 0), expected[kind].data(), expected[kind].size()),
              0)
        << "kind " << kind;
  }
  EXPECT_EQ(f.bad_row, kAllFinite);
}

}  // namespace
}  // namespace mustafar::cuda
