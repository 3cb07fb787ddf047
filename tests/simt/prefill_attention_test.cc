// Attention of many rows over store, dense buffer and the call's own tokens, against double
// precision.
#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <vector>

#include "attention_fixture.h"

namespace mustafar::cuda {
namespace {

using testing::CacheShape;
using testing::RandomCache;

// A sequence with `fresh_tokens` tokens in the call, of which rows [first_row, first_row + n_rows)
// attend: a chunk of a longer prefill.
// The first n_sinks dense tokens are sinks; of the store dropped_blocks have gone.
struct Sequence {
  Sequence(const CacheShape& shape, int32_t n_blocks, int32_t dense_tokens, int32_t fresh_tokens,
           int32_t first_row, int32_t n_rows, uint32_t seed, int32_t n_sinks = 0,
           int32_t dropped_blocks = 0)
      : cache(shape, n_blocks, dense_tokens, seed),
        fresh(
            dtype_bytes(shape.tail, int64_t{2} * shape.n_kv_heads * fresh_tokens * shape.head_dim),
            "the fresh tokens") {
    std::mt19937 random(seed);
    const int64_t n = int64_t{2} * shape.n_kv_heads * fresh_tokens * shape.head_dim;
    for (int64_t i = 0; i < n; i++) {
      store_float(fresh.host(), shape.tail, i, testing::random_normal(random));
    }
    fresh.upload();
    cache.place(n_sinks, dropped_blocks);
    SequenceStep& step = cache.step();
    step.n_rows = n_rows;
    step.fresh = fresh.device();
    step.fresh_capacity = fresh_tokens;
    step.fresh_pos0 = step.pos0;
    step.pos0 += first_row;
  }

  std::vector<float> token(int32_t head, bool is_key, int32_t index) const {
    const CacheShape& shape = cache.shape();
    const int32_t before = cache.kv_len() - 1;
    if (index < before) return cache.row(0, head, is_key, index);
    std::vector<float> row(shape.head_dim);
    const SequenceStep& step = const_cast<RandomCache&>(cache).step();
    const int64_t at =
        ((is_key ? 0 : 1) * shape.n_kv_heads + head) * step.fresh_capacity + (index - before);
    for (int32_t d = 0; d < shape.head_dim; d++) {
      row[d] = load_float(fresh.host(), shape.tail, at * shape.head_dim + d);
    }
    return row;
  }

  // Tokens up to row r's own, those dropped aside.
  int32_t tokens_of(int32_t r) const {
    const SequenceStep& step = const_cast<RandomCache&>(cache).step();
    return cache.kv_len() + step.pos0 - step.fresh_pos0 + r;
  }
  int32_t position(int32_t token) const {
    const int32_t in_call = token - (cache.kv_len() - 1);
    const SequenceStep& step = const_cast<RandomCache&>(cache).step();
    return in_call < 0 ? cache.position(token) : step.fresh_pos0 + in_call;
  }

  // Attention of row r of the chunk, all heads. q: its queries. window: tokens it sees, 0: all.
  std::vector<double> attend(int32_t r, const float* q, int32_t skip = -1,
                             int32_t window = 0) const {
    const CacheShape& shape = cache.shape();
    const int32_t sees = tokens_of(r);
    const int32_t newest = position(sees - 1);
    std::vector<double> out(size_t{1} * shape.n_kv_heads * shape.n_queries * shape.head_dim);
    for (int32_t head = 0; head < shape.n_kv_heads; head++) {
      for (int32_t i = 0; i < shape.n_queries; i++) {
        const int64_t at = (int64_t{head} * shape.n_queries + i) * shape.head_dim;
        double sum = 0;
        for (int32_t t = 0; t < sees; t++) {
          if (t == skip || (window > 0 && position(t) <= newest - window)) continue;
          const std::vector<float> k = token(head, true, t), v = token(head, false, t);
          double score = 0;
          for (int32_t d = 0; d < shape.head_dim; d++) score += double{q[at + d]} * k[d];
          const double p = std::exp(score / std::sqrt(double(shape.head_dim)));
          sum += p;
          for (int32_t d = 0; d < shape.head_dim; d++) out[at + d] += p * v[d];
        }
        for (int32_t d = 0; d < shape.head_dim; d++) out[at + d] /= sum;
      }
    }
    return out;
  }

  RandomCache cache;
  DeviceMemory fresh;
};

// Two sequences: a chunk of `n_rows` rows in the middle of `fresh_tokens` tokens after n_blocks
// blocks and 9 dense tokens, and a prompt of 3 rows.
struct Chunk {
  int32_t n_blocks = 2, fresh_tokens = 40, first_row = 13, n_rows = 21;
  int32_t window = 0, n_sinks = 0, dropped_blocks = 0;
};

// By the tensor-core kernel where there is one for the shape, which must then take it.
void check_prefill(const CacheShape& shape, const Chunk& chunk = {}) {
  const bool fast = (shape.head_dim == 64 || shape.head_dim == 128) && shape.tail != DType::kF32;
  Sequence a(shape, chunk.n_blocks, 9, chunk.fresh_tokens, chunk.first_row, chunk.n_rows, 1,
             chunk.n_sinks, chunk.dropped_blocks);
  Sequence b(shape, 0, 0, 3, 0, 3, 2);
  std::vector<std::unique_ptr<DeviceCache>> copies;
  std::vector<SequenceView> sequences;
  int32_t rows = 0;
  for (Sequence* s : {&a, &b}) {
    s->cache.step().row0 = rows;
    rows += s->cache.step().n_rows;
    copies.push_back(std::make_unique<DeviceCache>(s->cache));
    sequences.push_back(copies.back()->view());
  }
  const int64_t width = int64_t{shape.n_kv_heads} * shape.n_queries * shape.head_dim;
  const std::vector<float> q = random_queries(rows * width, 5);
  AttentionArgs args;
  const DeviceArray<SequenceView> views(sequences, "the sequences");
  args.sequences = views.device();
  args.n_sequences = 2;
  args.n_rows = rows;
  args.max_row_count = std::max(chunk.n_rows, 3);
  args.layout = a.cache.layout();
  args.tail_dtype = shape.tail;
  args.n_kv_heads = shape.n_kv_heads;
  args.n_heads = shape.n_kv_heads * shape.n_queries;
  args.head_dim = shape.head_dim;
  args.decode = false;
  args.window = chunk.window;
  const DeviceArray<float> queries(q, "the queries");
  DeviceArray<float> partials(int64_t{rows} * args.n_heads * (shape.head_dim + 2), "the partials");
  DeviceArray<float> out(rows * width, "the output");
  args.q = queries.device();
  args.partials = partials.device();
  args.out = out.device();
  set_schedule(4);
  if (fast) {
    ASSERT_TRUE(prefill_attention_fast(args, nullptr));
  } else {
    attention_plain(args, nullptr);
  }
  combine_attention(args, nullptr);
  partials.download();
  out.download();
  double bound = testing::nmse_bound(shape.tail, shape.values);
  if (shape.values == DType::kCoded) {  // values of many sizes: a dropped token is noticed less
    bound = shape.tail == DType::kF32   ? 1e-10
            : shape.tail == DType::kF16 ? 2e-6
            : chunk.window > 0          ? 1.2e-5
                                        : 9e-6;
  }
  for (Sequence* s : {&a, &b}) {
    const SequenceStep& step = s->cache.step();
    for (int64_t i = 0; i < step.n_rows * width; i++) {
      ASSERT_TRUE(std::isfinite(out.host()[step.row0 * width + i])) << "row " << i / width;
    }
    const int32_t stride = std::max(1, step.n_rows / 40);  // of the longest not every row
    for (int32_t r = 0; r < step.n_rows; r += r + stride < step.n_rows ? stride : 1) {
      const float* row_q = q.data() + (step.row0 + r) * width;
      const float* row_out = out.host() + (step.row0 + r) * width;
      const int32_t window = chunk.window;
      const double error = testing::nmse(s->attend(r, row_q, -1, window), row_out);
      ASSERT_LE(error, bound) << "row " << r;
      if (r % 10 != 0 || s != &a) continue;
      if (window == 0) {
        EXPECT_GT(testing::nmse(s->attend(r, row_q, std::min(70, step.pos0)), row_out), bound)
            << "a token dropped";
        EXPECT_GT(testing::nmse(s->attend(r, row_q, s->tokens_of(r) - 1), row_out), bound);
      } else if (window > 1 && window <= step.pos0 + r) {
        EXPECT_GT(testing::nmse(s->attend(r, row_q, -1, window - 1), row_out), 2 * error)
            << "a token less, row " << r;
      }
    }
  }
  if (!fast) return;

  // What the kernel writes out itself is what combine makes of its partials, with the dims of
  // values stored in groups put back.
  sequences[0].transform.v_groups = shape.head_dim / 16;
  const DeviceArray<SequenceView> grouped(sequences, "the sequences");
  DeviceArray<float> whole(rows * width, "the output written at once");
  args.sequences = grouped.device();
  combine_attention(args, nullptr);
  out.download();
  args.writes_out = true;
  args.partials = nullptr;
  args.out = whole.device();
  ASSERT_TRUE(prefill_attention_fast(args, nullptr));
  whole.download();
  for (int64_t i = 0; i < rows * width; i++) {
    const float expected = out.host()[i];
    ASSERT_NEAR(whole.host()[i], expected, 1e-6f * std::max(1.0f, std::abs(expected))) << i;
  }
}

using Case = std::tuple<DType, DType, int32_t, int32_t>;  // tail, values, head_dim, queries
class PrefillTest : public ::testing::TestWithParam<Case> {};

TEST_P(PrefillTest, EqualsCausalAttentionOverTheDequantisedRows) {
  CacheShape shape;
  std::tie(shape.tail, shape.values, shape.head_dim, shape.n_queries) = GetParam();
  check_prefill(shape);
}

std::string name_of_case(const ::testing::TestParamInfo<Case>& info) {
  const auto& [tail, values, head_dim, queries] = info.param;
  return std::string(dtype_name(tail)) + "_" + dtype_name(values) + "_" + std::to_string(head_dim) +
         "x" + std::to_string(queries);
}

constexpr DType kF32 = DType::kF32, kF16 = DType::kF16, kBF16 = DType::kBF16;
INSTANTIATE_TEST_SUITE_P(
    Shapes, PrefillTest,
    ::testing::Values(Case{kF16, kF16, 64, 2}, Case{kBF16, DType::kInt8, 64, 3},
                      Case{kBF16, kBF16, 128, 4}, Case{kF16, DType::kInt4, 128, 1},
                      Case{kF32, kF32, 64, 2}, Case{kF32, kF32, 8, 2}, Case{kBF16, kBF16, 80, 3},
                      Case{kF16, DType::kInt8, 256, 1}),
    name_of_case);

// Every kernel over every kind of prefix; the harness takes every eleventh, in CI beside those
// above.
using Variant = std::tuple<Case, double, double, bool>;  // K and V sparsity, group pattern
class EveryPrefillTest : public ::testing::TestWithParam<Variant> {};

CacheShape shape_of(const Variant& variant) {
  CacheShape shape;
  std::tie(shape.tail, shape.values, shape.head_dim, shape.n_queries) = std::get<0>(variant);
  shape.k_sparsity = std::get<1>(variant);
  shape.v_sparsity = std::get<2>(variant);
  shape.group_pattern = std::get<3>(variant);
  return shape;
}

TEST_P(EveryPrefillTest, EqualsCausalAttentionOverTheDequantisedRows) {
  check_prefill(shape_of(GetParam()));
}

std::vector<Variant> every_variant() {
  std::vector<Variant> variants;
  int n = 0;
  for (const DType tail : {kF16, kBF16}) {
    for (const DType values : {tail, DType::kInt8, DType::kInt4}) {
      for (const int32_t head_dim : {64, 128}) {
        for (const int32_t queries : {1, 4, 8}) {
          const Case c{tail, values, head_dim, queries};
          for (const Variant& variant : {Variant{c, 0, 0, true}, Variant{c, 0.625, 0.75, true},
                                         Variant{c, 0.7, 0.7, false}}) {
            if (kOnDevice || n++ % 11 == 7) variants.push_back(variant);
          }
        }
      }
    }
  }
  return variants;
}

std::string name_of_variant(const ::testing::TestParamInfo<Variant>& info) {
  const CacheShape shape = shape_of(info.param);
  return std::string(dtype_name(shape.tail)) + "_" + dtype_name(shape.values) + "_" +
         (!shape.group_pattern      ? "row"
          : shape.k_sparsity == 0.0 ? "dense"
                                    : "first") +
         "_" + std::to_string(shape.head_dim) + "x" + std::to_string(shape.n_queries);
}

INSTANTIATE_TEST_SUITE_P(Variants, EveryPrefillTest, ::testing::ValuesIn(every_variant()),
                         name_of_variant);

// Many tiles of rows and of tokens.
class LongPrefillTest : public ::testing::TestWithParam<Variant> {};

TEST_P(LongPrefillTest, EqualsCausalAttentionOverTheDequantisedRows) {
  CacheShape shape = shape_of(GetParam());
  if (kOnDevice) {
    check_prefill(shape, {5, 300, 64, 230});
    check_prefill(shape, {0, 257, 0, 257});
    check_prefill(shape, {16, 65, 0, 65});
  } else {
    shape.n_kv_heads = 1;
    check_prefill(shape, {3, 100, 20, 70});
  }
}

INSTANTIATE_TEST_SUITE_P(Types, LongPrefillTest,
                         ::testing::Values(Variant{Case{kF16, kF16, 128, 4}, 0.625, 0.75, true},
                                           Variant{Case{kBF16, kBF16, 128, 2}, 0, 0, true},
                                           Variant{Case{kBF16, DType::kInt8, 128, 2}, 0.625, 0.75,
                                                   true},
                                           Variant{Case{kF16, DType::kInt4, 64, 3}, 0.5, 0.5, true},
                                           Variant{Case{kBF16, kBF16, 64, 2}, 0.7, 0.7, false},
                                           Variant{Case{kBF16, kBF16, 80, 2}, 0.5, 0.5, true}),
                         name_of_variant);

// Slots that come to shared memory in ways of their own.
INSTANTIATE_TEST_SUITE_P(
    Prefixes, LongPrefillTest,
    ::testing::Values(Variant{Case{kF16, kF16, 64, 3}, 0, 0.75, true},  // one kind dense
                      Variant{Case{kBF16, DType::kInt8, 128, 1}, 0.625, 0, true},
                      Variant{Case{kBF16, kBF16, 128, 8}, 0.5, 0.5, true},
                      Variant{Case{kBF16, kBF16, 128, 1}, 0.02, 0.02, true},  // too large to stage
                      Variant{Case{kF16, kF32, 64, 2}, 0.5, 0.5, true},       // of a third type
                      Variant{Case{kBF16, kF16, 128, 3}, 0.625, 0.75, true}),
    [](const auto& info) { return name_of_variant(info) + "_" + std::to_string(info.index); });

// Windows that begin in the store, in the dense buffer, behind sinks or among them, in the call's
// own tokens: inside a tile and at its edge. Rows begin at position 64 * (3 + n_blocks) + 9 +
// first_row.
void check_windows(const CacheShape& shape) {
  for (const int32_t window : {1, 7, 22, 31, 64, 95, 140, 1000}) {
    SCOPED_TRACE("window " + std::to_string(window));
    check_prefill(shape, {3, 60, 15, 45, window, 4, window < 150 ? 3 : 0});
  }
  SCOPED_TRACE("no store");
  check_prefill(shape, {0, 150, 0, 150, 20, 5, 0});
}

class WindowPrefillTest : public ::testing::TestWithParam<Variant> {};

TEST_P(WindowPrefillTest, EqualsCausalAttentionToWhatTheWindowSees) {
  CacheShape shape = shape_of(GetParam());
  shape.n_kv_heads = kOnDevice ? 2 : 1;
  check_windows(shape);
}

INSTANTIATE_TEST_SUITE_P(
    Types, WindowPrefillTest,
    ::testing::Values(Variant{Case{kF16, kF16, 64, 2}, 0.5, 0.5, true},
                      Variant{Case{kBF16, kBF16, 128, 1}, 0, 0, true},
                      Variant{Case{kBF16, DType::kInt8, 64, 5}, 0.625, 0.75, true},
                      Variant{Case{kF16, DType::kInt4, 128, 1}, 0, 0, true},
                      Variant{Case{kF32, kF32, 24, 3}, 0.5, 0.5, true},
                      Variant{Case{kBF16, DType::kInt8, 80, 1}, 0.7, 0.7, false}),
    name_of_variant);

TEST(Prefill, WindowsOverCodedAndRaggedRows) {
  CacheShape shape;
  shape.n_kv_heads = 1;
  shape.values = DType::kCoded;
  shape.tail = kBF16;
  shape.head_dim = 64;
  check_windows(shape);
  shape.tail = kF32;
  shape.head_dim = 24;
  check_windows(shape);
  shape.tail = shape.values = kF16;
  shape.head_dim = 64;
  shape.ragged = true;
  check_windows(shape);
}

TEST(Prefill, CodedRows) {
  CacheShape shape;
  shape.values = DType::kCoded;
  for (const DType tail : {kF16, kBF16}) {
    for (const int32_t head_dim : {64, 128}) {
      shape.tail = tail;
      shape.head_dim = head_dim;
      shape.k_bits = head_dim == 64 ? 3.0 : 4.3;
      check_prefill(shape);
    }
  }
  shape.n_queries = 1;
  shape.k_bits = shape.v_bits = 7.0;
  check_prefill(shape);
  shape.tail = kF32;
  shape.head_dim = 24;
  check_prefill(shape);
}

TEST(Prefill, RaggedSlots) {
  CacheShape shape;
  shape.ragged = true;
  shape.tail = kBF16;
  shape.values = DType::kInt4;
  shape.head_dim = 64;
  check_prefill(shape);
  shape.head_dim = 128;
  shape.n_queries = 1;
  check_prefill(shape);
  shape.tail = shape.values = kF32;
  shape.head_dim = 24;
  check_prefill(shape);
}

}  // namespace
}  // namespace mustafar::cuda
