// A million tokens of context, made of a few blocks over and over: positions, addresses and sums
// hold there, too.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "backend/cpu/attention/decode.h"
#include "support/kv_test_util.h"
#include "support/random_model.h"

namespace mustafar {
namespace {

using testing::CacheShape;
using testing::RandomCache;

constexpr int32_t kMillion = 1 << 20;  // tokens

struct Types {
  DType tail, values;
  double sparsity;
};

class LongContextTest : public ::testing::TestWithParam<Types> {};

TEST_P(LongContextTest, AttendsToAMillionTokens) {
  const Types& types = GetParam();
  CacheShape shape;
  shape.n_kv_heads = 1;
  shape.n_queries = 4;
  shape.tail = types.tail;
  shape.values = types.values;
  shape.k_sparsity = shape.v_sparsity = types.sparsity;
  RandomCache cache(shape, /*n_blocks=*/3, /*dense_tokens=*/40, /*seed=*/5);
  cache.repeat_blocks(kMillion / kBlockTokens);
  // Large queries: a few hundred of the tokens have nearly all of the weight.
  std::vector<float> q(int64_t{shape.n_queries} * shape.head_dim);
  std::mt19937 random(7);
  for (float& x : q) x = 3.0f * testing::random_normal(random);
  const std::vector<double> expected = cache.attend(0, q.data());

  DecodeAttentionArgs args;
  args.n_kv_heads = shape.n_kv_heads;
  args.n_heads = shape.n_queries;
  args.head_dim = shape.head_dim;
  args.tail_dtype = shape.tail;
  args.sequences = {&cache.step(), 1};
  args.q = q.data();
  for (const Isa isa : available_isas()) {
    std::vector<float> out(q.size(), NAN);
    args.out = out.data();
    HostBuffer scratch(1 << 21);
    ThreadPool pool(2);
    for (const bool fine : {true, false}) {
      args.fine = fine;
      decode_attention(pool, isa, args, scratch);
      EXPECT_LE(testing::nmse(expected, out.data()),
                fine ? testing::nmse_bound(types.tail, types.values) : testing::kCoarseBound)
          << isa_name(isa);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, LongContextTest,
                         ::testing::Values(Types{DType::kF32, DType::kF32, 0.5},
                                           Types{DType::kBF16, DType::kInt8, 0.7},
                                           Types{DType::kF16, DType::kInt4, 0.0},
                                           Types{DType::kBF16, DType::kCoded, 0.0}),
                         [](const auto& info) {
                           return std::string(dtype_name(info.param.tail)) + "_" +
                                  dtype_name(info.param.values);
                         });

// Logits of some tokens that follow a sequence of about `length` tokens, whose store is the one of
// a prompt over and over. A block leaves the window with the third of them.
std::vector<float> logits_behind(const Model& model, const KVConfig& kv, int64_t length) {
  Model::Impl& engine = *model.impl();
  const auto spec = engine.cache_spec(kv);
  int64_t n_prompt = 500;
  while (spec->compressed(n_prompt + 3) == spec->compressed(n_prompt + 2)) n_prompt++;
  const std::vector<int32_t> prompt = testing::ids_of(n_prompt);
  SequenceCache cache = engine.new_cache(spec, length);
  ForwardBuffers buffers(*engine.backend);
  Prefill prefill(*engine.llama, cache, prompt, buffers);
  while (prefill.step([](int64_t, int64_t) {})) {
  }
  prefill.finish();

  const std::vector<PageRef> some = cache.pages();
  const int64_t n_blocks = length / kBlockTokens - 2;  // the dense tail comes on top
  std::vector<PageRef> pages;
  for (int64_t b = 0; b < n_blocks; b++) pages.push_back(some[b % some.size()]);
  const int64_t dense_tokens = cache.length() - cache.compressed();
  SequenceCache longer = engine.new_cache(spec, length);
  longer.restore(std::move(pages), /*dropped_blocks=*/0, n_blocks * kBlockTokens + dense_tokens,
                 cache.download_dense().data(), cache.download_query_magnitude().data());
  EXPECT_EQ(spec->compressed(longer.length()), longer.compressed());

  std::vector<float> all, row(model.config().vocab_size);
  for (const int32_t token : testing::ids_of(4, /*seed=*/3)) {
    SequenceCache* const caches[] = {&longer};
    engine.llama->decode(caches, {&token, 1}, row.data(), buffers);
    all.insert(all.end(), row.begin(), row.end());
  }
  EXPECT_EQ(longer.compressed(), (n_blocks + 1) * kBlockTokens);
  return all;
}

// Every step of a decode, as the plain kernels do it.
TEST(LongContextModelTest, DecodesBehindAMillionTokens) {
  ModelConfig config = testing::small_config({.max_position_embeddings = 2 * kMillion});
  const char* const before = std::getenv("MUSTAFAR_ISA");
  const std::string kept = before == nullptr ? "" : before;
  const auto logits = [&](const char* isa, const KVConfig& kv) {
    setenv("MUSTAFAR_ISA", isa, 1);
    const Model model = testing::random_model(config, "cpu", /*threads=*/2, DType::kF32);
    return logits_behind(model, kv, kMillion);
  };
  for (const KVConfig& kv : {testing::half(), find_kv_preset("dense").config}) {
    const std::vector<float> plain = logits("scalar", kv);
    const std::vector<double> expected(plain.begin(), plain.end());
    const std::vector<float> fast = logits(isa_name(available_isas().back()), kv);
    EXPECT_LE(testing::nmse(expected, fast.data()), 1e-9);
  }
  before == nullptr ? unsetenv("MUSTAFAR_ISA") : setenv("MUSTAFAR_ISA", kept.c_str(), 1);
}

}  // namespace
}  // namespace mustafar
