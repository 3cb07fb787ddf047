#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "backend/cpu/attention/decode.h"
#include "support/kv_test_util.h"

namespace mustafar {
namespace {

using testing::CacheShape;
using testing::RandomCache;

std::vector<float> random_queries(int64_t n, uint32_t seed, float scale = 1.0f) {
  std::mt19937 random(seed);
  std::vector<float> q(n);
  for (float& x : q) x = testing::random_normal(random) * scale;
  return q;
}

// One decode step over the caches, output and scratch poisoned. fine: DecodeAttentionArgs's.
std::vector<float> attend(Isa isa, std::vector<RandomCache*> caches, int32_t layer,
                          const std::vector<float>& q, int threads = 2, bool fine = true) {
  const CacheShape& shape = caches[0]->shape();
  DecodeAttentionArgs args;
  args.layer = layer;
  args.n_kv_heads = shape.n_kv_heads;
  args.n_heads = shape.n_kv_heads * shape.n_queries;
  args.head_dim = shape.head_dim;
  args.tail_dtype = shape.tail;
  std::vector<SequenceStep> steps;
  for (size_t i = 0; i < caches.size(); i++) {
    steps.push_back(caches[i]->step());
    steps.back().row0 = static_cast<int32_t>(i);
  }
  args.sequences = steps;
  args.q = q.data();
  std::vector<float> out(q.size());
  std::memset(out.data(), 0xff, out.size() * 4);
  args.out = out.data();
  args.fine = fine;
  HostBuffer scratch(1 << 21);
  std::memset(scratch.data(), 0xff, scratch.bytes());
  ThreadPool pool(threads);
  decode_attention(pool, isa, args, scratch);
  return out;
}

struct Types {
  DType tail, values;
};
using Config = std::tuple<Isa, Types, int32_t, int32_t>;  // head_dim, query heads per KV head

class DecodeAttentionTest : public ::testing::TestWithParam<Config> {
 protected:
  // Where tiles and runs end is the same code for any number of query heads: every instantiation
  // has one of these two, and long caches take long to pack.
  static bool checks_lengths() {
    const int32_t n_queries = std::get<3>(GetParam());
    return n_queries == 2 || n_queries == 4;
  }

  // Every setting of pattern and sparsity, at lengths around the edges of tiles and runs.
  // Windows that begin in sinks, in the store, at the edges of its blocks and in the tail.
  void check_windows(const CacheShape& shape, int32_t n_blocks, float key_scale) {
    constexpr int32_t kSinks = 5, kDense = 40, kDropped = 3;
    RandomCache cache(shape, n_blocks, kDense, n_blocks, key_scale);
    const std::vector<float> q =
        random_queries(int64_t{shape.n_kv_heads} * shape.n_queries * shape.head_dim, 7);
    const int32_t layer = shape.n_layers - 1;
    std::vector<int32_t> windows(shape.n_layers, 0);  // other layers see all
    cache.step().windows = windows.data();
    const uint8_t* const* const all_pages = cache.step().pages;
    for (const int32_t dropped : {0, kDropped}) {
      cache.place(kSinks, dropped);
      const int32_t length = cache.step().pos0 + 1, held_from = kSinks + 64 * dropped;
      for (const int32_t first :
           {0, 2, kSinks, held_from, held_from + 1, held_from + 63, held_from + 64, held_from + 100,
            held_from + 64 * n_blocks - 1, held_from + 64 * n_blocks, length - 3, length - 1}) {
        if (dropped > 0 && first < held_from) continue;
        windows[layer] = length - first;
        std::vector<const uint8_t*> pages(all_pages, all_pages + n_blocks);
        for (int32_t b = 0; b < (first - held_from) / 64 && b < n_blocks; b++) pages[b] = nullptr;
        cache.step().pages = pages.data();
        const Isa isa = std::get<0>(GetParam());
        const std::vector<float> out = attend(isa, {&cache}, layer, q);
        const std::vector<float> coarse = attend(isa, {&cache}, layer, q, 2, false);
        cache.step().pages = all_pages;
        const auto sees = [&](int32_t token) { return cache.position(token) >= first; };
        const std::vector<double> expected = cache.attend_to(layer, q.data(), sees);
        const std::string where = std::to_string(n_blocks) + " blocks after " +
                                  std::to_string(dropped) + ", seen from " + std::to_string(first) +
                                  " of " + std::to_string(length) +
                                  (shape.ragged ? ", ragged" : "");
        EXPECT_LE(testing::nmse(expected, out.data()),
                  testing::nmse_bound(shape.tail, shape.values))
            << where;
        EXPECT_LE(testing::nmse(expected, coarse.data()), testing::kCoarseBound) << where;
      }
    }
    cache.step().windows = nullptr;
  }

  void check(const CacheShape& shape, int32_t n_blocks, int32_t dense_tokens, float key_scale) {
    RandomCache cache(shape, n_blocks, dense_tokens, n_blocks * 1000 + dense_tokens, key_scale);
    const std::vector<float> q =
        random_queries(int64_t{shape.n_kv_heads} * shape.n_queries * shape.head_dim, 7);
    const int32_t layer = shape.n_layers - 1;
    const Isa isa = std::get<0>(GetParam());
    const std::vector<float> out = attend(isa, {&cache}, layer, q);
    const std::vector<float> coarse = attend(isa, {&cache}, layer, q, 2, false);
    const std::vector<double> expected = cache.attend(layer, q.data());
    const std::string where =
        std::to_string(n_blocks) + " blocks, " + std::to_string(dense_tokens) +
        " dense, sparsity " + std::to_string(shape.k_sparsity) +
        (shape.group_pattern ? " group" : " row") + (shape.ragged ? " ragged" : "");
    EXPECT_LE(testing::nmse(expected, out.data()), testing::nmse_bound(shape.tail, shape.values))
        << where;
    EXPECT_LE(testing::nmse(expected, coarse.data()), testing::kCoarseBound) << where;
  }
};

TEST_P(DecodeAttentionTest, EqualsDenseAttentionOverTheDequantisedRows) {
  const auto& [isa, types, head_dim, n_queries] = GetParam();
  CacheShape shape;
  shape.n_layers = 2;
  shape.n_kv_heads = n_queries < 4 ? 2 : 1;
  shape.n_queries = n_queries;
  shape.head_dim = head_dim;
  shape.tail = types.tail;
  shape.values = types.values;
  for (const bool group : {true, false}) {
    shape.group_pattern = group;
    for (const auto& [k_sparsity, v_sparsity] :
         {std::pair{0.625, 0.75}, {0.5, 0.5}, {0.0, 0.0}, {0.0, 0.9}, {0.3, 0.0}}) {
      shape.k_sparsity = k_sparsity;
      shape.v_sparsity = v_sparsity;
      check(shape, 2, 40, 1.0f);
    }
  }
  if (!checks_lengths()) return;
  shape.group_pattern = true;
  shape.n_layers = 1;
  shape.k_sparsity = 0.625;
  shape.v_sparsity = 0.75;
  for (const int32_t n_blocks : {0, 1, 15, 16, 17}) check(shape, n_blocks, 31, 1.0f);
  for (const int32_t dense_tokens : {0, 1, 62, 63, 64, 65, 127}) {
    check(shape, 1, dense_tokens, 2.0f);
  }
  check_windows(shape, 3, 1.0f);
  check_windows(shape, 18, 1.0f);
  shape.k_sparsity = shape.v_sparsity = 0;
  check_windows(shape, 3, 1.0f);
  shape.ragged = true;
  check(shape, 2, 10, 1.0f);
  check_windows(shape, 2, 1.0f);
}

std::string name_of_config(const ::testing::TestParamInfo<Config>& info) {
  const auto& [isa, types, head_dim, n_queries] = info.param;
  return std::string(isa_name(isa)) + "_" + dtype_name(types.tail) + "_" +
         dtype_name(types.values) + "_" + std::to_string(head_dim) + "x" +
         std::to_string(n_queries);
}

const Types kTypes[] = {{DType::kF32, DType::kF32},   {DType::kF16, DType::kF16},
                        {DType::kBF16, DType::kBF16}, {DType::kBF16, DType::kInt8},
                        {DType::kBF16, DType::kInt4}, {DType::kF16, DType::kInt8},
                        {DType::kF16, DType::kBF16},  {DType::kF32, DType::kInt4}};

const Types kCodedTypes[] = {
    {DType::kBF16, DType::kCoded}, {DType::kF16, DType::kCoded}, {DType::kF32, DType::kCoded}};

class CodedAttentionTest : public DecodeAttentionTest {};

TEST_P(CodedAttentionTest, EqualsDenseAttentionOverTheDequantisedRows) {
  const auto& [isa, types, head_dim, n_queries] = GetParam();
  CacheShape shape;
  shape.n_layers = 2;
  shape.n_kv_heads = 2;
  shape.n_queries = n_queries;
  shape.head_dim = head_dim;
  shape.tail = types.tail;
  shape.values = types.values;
  for (const auto& [k_bits, v_bits] : {std::pair{3.0, 3.0}, {1.0, 1.5}, {7.0, 7.0}, {2.5, 4.0}}) {
    shape.k_bits = k_bits;
    shape.v_bits = v_bits;
    check(shape, 2, 40, 0.5f);
  }
  if (!checks_lengths()) return;
  shape.n_layers = 1;
  for (const int32_t n_blocks : {0, 1, 15, 16, 17}) check(shape, n_blocks, 31, 0.5f);
  for (const int32_t dense_tokens : {0, 1, 63, 64, 65}) check(shape, 1, dense_tokens, 0.5f);
  check_windows(shape, 3, 0.5f);
}

// Layers of other sizes of rows, from one word on: `check` attends the last layer.
TEST_P(CodedAttentionTest, LayersMayDiffer) {
  const auto& [isa, types, head_dim, n_queries] = GetParam();
  CacheShape shape;
  shape.n_layers = 3;
  shape.n_kv_heads = 3;
  shape.n_queries = n_queries;
  shape.head_dim = head_dim;
  shape.tail = types.tail;
  shape.values = types.values;
  const int32_t most = coded_row_bytes(head_dim, kMaxWidth);
  for (const auto& [k_last, v_last] : {std::pair{4, most}, {most - 4, 8}, {12, 4}}) {
    shape.k_row_bytes = {8, most, k_last};
    shape.v_row_bytes = {most, 4, v_last};
    check(shape, 2, 40, 0.5f);
    if (checks_lengths()) check(shape, 17, 3, 0.5f);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, CodedAttentionTest,
                         ::testing::Combine(::testing::ValuesIn(available_isas()),
                                            ::testing::ValuesIn(kCodedTypes),
                                            ::testing::Values(64, 128), ::testing::Values(1, 4)),
                         name_of_config);
INSTANTIATE_TEST_SUITE_P(GroupSizes, CodedAttentionTest,
                         ::testing::Combine(::testing::ValuesIn(available_isas()),
                                            ::testing::ValuesIn(kCodedTypes, kCodedTypes + 1),
                                            ::testing::Values(64, 128),
                                            ::testing::Values(2, 3, 5, 7, 8, 12)),
                         name_of_config);
INSTANTIATE_TEST_SUITE_P(OtherShapes, CodedAttentionTest,
                         ::testing::Combine(::testing::ValuesIn(available_isas()),
                                            ::testing::ValuesIn(kCodedTypes, kCodedTypes + 1),
                                            ::testing::Values(8, 16, 80, 96, 192, 256),
                                            ::testing::Values(2)),
                         name_of_config);

INSTANTIATE_TEST_SUITE_P(FastShapes, DecodeAttentionTest,
                         ::testing::Combine(::testing::ValuesIn(available_isas()),
                                            ::testing::ValuesIn(kTypes), ::testing::Values(64, 128),
                                            ::testing::Values(1, 4)),
                         name_of_config);
INSTANTIATE_TEST_SUITE_P(GroupSizes, DecodeAttentionTest,
                         ::testing::Combine(::testing::ValuesIn(available_isas()),
                                            ::testing::ValuesIn(kTypes, kTypes + 5),
                                            ::testing::Values(128),
                                            ::testing::Values(2, 3, 5, 7, 8, 12)),
                         name_of_config);
INSTANTIATE_TEST_SUITE_P(OtherShapes, DecodeAttentionTest,
                         ::testing::Combine(::testing::ValuesIn(available_isas()),
                                            ::testing::ValuesIn(kTypes, kTypes + 5),
                                            ::testing::Values(8, 16, 32, 72, 80, 96, 256),
                                            ::testing::Values(2)),
                         name_of_config);

class DecodeAttentionIsaTest : public ::testing::TestWithParam<Isa> {
 protected:
  static CacheShape headline() {
    CacheShape shape;
    shape.n_kv_heads = 2;
    shape.n_queries = 4;
    shape.head_dim = 128;
    shape.tail = shape.values = DType::kBF16;
    shape.k_sparsity = 0.625;
    shape.v_sparsity = 0.75;
    return shape;
  }
};

TEST_P(DecodeAttentionIsaTest, ResultsDoNotDependOnBatchOrThreads) {
  const CacheShape shape = headline();
  RandomCache a(shape, 20, 40, 1), b(shape, 3, 90, 2), c(shape, 0, 5, 3);
  const int64_t row = int64_t{8} * 128;
  const std::vector<float> q = random_queries(3 * row, 8);
  const std::vector<float> together = attend(GetParam(), {&a, &b, &c}, 0, q, 3);
  RandomCache* const caches[] = {&a, &b, &c};
  for (int i = 0; i < 3; i++) {
    const std::vector<float> own(q.begin() + i * row, q.begin() + (i + 1) * row);
    const std::vector<float> alone = attend(GetParam(), {caches[i]}, 0, own, 1);
    EXPECT_EQ(std::memcmp(alone.data(), together.data() + i * row, row * 4), 0) << i;
  }
}

// A window that reaches the first token changes no bit, nor do blocks that were dropped before it.
TEST_P(DecodeAttentionIsaTest, WhatNoWindowReachesChangesNothing) {
  const CacheShape shape = headline();
  RandomCache cache(shape, 20, 40, 1);
  const std::vector<float> q = random_queries(8 * 128, 8);
  const auto attended = [&](const int32_t* windows) {
    cache.step().windows = windows;
    return attend(GetParam(), {&cache}, 0, q);
  };
  cache.place(4, 0);
  const std::vector<float> all = attended(nullptr);
  const int32_t whole = cache.step().pos0 + 1, some = 500;
  EXPECT_EQ(attended(&whole), all);
  const std::vector<float> seen = attended(&some);
  EXPECT_NE(seen, all);
  cache.step().pages += 10;
  cache.step().n_blocks -= 10;
  cache.place(4, 10);
  EXPECT_EQ(attended(&some), seen);
}

// A sequence whose layers differ beside one whose layers are alike, and one of other values.
TEST_P(DecodeAttentionIsaTest, SequencesOfOtherLayoutsMayBeInOneBatch) {
  CacheShape shape = headline();
  RandomCache floats(shape, 3, 9, 4);
  shape.n_layers = 2;
  shape.values = DType::kCoded;
  RandomCache alike(shape, 3, 90, 2);
  shape.k_row_bytes = {24, 112};
  shape.v_row_bytes = {60, 4};
  RandomCache differing(shape, 5, 40, 1);
  const int64_t row = int64_t{8} * 128;
  const std::vector<float> q = random_queries(3 * row, 8);
  RandomCache* const caches[] = {&differing, &alike, &floats};
  const std::vector<float> together = attend(GetParam(), {caches[0], caches[1], caches[2]}, 0, q);
  for (int i = 0; i < 3; i++) {
    const std::vector<float> own(q.begin() + i * row, q.begin() + (i + 1) * row);
    const std::vector<float> alone = attend(GetParam(), {caches[i]}, 0, own);
    EXPECT_EQ(std::memcmp(alone.data(), together.data() + i * row, row * 4), 0) << i;
  }
}

// More KV heads than one thread takes at a time; threads cut them into spans in different ways.
TEST_P(DecodeAttentionIsaTest, EveryKVHeadIsAttendedWhateverTheThreads) {
  for (const DType values : {DType::kBF16, DType::kInt8, DType::kCoded}) {
    CacheShape shape = headline();
    shape.n_kv_heads = 18;
    shape.n_queries = 2;
    shape.head_dim = 64;
    shape.values = values;
    RandomCache cache(shape, 18, 40, 14);
    const std::vector<float> q = random_queries(int64_t{36} * 64, 15);
    const std::vector<float> out = attend(GetParam(), {&cache}, 0, q, 1);
    const std::vector<double> expected = cache.attend(0, q.data());
    for (int head = 0; head < 18; head++) {  // each alone: one head's fault is not diluted
      const std::vector<double> part(expected.begin() + head * 128,
                                     expected.begin() + head * 128 + 128);
      EXPECT_LE(testing::nmse(part, out.data() + head * 128), 1e-5) << head;
    }
    for (const int threads : {2, 3, 7}) {
      EXPECT_EQ(std::memcmp(attend(GetParam(), {&cache}, 0, q, threads).data(), out.data(),
                            out.size() * 4),
                0)
          << threads << " threads";
    }
  }
}

TEST_P(DecodeAttentionIsaTest, BoundNoticesADroppedToken) {
  const CacheShape shape = headline();
  RandomCache cache(shape, 30, 80, 4);
  const std::vector<float> q = random_queries(8 * 128, 9);
  const std::vector<float> out = attend(GetParam(), {&cache}, 0, q);
  EXPECT_LE(testing::nmse(cache.attend(0, q.data()), out.data()), 1e-5);
  for (const int32_t skip : {0, 700, 1919, 1920, 2000}) {
    EXPECT_GT(testing::nmse(cache.attend(0, q.data(), skip), out.data()), 1e-5) << skip;
  }
}

TEST_P(DecodeAttentionIsaTest, BoundNoticesACodedBit) {
  CacheShape shape = headline();
  shape.values = DType::kCoded;
  RandomCache cache(shape, 2, 40, 5, 0.5f);
  const std::vector<float> q = random_queries(8 * 128, 10);
  const std::vector<double> expected = cache.attend(0, q.data());
  ASSERT_LE(testing::nmse(expected, attend(GetParam(), {&cache}, 0, q).data()), 1e-5);
  // Token 70 of head 0: bits of its first values.
  cache.page(1)[v_slot_offset(cache.layout(), 0, 0) + cache.layout().v.values_offset +
                6 * cache.layout().v.row_bytes] ^= 0xff;
  EXPECT_GT(testing::nmse(expected, attend(GetParam(), {&cache}, 0, q).data()), 1e-5);
}

TEST_P(DecodeAttentionIsaTest, BoundNoticesAMaskBit) {
  for (const DType values : {DType::kBF16, DType::kInt8, DType::kInt4}) {
    CacheShape shape = headline();
    shape.values = values;
    RandomCache cache(shape, 2, 40, 5);
    const std::vector<float> q = random_queries(8 * 128, 10);
    const std::vector<double> expected = cache.attend(0, q.data());
    ASSERT_LE(testing::nmse(expected, attend(GetParam(), {&cache}, 0, q).data()), 1e-5);
    // Token 70 of head 0: moves a bit of its V mask to a neighbour.
    uint32_t* mask =
        reinterpret_cast<uint32_t*>(cache.page(1) + v_slot_offset(cache.layout(), 0, 0) + 6 * 16);
    const uint32_t lowest = mask[0] & ~(mask[0] - 1);
    uint32_t other = 1;
    while ((mask[0] & other) != 0) other <<= 1;
    mask[0] = (mask[0] & ~lowest) | other;
    EXPECT_GT(testing::nmse(expected, attend(GetParam(), {&cache}, 0, q).data()), 1e-5);
  }
}

// From flat to peaked: where the second term of a bf16 query starts to matter, and far beyond.
TEST_P(DecodeAttentionIsaTest, EveryScaleOfScoresStaysWithinTheBound) {
  for (const DType values :
       {DType::kBF16, DType::kInt8, DType::kInt4, DType::kF16, DType::kCoded}) {
    for (const float scale : {0.1f, 1.0f, 1.5f, 2.0f, 3.0f, 5.0f, 12.0f}) {
      CacheShape shape = headline();
      shape.n_kv_heads = 1;
      shape.values = values;
      shape.tail = values == DType::kF16 ? DType::kF16 : DType::kBF16;
      RandomCache cache(shape, 18, 70, 6, scale);
      const std::vector<float> q = random_queries(4 * 128, 11);
      const std::vector<double> expected = cache.attend(0, q.data());
      EXPECT_LE(testing::nmse(expected, attend(GetParam(), {&cache}, 0, q).data()),
                testing::nmse_bound(shape.tail, values))
          << dtype_name(values) << " scale " << scale;
      EXPECT_LE(testing::nmse(expected, attend(GetParam(), {&cache}, 0, q, 2, false).data()),
                testing::kCoarseBound)
          << dtype_name(values) << " scale " << scale;
    }
  }
}

// Queries and weights of one byte, beside what the rows themselves lost.
TEST_P(DecodeAttentionIsaTest, OneByteAddsLittleToWhatCompressionCosts) {
  CacheShape shape = headline();
  shape.k_sparsity = shape.v_sparsity = 0;
  const std::vector<float> q = random_queries(8 * 128, 16);
  const RandomCache stored(shape, 18, 40, 17);  // the same rows in bf16
  const std::vector<double> expected = stored.attend(0, q.data());
  for (const auto& [values, sparsity] :
       {std::pair{DType::kInt4, 0.0}, {DType::kInt4, 0.5}, {DType::kInt8, 0.5}}) {
    shape.values = values;
    shape.k_sparsity = shape.v_sparsity = sparsity;
    RandomCache cache(shape, 18, 40, 17);
    const double fine = testing::nmse(expected, attend(GetParam(), {&cache}, 0, q).data());
    const double coarse =
        testing::nmse(expected, attend(GetParam(), {&cache}, 0, q, 2, false).data());
    EXPECT_LE(coarse, 1.03 * fine) << dtype_name(values) << " " << sparsity;
    EXPECT_GT(fine, 1e-3) << "nothing to compare with";
  }
}

// Rows that are hardly pruned, or of more bits, meet two bytes anyhow.
TEST_P(DecodeAttentionIsaTest, RowsThatAreNearlyExactKeepTwoBytes) {
  CacheShape shape = headline();
  shape.group_pattern = false;
  const std::vector<float> q = random_queries(8 * 128, 19);
  for (const auto& [values, sparsity] :
       {std::pair{DType::kInt8, 0.0}, {DType::kInt8, 0.1}, {DType::kCoded, 0.0}}) {
    shape.values = values;
    shape.k_sparsity = shape.v_sparsity = sparsity;
    shape.k_bits = shape.v_bits = 5;
    RandomCache cache(shape, 3, 40, 20, 0.5f);
    EXPECT_EQ(attend(GetParam(), {&cache}, 0, q, 2, false), attend(GetParam(), {&cache}, 0, q))
        << dtype_name(values) << " " << sparsity;
  }
}

// Wide codes, all on one side, and a query that has them add up: sums of 16 bits don't hold that.
TEST_P(DecodeAttentionIsaTest, ProductsOfWideCodesDoNotOverflow) {
  CacheShape shape = headline();
  shape.n_kv_heads = 1;
  shape.values = DType::kCoded;
  shape.k_bits = shape.v_bits = 4;
  RandomCache cache(shape, 2, 0, 21);
  std::vector<uint8_t> widths(128, 1);
  std::fill_n(widths.begin(), 64, kMaxWidth);
  const std::vector<float> sigmas(128, 1.0f);
  cache.step().codes = {widths.data(), widths.data(), sigmas.data(), sigmas.data()};
  std::mt19937 random(22);
  for (int32_t block = 0; block < 2; block++) {
    for (const bool is_key : {true, false}) {
      const StoreLayout& layout = cache.layout();
      std::vector<float> rows(64 * 128);
      for (float& x : rows) x = (is_key ? 1.0f : 0.1f) + 0.3f * testing::random_normal(random);
      for (int32_t t = 0; t < 64 && !is_key; t++) rows[t * 128] = -20.0f;  // the lowest code
      pack_coded_block(
          is_key ? layout.k : layout.v, code_table(cache.step().codes, layout, 0, 0, is_key),
          rows.data(),
          cache.page(block) + (is_key ? k_slot_offset(layout, 0, 0) : v_slot_offset(layout, 0, 0)));
    }
  }
  for (const float sign : {1.0f, -1.0f, 0.0f}) {  // the last: all weights are the largest
    std::vector<float> q(4 * 128, 0.0f);
    for (int32_t h = 0; h < 4; h++) std::fill_n(q.begin() + h * 128, 64, sign);
    const std::vector<float> plain = attend(Isa::kScalar, {&cache}, 0, q);
    EXPECT_LE(testing::nmse({plain.begin(), plain.end()},
                            attend(GetParam(), {&cache}, 0, q, 2, false).data()),
              testing::kCoarseBound)
        << sign;
  }
}

// Many small weights beside a large one: rounded to nearest, none of them would be left.
TEST_P(DecodeAttentionIsaTest, SmallWeightsOfATileAddUp) {
  CacheShape shape = headline();
  shape.n_kv_heads = shape.n_queries = 1;
  shape.values = DType::kInt4;
  shape.k_sparsity = shape.v_sparsity = 0;
  RandomCache cache(shape, 4, 0, 18);
  const SlotLayout &k = cache.layout().k, &v = cache.layout().v;
  for (int32_t block = 0; block < 4; block++) {
    // The first token of a tile has another key, and values whose signs alternate.
    std::vector<float> keys(64 * 128, 1.0f), values(64 * 128, 7.0f);
    for (int32_t t = 1; t < 64; t++) keys[t * 128] = -1.0f;
    for (int32_t d = 1; d < 128; d += 2) values[d] = -7.0f;
    pack_block(k, keys.data(), nullptr, cache.page(block) + k_slot_offset(cache.layout(), 0, 0));
    pack_block(v, values.data(), nullptr, cache.page(block) + v_slot_offset(cache.layout(), 0, 0));
  }
  std::vector<float> q(128, 0.0f);  // the others have 1/800 of its weight each
  q[0] = static_cast<float>(std::log(800.0) / 2 * std::sqrt(128.0));
  const std::vector<float> out = attend(GetParam(), {&cache}, 0, q, 2, false);
  EXPECT_LE(testing::nmse(cache.attend(0, q.data()), out.data()), 1e-4);
}

TEST_P(DecodeAttentionIsaTest, NanInKeysReachesTheOutput) {
  CacheShape shape = headline();
  RandomCache cache(shape, 2, 5, 12);
  uint16_t* value = reinterpret_cast<uint16_t*>(
      cache.page(0) + k_slot_offset(cache.layout(), 0, 1) + cache.layout().k.values_offset);
  *value = 0x7fc0;
  const std::vector<float> out = attend(GetParam(), {&cache}, 0, random_queries(8 * 128, 13));
  for (int i = 0; i < 8 * 128; i++) {
    EXPECT_EQ(std::isnan(out[i]), i >= 4 * 128) << i;  // the second KV head's queries
  }
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, DecodeAttentionIsaTest, ::testing::ValuesIn(available_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

}  // namespace
}  // namespace mustafar
