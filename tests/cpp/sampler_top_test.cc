// Sampling from the largest logits alone: the same tokens as from the whole row.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "runtime/sampler.h"
#include "runtime/top_select.h"

namespace mustafar {
namespace {

constexpr int64_t kVocab = 3000;

std::vector<float> random_row(std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, 2.0f);
  std::vector<float> row(kVocab);
  for (float& x : row) x = std::round(4 * normal(random)) / 4;  // many ties
  return row;
}

TopLogits top_of(const std::vector<float>& row, int32_t k) {
  TopLogits top;
  top_select(row, k, top.ids);
  for (const int32_t id : top.ids) top.values.push_back(row[id]);
  for (const float x : row) top.exp_sum += std::exp(double{x} - top.values[0]);
  top.regular = true;
  return top;
}

SamplingParams params_of(double temperature, int32_t top_k, double top_p, double min_p) {
  SamplingParams params;
  params.temperature = temperature;
  params.top_k = top_k;
  params.top_p = top_p;
  params.min_p = min_p;
  params.seed = 11;
  params.logprobs = 3;
  return params;
}

TEST(SamplerTopTest, ChoosesTheSameTokens) {
  for (const SamplingParams& params :
       {params_of(0.0, 40, 0.95, 0.05), params_of(0.0, 0, 1.0, 0.0), params_of(0.8, 40, 0.95, 0.05),
        params_of(1.5, 7, 1.0, 0.0), params_of(1.0, 500, 0.5, 0.0), params_of(1.0, 1, 0.9, 0.3)}) {
    Sampler whole(kVocab, params, {}), top(kVocab, params, {});
    const int32_t needed = top.top_needed(0);
    EXPECT_EQ(needed, std::max(params.temperature == 0 ? 1 : *params.top_k, 3));
    std::mt19937 random(5);
    for (int i = 0; i < 50; i++) {
      const std::vector<float> row = random_row(random);
      const TokenLogprob a = whole.sample(row, {}, 0);
      const TokenLogprob b = top.sample(top_of(row, needed + i % 3));  // more does no harm
      ASSERT_EQ(a.token_id, b.token_id) << "draw " << i << ", top_k " << *params.top_k;
      EXPECT_NEAR(a.logprob, b.logprob, 1e-5);
      ASSERT_EQ(a.top.size(), b.top.size());
      for (size_t j = 0; j < a.top.size(); j++) EXPECT_EQ(a.top[j].first, b.top[j].first);
    }
  }
}

TEST(SamplerTopTest, KnowsWhenItNeedsTheWholeRow) {
  const auto needed = [](auto&& change, int64_t n_generated = 0) {
    SamplingParams params = params_of(0.8, 40, 0.95, 0.05);
    change(params);
    const std::vector<int32_t> end_ids = {2};
    return Sampler(kVocab, params, end_ids).top_needed(n_generated);
  };
  EXPECT_EQ(needed([](SamplingParams&) {}), 40);
  EXPECT_EQ(needed([](SamplingParams& p) { p.logprobs = 60; }), 60);
  EXPECT_EQ(needed([](SamplingParams& p) { p.top_k = 0; }), 0);
  EXPECT_EQ(needed([](SamplingParams& p) { p.top_k = kVocab; }), 0);
  EXPECT_EQ(needed([](SamplingParams& p) { p.repetition_penalty = 1.1; }), 0);
  EXPECT_EQ(needed([](SamplingParams& p) { p.frequency_penalty = 0.1; }), 0);
  EXPECT_EQ(needed([](SamplingParams& p) { p.logit_bias = {{1, 1.0f}}; }), 0);
  EXPECT_EQ(needed([](SamplingParams& p) {
              p.logits_processor = [](std::span<const int32_t>, std::span<float>) {};
            }),
            0);
  EXPECT_EQ(needed([](SamplingParams& p) { p.min_new_tokens = 3; }, 2), 0);
  EXPECT_EQ(needed([](SamplingParams& p) { p.min_new_tokens = 3; }, 3), 40);
}

}  // namespace
}  // namespace mustafar
