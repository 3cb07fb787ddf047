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
struct Sequence {
  Sequence(const CacheShape& shape, int32_t n_blocks, int32_t dense_tokens, int32_t fresh_tokens,
           int32_t first_row, int32_t n_rows, uint32_t seed)
      : cache(shape, n_blocks, dense_tokens, seed),
        fresh(dtype_bytes(shape.tail,
                          int64_t{2} * shape.n_kv_heads * fresh_tokens * shape.head_dim),
              "the fresh tokens") {
    std::mt19937 random(seed);
    const int64_t n = int64_t{2} * shape.n_kv_heads * fresh_tokens * shape.head_dim;
    for (int64_t i = 0; i < n; i++) {
      store_float(fresh.host(), shape.tail, i, testing::random_normal(random));
    }
    fresh.upload();
    SequenceStep& step = cache.step();
    step.n_rows = n_rows;
    step.fresh = fresh.device();
    step.fresh_capacity = fresh_tokens;
    step.fresh_pos0 = n_blocks * kBlockTokens + dense_tokens;
    step.pos0 = step.fresh_pos0 + first_row;
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

  // Attention of row r of the chunk, all heads. q: its queries.
  std::vector<double> attend(int32_t r, const float* q, int32_t skip = -1) const {
    const CacheShape& shape = cache.shape();
    const SequenceStep& step = const_cast<RandomCache&>(cache).step();
    const int32_t sees = step.pos0 + r + 1;  // positions count every cached token here
    std::vector<double> out(size_t{1} * shape.n_kv_heads * shape.n_queries * shape.head_dim);
    for (int32_t head = 0; head < shape.n_kv_heads; head++) {
      for (int32_t i = 0; i < shape.n_queries; i++) {
        const int64_t at = (int64_t{head} * shape.n_queries + i) * shape.head_dim;
        double sum = 0;
        for (int32_t t = 0; t < sees; t++) {
          if (t == skip) continue;
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

void check_prefill(const CacheShape& shape, bool fast) {
  Sequence a(shape, 2, 9, 40, 13, 21, 1), b(shape, 0, 0, 3, 0, 3, 2);
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
  args.max_row_count = 21;
  args.layout = a.cache.layout();
  args.tail_dtype = shape.tail;
  args.n_kv_heads = shape.n_kv_heads;
  args.n_heads = shape.n_kv_heads * shape.n_queries;
  args.head_dim = shape.head_dim;
  args.decode = false;
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
  const double bound = testing::nmse_bound(shape.tail, shape.values);
  for (Sequence* s : {&a, &b}) {
    const SequenceStep& step = s->cache.step();
    for (int32_t r = 0; r < step.n_rows; r++) {
      const float* row_q = q.data() + (step.row0 + r) * width;
      const float* row_out = out.host() + (step.row0 + r) * width;
      ASSERT_LE(testing::nmse(s->attend(r, row_q), row_out), bound) << "row " << r;
      if (r % 10 == 0 && s == &a) {
        EXPECT_GT(testing::nmse(s->attend(r, row_q, 70), row_out), bound) << "a token dropped";
        EXPECT_GT(testing::nmse(s->attend(r, row_q, step.pos0 + r), row_out), bound);
      }
    }
  }
}

using Case = std::tuple<DType, DType, int32_t, int32_t>;  // tail, values, head_dim, queries
class PrefillTest : public ::testing::TestWithParam<Case> {};

TEST_P(PrefillTest, EqualsCausalAttentionOverTheDequantisedRows) {
  CacheShape shape;
  std::tie(shape.tail, shape.values, shape.head_dim, shape.n_queries) = GetParam();
  check_prefill(shape, shape.head_dim % 64 == 0 && shape.tail != DType::kF32);
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
                      Case{kF32, kF32, 64, 2}, Case{kF32, kF32, 8, 2}, Case{kBF16, kBF16, 80, 3}),
    name_of_case);

TEST(Prefill, RaggedSlots) {
  CacheShape shape;
  shape.ragged = true;
  shape.tail = kBF16;
  shape.values = DType::kInt4;
  shape.head_dim = 64;
  check_prefill(shape, true);
  shape.tail = shape.values = kF32;
  shape.head_dim = 24;
  check_prefill(shape, false);
}

}  // namespace
}  // namespace mustafar::cuda
