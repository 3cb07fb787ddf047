// The decode kernels against attention in double precision over the dequantised masked values.
#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <vector>

#include "attention_fixture.h"

namespace mustafar::cuda {
namespace {

using testing::CacheShape;
using testing::nmse;
using testing::RandomCache;

struct Setting {
  const char* name;
  double k_sparsity, v_sparsity;
  bool group_pattern;
};

struct Types {
  DType tail, values;
};

constexpr Setting kFirstClass{"first", 0.625, 0.75, true};
constexpr Setting kHalf{"half", 0.5, 0.5, true};
constexpr Setting kDense{"dense", 0.0, 0.0, true};
constexpr Setting kMixed{"mixed", 0.0, 0.3, true};
constexpr Setting kRow{"row", 0.7, 0.7, false};
constexpr Setting kSparse{"sparse", 0.75, 0.75, true};

CacheShape shape_of(const Types& types, int32_t head_dim, int32_t n_queries, const Setting& s) {
  CacheShape shape;
  shape.n_queries = n_queries;
  shape.head_dim = head_dim;
  shape.tail = types.tail;
  shape.values = types.values;
  shape.k_sparsity = s.k_sparsity;
  shape.v_sparsity = s.v_sparsity;
  shape.group_pattern = s.group_pattern;
  return shape;
}

// A ragged batch: lengths around the edges of tiles and splits. Every row within its bound, and the
// bound refuses a dropped token.
void check_batch(const CacheShape& shape, bool fast) {
  RandomCache a(shape, 5, 17, 1), b(shape, 0, 0, 2), c(shape, 1, 63, 3), d(shape, 3, 64, 4);
  const std::vector<RandomCache*> caches = {&a, &b, &c, &d};
  const int64_t row = int64_t{shape.n_kv_heads} * shape.n_queries * shape.head_dim;
  const std::vector<float> q = random_queries(row * 4, 7);
  set_schedule(3);
  const std::vector<float> out = decode_attend(caches, 0, q, fast);
  const double bound = std::max(testing::nmse_bound(shape.tail, shape.values),
                                shape.tail == DType::kF32 ? 1e-10 : 0.0);
  for (size_t i = 0; i < caches.size(); i++) {
    EXPECT_LE(nmse(caches[i]->attend(0, q.data() + i * row), out.data() + i * row), bound)
        << "sequence " << i;
  }
  for (const int32_t dropped : {0, 100, a.kv_len() - 1}) {
    EXPECT_GT(nmse(a.attend(0, q.data(), dropped), out.data()), bound) << "token " << dropped;
  }
}

using Case = std::tuple<Types, Setting, int32_t>;  // head_dim
class FastDecodeTest : public ::testing::TestWithParam<Case> {};

TEST_P(FastDecodeTest, EqualsDenseAttentionOverTheDequantisedRows) {
  const auto& [types, setting, head_dim] = GetParam();
  check_batch(shape_of(types, head_dim, 4, setting), true);
}

std::string name_of_case(const ::testing::TestParamInfo<Case>& info) {
  const auto& [types, setting, head_dim] = info.param;
  return std::string(dtype_name(types.tail)) + "_" + dtype_name(types.values) + "_" + setting.name +
         "_" + std::to_string(head_dim);
}

constexpr DType kF32 = DType::kF32, kF16 = DType::kF16, kBF16 = DType::kBF16;
constexpr DType kInt8 = DType::kInt8, kInt4 = DType::kInt4;
INSTANTIATE_TEST_SUITE_P(
    HeadDim128, FastDecodeTest,
    ::testing::Combine(::testing::Values(Types{kF16, kF16}, Types{kBF16, kBF16},
                                         Types{kBF16, kInt8}, Types{kF16, kInt4}),
                       ::testing::Values(kFirstClass, kHalf, kDense, kMixed, kRow),
                       ::testing::Values(128)),
    name_of_case);
INSTANTIATE_TEST_SUITE_P(HeadDim64, FastDecodeTest,
                         ::testing::Combine(::testing::Values(Types{kF16, kF16},
                                                              Types{kBF16, kInt8},
                                                              Types{kBF16, kInt4}),
                                            ::testing::Values(kHalf, kDense, kRow),
                                            ::testing::Values(64)),
                         name_of_case);
INSTANTIATE_TEST_SUITE_P(OtherTails, FastDecodeTest,
                         ::testing::Combine(::testing::Values(Types{kF16, kInt8},
                                                              Types{kBF16, kInt4}),
                                            ::testing::Values(kFirstClass), ::testing::Values(128)),
                         name_of_case);

// Every kernel there is: tail, values, setting, head_dim and query heads (one set of up to 4, two
// sets, two blocks). The harness takes every eleventh, in CI beside those above; a device all.
using Variant = std::tuple<Types, Setting, int32_t, int32_t>;  // head_dim, queries
class EveryDecodeTest : public ::testing::TestWithParam<Variant> {};

TEST_P(EveryDecodeTest, EqualsDenseAttentionOverTheDequantisedRows) {
  const auto& [types, setting, head_dim, n_queries] = GetParam();
  check_batch(shape_of(types, head_dim, n_queries, setting), true);
}

std::vector<Variant> every_variant() {
  std::vector<Variant> variants;
  int n = 0;
  for (const Types types : {Types{kF16, kF16}, Types{kBF16, kBF16}, Types{kF16, kInt8},
                            Types{kBF16, kInt8}, Types{kF16, kInt4}, Types{kBF16, kInt4}}) {
    for (const Setting& setting : {kFirstClass, kHalf, kDense, kMixed, kRow, kSparse}) {
      for (const int32_t head_dim : {64, 128}) {
        for (const int32_t n_queries : {4, 8, 12}) {
          if (!kOnDevice && n_queries == 12) continue;
          if (kOnDevice || n++ % 11 == 3) variants.push_back({types, setting, head_dim, n_queries});
        }
      }
    }
  }
  return variants;
}

std::string name_of_variant(const ::testing::TestParamInfo<Variant>& info) {
  const auto& [types, setting, head_dim, n_queries] = info.param;
  return std::string(dtype_name(types.tail)) + "_" + dtype_name(types.values) + "_" + setting.name +
         "_" + std::to_string(head_dim) + "x" + std::to_string(n_queries);
}

INSTANTIATE_TEST_SUITE_P(Variants, EveryDecodeTest, ::testing::ValuesIn(every_variant()),
                         name_of_variant);

// Coded rows of the bits that have a kernel: head_dim, bits, query heads.
using CodedCase = std::tuple<DType, int32_t, double, int32_t>;
class CodedDecodeTest : public ::testing::TestWithParam<CodedCase> {};

TEST_P(CodedDecodeTest, EqualsDenseAttentionOverTheDequantisedRows) {
  const auto& [tail, head_dim, bits, n_queries] = GetParam();
  CacheShape shape = shape_of({tail, DType::kCoded}, head_dim, n_queries, kDense);
  shape.k_bits = shape.v_bits = bits;
  check_batch(shape, true);
}

std::string name_of_coded(const ::testing::TestParamInfo<CodedCase>& info) {
  const auto& [tail, head_dim, bits, n_queries] = info.param;
  return std::string(dtype_name(tail)) + "_" + std::to_string(head_dim) + "_" +
         std::to_string(static_cast<int>(10 * bits)) + "_x" + std::to_string(n_queries);
}

INSTANTIATE_TEST_SUITE_P(Variants, CodedDecodeTest,
                         ::testing::Combine(::testing::Values(kF16, kBF16),
                                            ::testing::Values(64, 128), ::testing::Values(3.0, 4.0),
                                            ::testing::Values(1, 4, 9)),
                         name_of_coded);
INSTANTIATE_TEST_SUITE_P(Narrow, CodedDecodeTest,
                         ::testing::Values(CodedCase{kF16, 64, 2.0, 4},
                                           CodedCase{kBF16, 128, 2.0, 4},
                                           CodedCase{kF16, 64, 2.0, 8},
                                           CodedCase{kF16, 128, 2.5, 5}),
                         name_of_coded);

// ---- windows ----

// Decode over caches in which windows of several lengths begin everywhere: inside a block and at
// its edge, at the dense buffer's first row, behind the sinks or among them, before all there is.
// Blocks and dense rows that no query sees are NaN. Beside what double precision gives, a result
// must be what the sequence has alone.
void check_windows(const CacheShape& shape, bool fast) {
  struct Cached {
    int32_t n_blocks, dense_tokens, n_sinks, dropped_blocks;
  };
  const std::vector<Cached> all = {{5, 17, 4, 3}, {2, 70, 0, 0}, {0, 40, 9, 0}, {6, 5, 5, 0}};
  const int64_t row = int64_t{shape.n_kv_heads} * shape.n_queries * shape.head_dim;
  const std::vector<float> q = random_queries(row * std::ssize(all), 7);
  const double bound = std::max(testing::nmse_bound(shape.tail, shape.values),
                                shape.tail == DType::kF32 ? 1e-10 : 0.0);
  // Of the first sequence 14 dense tokens are seen without sinks: 78 are a block more.
  for (const int32_t window : {1, 14, 20, 78, 100, 206, 430, 5000}) {
    SCOPED_TRACE("window " + std::to_string(window));
    std::vector<std::unique_ptr<RandomCache>> owned;
    std::vector<RandomCache*> caches;
    for (const Cached& c : all) {
      owned.push_back(std::make_unique<RandomCache>(shape, c.n_blocks, c.dense_tokens,
                                                    static_cast<uint32_t>(owned.size())));
      RandomCache& cache = *owned.back();
      cache.place(c.n_sinks, c.dropped_blocks);
      const SeenTokens seen = seen_tokens(cache.step(), window);
      for (int32_t b = 0; b < seen.first_block; b++) {
        std::memset(cache.page(b), 0xff, cache.layout().page_bytes);
      }
      const int64_t row_bytes = dtype_bytes(shape.tail, shape.head_dim);
      for (int32_t plane = 0; plane < shape.n_layers * 2 * shape.n_kv_heads; plane++) {
        std::memset(cache.step().dense + plane * cache.step().dense_capacity * row_bytes, 0xff,
                    seen.first_row * row_bytes);
      }
      caches.push_back(&cache);
    }
    set_schedule(static_cast<uint32_t>(window));
    const std::vector<float> out = decode_attend(caches, 0, q, fast, {}, window);
    for (size_t i = 0; i < caches.size(); i++) {
      const RandomCache& cache = *caches[i];
      const int32_t newest = caches[i]->step().pos0;
      const float* const its_q = q.data() + i * row;
      const float* const its_out = out.data() + i * row;
      const auto of_window = [&](int32_t n) {
        return cache.attend_to(0, its_q,
                               [&](int32_t token) { return cache.position(token) > newest - n; });
      };
      EXPECT_LE(nmse(of_window(window), its_out), bound) << "sequence " << i;
      bool begins = false;  // with a token that is there
      for (int32_t t = 0; t < cache.kv_len(); t++) {
        begins = begins || cache.position(t) == newest - window + 1;
      }
      if (window > 1 && begins) {
        EXPECT_GT(nmse(of_window(window - 1), its_out), bound) << "a token less, sequence " << i;
      }
    }
    const std::vector<float> alone =
        decode_attend({caches[0]}, 0, {q.begin(), q.begin() + row}, fast, {}, window);
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), out.begin()));
  }
}

CacheShape window_shape(const Types& types, int32_t head_dim, int32_t n_queries, const Setting& s) {
  CacheShape shape = shape_of(types, head_dim, n_queries, s);
  shape.n_kv_heads = kOnDevice ? 2 : 1;
  return shape;
}

class WindowDecodeTest : public ::testing::TestWithParam<Variant> {};

TEST_P(WindowDecodeTest, EqualsAttentionToWhatTheWindowSees) {
  const auto& [types, setting, head_dim, n_queries] = GetParam();
  check_windows(window_shape(types, head_dim, n_queries, setting), true);
}

INSTANTIATE_TEST_SUITE_P(
    Variants, WindowDecodeTest,
    ::testing::Values(Variant{{kF16, kF16}, kHalf, 64, 2},
                      Variant{{kBF16, kBF16}, kFirstClass, 128, 2},
                      Variant{{kF16, kF16}, kRow, 64, 5}, Variant{{kBF16, kBF16}, kMixed, 64, 1},
                      Variant{{kF16, kF16}, kDense, 64, 8}, Variant{{kBF16, kBF16}, kDense, 128, 1},
                      Variant{{kBF16, kInt8}, kFirstClass, 128, 5},
                      Variant{{kF16, kInt8}, kDense, 64, 2}, Variant{{kF16, kInt4}, kHalf, 128, 1},
                      Variant{{kBF16, kInt4}, kDense, 64, 8}),
    name_of_variant);

TEST(WindowDecode, CodedRows) {
  CacheShape shape = window_shape({kBF16, DType::kCoded}, 64, 3, kDense);
  shape.k_bits = shape.v_bits = 3.0;
  check_windows(shape, true);
  shape.head_dim = 128;
  if (kOnDevice) check_windows(shape, true);
}

TEST(WindowDecode, BeginsInsideAContextOfManySplits) {
  CacheShape shape = window_shape({kF16, kF16}, 64, 4, kHalf);
  RandomCache cache(shape, 4, 50, 3);
  cache.repeat_blocks(kOnDevice ? 300 : 40);
  cache.place(4, 10);
  const int64_t row = int64_t{shape.n_kv_heads} * shape.n_queries * shape.head_dim;
  const std::vector<float> q = random_queries(row, 7);
  for (const int32_t window : {1000, 2048}) {
    const std::vector<float> out = decode_attend({&cache}, 0, q, true, {}, window);
    const auto sees = [&](int32_t t) { return cache.position(t) > cache.step().pos0 - window; };
    EXPECT_LE(nmse(cache.attend_to(0, q.data(), sees), out.data()), 1e-6) << window;
  }
}

TEST(FastDecode, CodedRowsOfEveryLayerAndOfManyTiles) {
  CacheShape shape = shape_of({kBF16, DType::kCoded}, 128, 2, kDense);
  shape.k_bits = shape.v_bits = 3.0;
  shape.n_layers = 2;
  RandomCache cache(shape, kOnDevice ? 300 : 21, 70, 1);
  const std::vector<float> q = random_queries(2 * 2 * 128, 7);
  for (int32_t layer = 0; layer < 2; layer++) {
    set_schedule(static_cast<uint32_t>(layer));
    const std::vector<float> out = decode_attend({&cache}, layer, q, true);
    EXPECT_LE(nmse(cache.attend(layer, q.data()), out.data()), 1e-5) << layer;
    EXPECT_GT(nmse(cache.attend(1 - layer, q.data()), out.data()), 1e-5) << layer;
  }
}

TEST(FastDecode, CodedRowsOfZerosAndLargeScores) {
  CacheShape shape = shape_of({kF16, DType::kCoded}, 64, 4, kDense);
  shape.k_bits = shape.v_bits = 4.0;
  RandomCache cache(shape, 2, 3, 5, /*key_scale=*/8.0f);
  for (const bool is_key : {true, false}) {
    const SlotLayout& slot = is_key ? cache.layout().k : cache.layout().v;
    const int64_t at =
        is_key ? k_slot_offset(cache.layout(), 0, 0) : v_slot_offset(cache.layout(), 0, 0);
    std::memset(cache.page(1) + at + slot.scales_offset + 3 * 2, 0, 2);
  }
  const std::vector<float> q = random_queries(2 * 4 * 64, 8);
  EXPECT_LE(nmse(cache.attend(0, q.data()), decode_attend({&cache}, 0, q, true).data()), 1e-5);
}

// Contexts of many splits beside short ones.
class LongDecodeTest : public ::testing::TestWithParam<Types> {};

TEST_P(LongDecodeTest, EqualsDenseAttentionOverTheDequantisedRows) {
  for (const Setting& setting : {kFirstClass, kHalf, kDense}) {
    SCOPED_TRACE(setting.name);
    if (!kOnDevice && setting.k_sparsity != 0.625) continue;
    CacheShape shape = shape_of(GetParam(), 128, 4, setting);
    shape.n_kv_heads = kOnDevice ? 2 : 1;
    std::vector<std::unique_ptr<RandomCache>> owned;
    std::vector<RandomCache*> caches;
    const std::vector<int32_t> lengths =
        kOnDevice ? std::vector<int32_t>{255, 256, 0, 513, 31, 3, 64} : std::vector<int32_t>{40, 0};
    for (const int32_t n_blocks : lengths) {
      owned.push_back(std::make_unique<RandomCache>(shape, n_blocks, 40 + n_blocks % 60,
                                                    static_cast<uint32_t>(n_blocks)));
      caches.push_back(owned.back().get());
    }
    const int64_t row = int64_t{shape.n_kv_heads} * shape.n_queries * shape.head_dim;
    const std::vector<float> q = random_queries(row * static_cast<int64_t>(caches.size()), 7);
    const std::vector<float> out = decode_attend(caches, 0, q, true);
    for (size_t i = 0; i < caches.size(); i++) {
      EXPECT_LE(nmse(caches[i]->attend(0, q.data() + i * row), out.data() + i * row),
                testing::nmse_bound(shape.tail, shape.values))
          << lengths[i] << " blocks";
    }
    const std::vector<float> again = decode_attend(caches, 0, q, true);
    EXPECT_TRUE(std::equal(out.begin(), out.end(), again.begin())) << "a second run differs";
  }
}

INSTANTIATE_TEST_SUITE_P(Types, LongDecodeTest,
                         ::testing::Values(Types{kF16, kF16}, Types{kBF16, kBF16},
                                           Types{kBF16, kInt8}, Types{kBF16, kInt4}),
                         [](const ::testing::TestParamInfo<Types>& info) {
                           return std::string(dtype_name(info.param.tail)) + "_" +
                                  dtype_name(info.param.values);
                         });

TEST(FastDecode, EveryLayerReadsItsOwnRows) {
  for (const Types types : {Types{kF16, kF16}, Types{kBF16, kInt8}, Types{kBF16, kInt4}}) {
    CacheShape shape = shape_of(types, 128, 4, kFirstClass);
    shape.n_layers = 3;
    RandomCache cache(shape, 2, 9, 1);
    const std::vector<float> q = random_queries(2 * 4 * 128, 7);
    for (int32_t layer = 0; layer < 3; layer++) {
      const std::vector<float> out = decode_attend({&cache}, layer, q, true);
      const double bound = testing::nmse_bound(types.tail, types.values);
      EXPECT_LE(nmse(cache.attend(layer, q.data()), out.data()), bound) << layer;
      EXPECT_GT(nmse(cache.attend((layer + 1) % 3, q.data()), out.data()), bound) << layer;
    }
  }
}

// Any number of query heads per KV head, of which up to 8 share a block.
class QueryHeadsTest : public ::testing::TestWithParam<int32_t> {};

TEST_P(QueryHeadsTest, EqualDenseAttentionOverTheDequantisedRows) {
  check_batch(shape_of({kBF16, kBF16}, 64, GetParam(), kHalf), true);
  check_batch(shape_of({kF16, kInt8}, 128, GetParam(), kFirstClass), true);
  check_batch(shape_of({kBF16, kInt4}, 64, GetParam(), kDense), true);
}

// The kernels that have a setting compiled in, with two sets of query heads.
TEST(FastDecode, TwoSetsOfHeadsOfCompiledSettings) {
  check_batch(shape_of({kF16, kF16}, 128, 8, kHalf), true);
  check_batch(shape_of({kBF16, kInt8}, 128, 8, kHalf), true);
  check_batch(shape_of({kF16, kInt4}, 128, 8, kHalf), true);
  check_batch(shape_of({kBF16, kBF16}, 128, 8, kDense), true);
  check_batch(shape_of({kF16, kInt8}, 128, 8, kDense), true);
  check_batch(shape_of({kBF16, kInt8}, 64, 8, kDense), true);
  check_batch(shape_of({kF16, kInt4}, 128, 8, kDense), true);
}

INSTANTIATE_TEST_SUITE_P(PerKVHead, QueryHeadsTest, ::testing::Values(1, 2, 3, 4, 5, 7, 8, 9, 16),
                         ::testing::PrintToStringParamName());

// A head's result is the same however many others share its rows.
TEST(FastDecode, AHeadDoesNotDependOnItsGroup) {
  const CacheShape four = shape_of({kBF16, kBF16}, 64, 4, kHalf);
  CacheShape eight = four;
  eight.n_queries = 8;
  RandomCache a(four, 3, 9, 1), b(eight, 3, 9, 1);
  const int64_t set = int64_t{4} * four.head_dim;
  const std::vector<float> q = random_queries(2 * set * four.n_kv_heads, 7);
  const std::vector<float> both = decode_attend({&b}, 0, q, true);
  for (int64_t part = 0; part < 2; part++) {
    std::vector<float> mine;
    for (int64_t head = 0; head < four.n_kv_heads; head++) {
      const auto first = q.begin() + (2 * head + part) * set;
      mine.insert(mine.end(), first, first + set);
    }
    const std::vector<float> alone = decode_attend({&a}, 0, mine, true);
    for (int64_t head = 0; head < four.n_kv_heads; head++) {
      EXPECT_TRUE(std::equal(alone.begin() + head * set, alone.begin() + (head + 1) * set,
                             both.begin() + (2 * head + part) * set))
          << "set " << part << " of KV head " << head;
    }
  }
}

TEST(FastDecode, ResultsDoNotDependOnTheScheduleOrTheBatch) {
  const CacheShape shape = shape_of({kBF16, kInt8}, 64, 2, kHalf);
  RandomCache a(shape, 9, 30, 1), b(shape, 2, 5, 2);
  const int64_t row = int64_t{shape.n_kv_heads} * shape.n_queries * shape.head_dim;
  const std::vector<float> q = random_queries(row * 2, 7);
  set_schedule(0);
  const std::vector<float> alone = decode_attend({&a}, 0, {q.begin(), q.begin() + row}, true);
  for (uint32_t seed = 1; seed < 4; seed++) {
    set_schedule(seed);
    const std::vector<float> both = decode_attend({&a, &b}, 0, q, true);
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), both.begin())) << "seed " << seed;
  }
}

// Nor on how many splits a block takes: splits of unequal length, blocks with fewer of them, the
// dense buffer in the last split, in several, or in one without tiles of the store.
using SplitsCase = std::tuple<Types, Setting, int32_t, int32_t>;  // head_dim, query heads
class SplitsPerBlockTest : public ::testing::TestWithParam<SplitsCase> {};

TEST_P(SplitsPerBlockTest, DoNotChangeResults) {
  const auto& [types, setting, head_dim, n_queries] = GetParam();
  CacheShape shape = shape_of(types, head_dim, n_queries, setting);
  if (types.values == DType::kCoded) shape.k_bits = shape.v_bits = 3.0;
  shape.n_kv_heads = 1;
  RandomCache a(shape, 37, 50, 1), b(shape, 0, 7, 2), c(shape, 6, 130, 3), d(shape, 8, 64, 4);
  const std::vector<RandomCache*> caches = {&a, &b, &c, &d};
  const int64_t row = int64_t{n_queries} * head_dim;
  const std::vector<float> q = random_queries(row * 4, 7);
  set_schedule(0);
  const std::vector<float> one = decode_attend(caches, 0, q, true, {}, 0, 1);
  for (size_t i = 0; i < caches.size(); i++) {
    EXPECT_LE(nmse(caches[i]->attend(0, q.data() + i * row), one.data() + i * row),
              testing::nmse_bound(shape.tail, shape.values))
        << "sequence " << i;
  }
  for (const int32_t splits : {2, 3, 8}) {
    set_schedule(static_cast<uint32_t>(splits));
    const std::vector<float> out = decode_attend(caches, 0, q, true, {}, 0, splits);
    EXPECT_TRUE(std::equal(one.begin(), one.end(), out.begin())) << splits << " splits";
  }
}

std::string name_of_splits(const ::testing::TestParamInfo<SplitsCase>& info) {
  const auto& [types, setting, head_dim, n_queries] = info.param;
  return std::string(dtype_name(types.tail)) + "_" + dtype_name(types.values) + "_" + setting.name +
         "_" + std::to_string(head_dim) + "x" + std::to_string(n_queries);
}

INSTANTIATE_TEST_SUITE_P(Layouts, SplitsPerBlockTest,
                         ::testing::Values(SplitsCase{{kF16, kF16}, kFirstClass, 128, 4},
                                           SplitsCase{{kBF16, kInt8}, kFirstClass, 128, 4},
                                           SplitsCase{{kF16, kInt4}, kHalf, 128, 8},
                                           SplitsCase{{kBF16, kBF16}, kHalf, 128, 6},
                                           SplitsCase{{kF16, kInt8}, kRow, 64, 3},
                                           SplitsCase{{kF16, kF16}, kDense, 128, 8},
                                           SplitsCase{{kBF16, kBF16}, kDense, 64, 4},
                                           SplitsCase{{kBF16, kInt8}, kDense, 128, 8},
                                           SplitsCase{{kF16, kInt4}, kDense, 128, 4},
                                           SplitsCase{{kF16, kInt4}, kDense, 64, 8},
                                           SplitsCase{{kF16, DType::kCoded}, kDense, 128, 4},
                                           SplitsCase{{kBF16, DType::kCoded}, kDense, 128, 8},
                                           SplitsCase{{kBF16, DType::kCoded}, kDense, 64, 3}),
                         name_of_splits);

TEST(FastDecode, SplitsOfABlockByTheModel) {
  // One sequence: every split a block of its own where all run at once. Eight of 32K tokens: as
  // many as fill the device.
  EXPECT_EQ(splits_per_block({64, 8}, 1, 8, 132 * 4, 8), 1);
  EXPECT_EQ(splits_per_block({64, 8}, 1, 8, 132 * 2, 8), 2);
  EXPECT_EQ(splits_per_block({512, 8}, 8, 8, 132 * 4, 8), 8);
  EXPECT_EQ(splits_per_block({512, 8}, 8, 8, 132 * 4, 2), 2);
  EXPECT_EQ(splits_per_block({512, 8}, 8, 8, 132 * 4, 1), 1);
  EXPECT_EQ(splits_per_block({512, 8}, 8, 8, 132 * 5, 8), 7);   // 10 blocks of a head: one round
  EXPECT_EQ(splits_per_block({512, 16}, 8, 8, 132 * 4, 8), 4);  // 64K tokens: 64 tiles
  // One long sequence among short ones is not left to few blocks.
  EXPECT_EQ(splits_per_block({64 + 31 * 4, 32}, 32, 8, 132 * 4, 8), 1);
}

TEST(FastDecode, RowsOfZerosAndLargeScores) {
  CacheShape shape = shape_of({kBF16, kInt8}, 128, 4, kFirstClass);
  RandomCache cache(shape, 2, 3, 5, /*key_scale=*/8.0f);
  // A K row and a V row whose scale is 0.
  const SlotLayout& v = cache.layout().v;
  uint8_t* slot = cache.page(1) + v_slot_offset(cache.layout(), 0, 0);
  std::memset(slot + v.values_offset + 3 * v.row_bytes, 0, v.row_bytes);
  std::memset(slot + v.scales_offset + 3 * 2, 0, 2);
  const SlotLayout& k = cache.layout().k;
  slot = cache.page(0) + k_slot_offset(cache.layout(), 0, 0);
  std::memset(slot + k.values_offset + 9 * k.row_bytes, 0, k.row_bytes);
  std::memset(slot + k.scales_offset + 9 * 2, 0, 2);
  const std::vector<float> q = random_queries(2 * 4 * 128, 8);
  EXPECT_LE(nmse(cache.attend(0, q.data()), decode_attend({&cache}, 0, q, true).data()), 1e-5);
}

class PlainAttentionTest : public ::testing::TestWithParam<Case> {};

TEST_P(PlainAttentionTest, EqualsDenseAttentionOverTheDequantisedRows) {
  const auto& [types, setting, head_dim] = GetParam();
  CacheShape shape = shape_of(types, head_dim, head_dim == 8 ? 9 : 2, setting);
  check_batch(shape, false);
}

INSTANTIATE_TEST_SUITE_P(Shapes, PlainAttentionTest,
                         ::testing::Combine(::testing::Values(Types{kF32, kF32}, Types{kBF16, kF16},
                                                              Types{kBF16, kInt4}),
                                            ::testing::Values(kHalf, kRow),
                                            ::testing::Values(8, 80)),
                         name_of_case);
INSTANTIATE_TEST_SUITE_P(Wide, PlainAttentionTest,
                         ::testing::Combine(::testing::Values(Types{kF16, kInt8}),
                                            ::testing::Values(kDense), ::testing::Values(256)),
                         name_of_case);
INSTANTIATE_TEST_SUITE_P(WideSparse, PlainAttentionTest,
                         ::testing::Combine(::testing::Values(Types{kBF16, kBF16},
                                                              Types{kF16, kInt4}),
                                            ::testing::Values(kFirstClass), ::testing::Values(256)),
                         name_of_case);

TEST(PlainAttention, RaggedSlots) {
  for (const Types types : {Types{kBF16, kInt8}, Types{kF16, kInt4}, Types{kBF16, kBF16}}) {
    CacheShape shape = shape_of(types, 64, 2, kHalf);
    shape.ragged = true;
    check_batch(shape, false);
    shape.head_dim = 128;
    if (kOnDevice) check_batch(shape, false);
  }
}

TEST(PlainAttention, CodedRows) {
  for (const int32_t head_dim : {8, 64, 80, 256}) {
    CacheShape shape = shape_of({kF32, DType::kCoded}, head_dim, 2, kDense);
    shape.k_bits = head_dim == 256 ? 7.0 : 3.0;
    shape.v_bits = 4.3;
    check_batch(shape, false);
  }
}

TEST(PlainAttention, Windows) {
  check_windows(window_shape({kF32, kF32}, 24, 2, kHalf), false);
  check_windows(window_shape({kBF16, kInt8}, 40, 9, kDense), false);
  CacheShape ragged = window_shape({kF16, kInt4}, 64, 2, kHalf);
  ragged.ragged = true;
  check_windows(ragged, false);
  CacheShape coded = window_shape({kF32, DType::kCoded}, 24, 2, kDense);
  coded.k_bits = coded.v_bits = 4.0;
  check_windows(coded, false);
}

TEST(PlainAttention, UndoesTheValueTransform) {
  const CacheShape shape = shape_of({kF32, kF32}, 8, 2, kHalf);
  RandomCache cache(shape, 1, 3, 5);
  const std::vector<float> q = random_queries(2 * 2 * 8, 8);
  const std::vector<float> matrix = random_queries(2 * 8 * 8, 9);
  const DeviceArray<float> matrix_copy(matrix);
  KVTransform transform;
  transform.v_backward = matrix_copy.device();
  const std::vector<double> plain = cache.attend(0, q.data());
  std::vector<double> expected(plain.size());
  for (int head = 0; head < 4; head++) {
    for (int d = 0; d < 8; d++) {
      for (int j = 0; j < 8; j++) {
        expected[head * 8 + d] += plain[head * 8 + j] * matrix[head / 2 * 64 + j * 8 + d];
      }
    }
  }
  const std::vector<float> out = decode_attend({&cache}, 0, q, false, transform);
  EXPECT_LE(nmse(expected, out.data()), 1e-10);
}

}  // namespace
}  // namespace mustafar::cuda
