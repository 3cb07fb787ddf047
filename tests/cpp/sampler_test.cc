#include "runtime/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "mustafar/error.h"
#include "runtime/portable_math.h"
#include "runtime/top_select.h"

namespace mustafar {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
using Floats = std::vector<float>;
using Ids = std::vector<int32_t>;

// Everything off, seed 1.
SamplingParams plain() {
  SamplingParams params;
  params.temperature = 1.0;
  params.top_k = 0;
  params.top_p = 1.0;
  params.min_p = 0.0;
  params.seed = 1;
  return params;
}

std::vector<int64_t> draw_counts(const Floats& logits, const SamplingParams& params, int64_t n,
                                 const Ids& history = {}, int64_t n_generated = 0) {
  Sampler sampler(static_cast<int64_t>(logits.size()), params, {});
  std::vector<int64_t> counts(logits.size());
  for (int64_t i = 0; i < n; i++) counts[sampler.sample(logits, history, n_generated).token_id]++;
  return counts;
}

// Pearson's statistic over its 99.99 % quantile (Wilson-Hilferty): above 1 is a wrong distribution.
// Tokens of probability 0 must not occur.
double chi_square_ratio(const std::vector<int64_t>& counts, const std::vector<double>& p) {
  const double n = static_cast<double>(std::accumulate(counts.begin(), counts.end(), int64_t{0}));
  double statistic = 0;
  int degrees = -1;
  for (size_t i = 0; i < p.size(); i++) {
    if (p[i] == 0) {
      if (counts[i] != 0) return INFINITY;
      continue;
    }
    statistic += (counts[i] - n * p[i]) * (counts[i] - n * p[i]) / (n * p[i]);
    degrees++;
  }
  if (degrees == 0) return 0;
  const double k = degrees;
  const double quantile = k * std::pow(1 - 2 / (9 * k) + 3.719 * std::sqrt(2 / (9 * k)), 3);
  return statistic / quantile;
}

// The definition, by sorting everything: what the sampler must draw from.
std::vector<double> exact_distribution(const Floats& logits, const SamplingParams& params) {
  const size_t n = logits.size();
  Ids order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  std::vector<double> p(n);
  double total = 0;
  for (size_t i = 0; i < n; i++) {
    const bool cut = *params.top_k > 0 && i >= static_cast<size_t>(*params.top_k);
    p[i] = cut ? 0 : std::exp((logits[order[i]] - logits[order[0]]) / *params.temperature);
    total += p[i];
  }
  double sum = 0;
  double kept = 0;
  bool past = false;
  for (size_t i = 0; i < n; i++) {
    if (past || p[i] < *params.min_p) {
      p[i] = 0;
      continue;
    }
    sum += p[i];
    past = *params.top_p < 1 && sum >= *params.top_p * total;
    kept += p[i];
  }
  std::vector<double> out(n);
  for (size_t i = 0; i < n; i++) out[order[i]] = p[i] / kept;
  return out;
}

TEST(PortableMathTest, ExpIsAccurate) {
  double worst = 0;
  for (double x = 0; x > -708; x -= 0.00713) {
    worst = std::max(worst, std::fabs(portable_exp(x) / std::exp(x) - 1));
  }
  EXPECT_LT(worst, 1e-15);
  EXPECT_EQ(portable_exp(0.0), 1.0);
  EXPECT_EQ(portable_exp(-709.0), 0.0);
  EXPECT_EQ(portable_exp(kLeastExponent), 0.0);
}

TEST(PortableMathTest, SinglePrecisionExpIsAccurate) {
  double worst = 0;
  for (float x = 0; x > -86; x -= 0.00713f) {
    worst = std::max(worst, std::fabs(double{portable_expf(x)} / std::exp(double{x}) - 1));
  }
  EXPECT_LT(worst, 3e-7);
  EXPECT_EQ(portable_expf(0.0f), 1.0f);
  EXPECT_EQ(portable_expf(kLeastExponentF), 0.0f);
}

// Bits that every machine must reproduce, from an implementation in Python.
TEST(PortableMathTest, ExpHasTheSameBitsEverywhere) {
  uint64_t hash = 0;
  for (int i = 0; i < 4000; i++) {
    const double y = portable_exp(std::max(-i * 0.171875, kLeastExponent));
    uint64_t bits;
    std::memcpy(&bits, &y, sizeof(bits));
    hash = hash * 6364136223846793005u + bits;
  }
  EXPECT_EQ(hash, 0x1dfb71a9d793d860u);
}

// The first is Random123's known answer; the others come from an independent implementation.
TEST(PortableMathTest, PhiloxKnownAnswers) {
  EXPECT_EQ(philox(0, 0), 0xe169c58d6627e8d5u);
  EXPECT_EQ(philox(42, 1), 0x53ba6cfdfcdb2127u);
  EXPECT_EQ(philox(0xffffffffffffffffu, 0x200000005u), 0xf364313e9ca21545u);
}

TEST(TopSelectTest, AgreesWithASort) {
  std::mt19937 random(3);
  for (int round = 0; round < 400; round++) {
    const size_t n = 1 + random() % (round % 2 == 0 ? 50 : 5000);
    Floats values(n);
    for (float& value : values) {
      switch (round % 4) {
        case 0:
          value = static_cast<float>(static_cast<int>(random() % 7) - 3);
          break;  // many ties
        case 1:
          value = std::normal_distribution<float>(0, 10)(random);
          break;
        case 2:
          value = random() % 3 == 0 ? -kInf : -0.0f;
          break;
        default:
          value = static_cast<float>(&value - values.data());
          break;  // ascending
      }
    }
    const int64_t k = static_cast<int64_t>(random() % (n + 2));
    Ids expected(n);
    std::iota(expected.begin(), expected.end(), 0);
    std::stable_sort(expected.begin(), expected.end(),
                     [&](int32_t a, int32_t b) { return values[a] > values[b]; });
    expected.resize(std::min<size_t>(k, n));
    Ids got;
    top_select(values, k, got);
    ASSERT_EQ(got, expected) << "round " << round << " n " << n << " k " << k;
  }
}

TEST(SamplerTest, GreedyTakesTheLargestAndOfTiesTheLowest) {
  SamplingParams params = plain();
  params.temperature = 0;
  Sampler sampler(5, params, {});
  EXPECT_EQ(sampler.sample(Floats{0, 3, 1, 3, -kInf}, {}, 0).token_id, 1);
  EXPECT_EQ(sampler.sample(Floats{-0.0f, 0.0f, -1, -2, -3}, {}, 0).token_id, 0);
  Floats wide(1000, -5.0f);
  wide[999] = -4.5f;
  EXPECT_EQ(Sampler(1000, params, {}).sample(wide, {}, 0).token_id, 999);
}

TEST(SamplerTest, DrawsTheSoftmax) {
  const Floats logits = {1.0f, 0.0f, -1.0f, 2.5f, -kInf, 0.25f, 2.5f};
  for (const double temperature : {0.5, 1.0, 3.0}) {
    SamplingParams params = plain();
    params.temperature = temperature;
    const auto counts = draw_counts(logits, params, 40000);
    EXPECT_LT(chi_square_ratio(counts, exact_distribution(logits, params)), 1.0) << temperature;
  }
}

TEST(SamplerTest, AWrongDistributionFailsTheTestOfDistributions) {
  const Floats logits = {1.0f, 0.0f, -1.0f, 2.5f};
  SamplingParams params = plain();
  const auto counts = draw_counts(logits, params, 40000);
  params.temperature = 1.05;
  EXPECT_GT(chi_square_ratio(counts, exact_distribution(logits, params)), 1.0);
}

TEST(SamplerTest, CutsByTopKTopPAndMinPInThatOrder) {
  std::mt19937 random(11);
  Floats logits(300);
  for (float& logit : logits) logit = std::normal_distribution<float>(0, 1)(random);
  for (int64_t i = 0; i < 20; i++) logits[i * 7] = 2.0f;  // ties at the cut
  struct Case {
    int32_t top_k;
    double top_p, min_p;
  };
  for (const Case c : {Case{5, 1, 0}, Case{0, 0.5, 0}, Case{0, 0.97, 0}, Case{0, 1, 0.2},
                       Case{30, 0.6, 0}, Case{30, 0.9, 0.3}, Case{1000000, 0.8, 0.05},
                       Case{299, 0.999, 0}, Case{1, 0.5, 0.5}, Case{0, 0, 0}, Case{10, 1, 1}}) {
    SamplingParams params = plain();
    params.temperature = 0.9;
    params.top_k = c.top_k;
    params.top_p = c.top_p;
    params.min_p = c.min_p;
    const auto counts = draw_counts(logits, params, 4000);
    EXPECT_LT(chi_square_ratio(counts, exact_distribution(logits, params)), 1.0)
        << c.top_k << " " << c.top_p << " " << c.min_p;
  }
}

// numpy: p = softmax([2, 1, 0.5, -1, 0, 3]); top_k 4 leaves 5, 0, 1, 2, of which top_p 0.8
// (relative to their sum) keeps 5 and 0.
TEST(SamplerTest, TopPIsAShareOfWhatTopKLeft) {
  SamplingParams params = plain();
  params.top_k = 4;
  params.top_p = 0.8;
  const auto counts = draw_counts({2, 1, 0.5f, -1, 0, 3}, params, 2000);
  EXPECT_EQ(counts[1] + counts[2] + counts[3] + counts[4], 0);
  EXPECT_NEAR(counts[5] / 2000.0, std::exp(1) / (std::exp(1) + 1), 0.05);
}

// The tokens come from an implementation in Python.
TEST(SamplerTest, SameSeedSameTokensOnAnyMachine) {
  Floats logits(100);
  for (int i = 0; i < 100; i++) logits[i] = static_cast<float>(i * 37 % 101) / 16.0f;
  SamplingParams params = plain();
  params.temperature = 0.8;
  params.top_k = 40;
  params.top_p = 0.95;
  params.min_p = 0.05;
  params.seed = 1234;
  Sampler a(100, params, {});
  Sampler b(100, params, {});
  Ids tokens;
  for (int i = 0; i < 12; i++) {
    tokens.push_back(a.sample(logits, {}, 0).token_id);
    EXPECT_EQ(b.sample(logits, {}, 0).token_id, tokens.back());
  }
  EXPECT_EQ(tokens, (Ids{95, 60, 92, 60, 13, 90, 57, 8, 90, 30, 27, 90}));
  params.seed = 1235;
  Sampler other(100, params, {});
  Ids others;
  for (int i = 0; i < 12; i++) others.push_back(other.sample(logits, {}, 0).token_id);
  EXPECT_NE(tokens, others);
}

TEST(SamplerTest, WithoutASeedTwoSamplersDiffer) {
  SamplingParams params = plain();
  params.seed.reset();
  EXPECT_NE(Sampler(10, params, {}).seed(), Sampler(10, params, {}).seed());
}

TEST(SamplerTest, PenaltiesByHand) {
  SamplingParams params = plain();
  params.temperature = 0;
  params.repetition_penalty = 2.0;
  // Positive logits of seen tokens are halved, negative doubled; a token seen twice once only.
  EXPECT_EQ(Sampler(3, params, {}).sample(Floats{4, 2.5f, 1}, Ids{0, 0}, 0).token_id, 1);
  EXPECT_EQ(Sampler(3, params, {}).sample(Floats{4, 1.5f, 1}, Ids{0, 0}, 0).token_id, 0);
  EXPECT_EQ(Sampler(2, params, {}).sample(Floats{-1, -1.5f}, Ids{0}, 0).token_id, 1);
  EXPECT_EQ(Sampler(2, params, {}).sample(Floats{-1, -2.5f}, Ids{0}, 0).token_id, 0);
  // The window sees only the newest.
  params.penalty_window = 2;
  EXPECT_EQ(Sampler(4, params, {}).sample(Floats{4, 2.5f, 1, 1}, Ids{0, 2, 3}, 0).token_id, 0);
  params.penalty_window = -1;
  EXPECT_EQ(Sampler(4, params, {}).sample(Floats{4, 2.5f, 1, 1}, Ids{0, 2, 3}, 0).token_id, 1);
  params.penalty_window = 0;
  EXPECT_EQ(Sampler(4, params, {}).sample(Floats{4, 2.5f, 1, 1}, Ids{0, 2, 3}, 0).token_id, 0);

  // Presence and frequency count generated tokens alone.
  params = plain();
  params.temperature = 0;
  params.presence_penalty = 1.0;
  EXPECT_EQ(Sampler(2, params, {}).sample(Floats{1, 0.5f}, Ids{0, 0}, 0).token_id, 0);
  EXPECT_EQ(Sampler(2, params, {}).sample(Floats{1, 0.5f}, Ids{0, 0}, 1).token_id, 1);
  EXPECT_EQ(Sampler(2, params, {}).sample(Floats{1, -0.5f}, Ids{0, 0}, 2).token_id, 0);
  params.presence_penalty = 0;
  params.frequency_penalty = 0.75;
  EXPECT_EQ(Sampler(2, params, {}).sample(Floats{1, 0}, Ids{0, 0}, 1).token_id, 0);
  EXPECT_EQ(Sampler(2, params, {}).sample(Floats{1, 0}, Ids{0, 0}, 2).token_id, 1);
  // One after another: 4 / 2 - 1 = 1.
  params.repetition_penalty = 2.0;
  params.frequency_penalty = 1.0;
  EXPECT_EQ(Sampler(2, params, {}).sample(Floats{4, 1.25f}, Ids{0}, 1).token_id, 1);
  EXPECT_EQ(Sampler(2, params, {}).sample(Floats{4, 0.75f}, Ids{0}, 1).token_id, 0);
}

TEST(SamplerTest, PenaltiesBeyondF32LeaveFiniteLogits) {
  const Floats logits = {3.0f, 0.0f, -2.0f, -kInf, 1.0f};
  const Ids seen = {0, 1, 2, 3};
  const double tiny = std::numeric_limits<double>::denorm_min();
  const auto chosen = [&](double repetition, double presence, double frequency) {
    SamplingParams params = plain();
    params.temperature = 0;
    params.repetition_penalty = repetition;
    params.presence_penalty = presence;
    params.frequency_penalty = frequency;
    return Sampler(5, params, {}).sample(logits, seen, 4).token_id;
  };
  EXPECT_EQ(chosen(tiny, 0, 0), 0);
  EXPECT_EQ(chosen(1e300, 0, 0), 4);  // the only one that was not seen
  EXPECT_EQ(chosen(1, 1e300, 0), 4);
  EXPECT_EQ(chosen(1, -1e300, 0), 0);  // the first of those that are as large
  EXPECT_EQ(chosen(1, 1.5e308, -1.5e308), 0);
}

TEST(SamplerTest, PenaltiesChangeTheDistribution) {
  const Floats logits = {1.0f, 0.5f, 0.0f, -0.5f};
  SamplingParams params = plain();
  params.repetition_penalty = 1.3;
  params.presence_penalty = 0.2;
  params.frequency_penalty = 0.1;
  const auto counts = draw_counts(logits, params, 40000, {0, 3, 3}, 2);
  const Floats changed = {1.0f / 1.3f, 0.5f, 0.0f, -0.5f * 1.3f - 0.4f};
  EXPECT_LT(chi_square_ratio(counts, exact_distribution(changed, plain())), 1.0);
  EXPECT_GT(chi_square_ratio(counts, exact_distribution(logits, plain())), 1.0);
}

TEST(SamplerTest, BiasAndMinNewTokens) {
  SamplingParams params = plain();
  params.temperature = 0;
  params.logit_bias = {{2, 5.0f}, {0, -kInf}};
  EXPECT_EQ(Sampler(3, params, {}).sample(Floats{9, 1, 0}, {}, 0).token_id, 2);

  params = plain();
  params.temperature = 0;
  params.min_new_tokens = 2;
  const Ids end_ids = {0, 2};
  Sampler sampler(4, params, end_ids);
  const Floats logits = {9, 1, 8, 0};
  EXPECT_EQ(sampler.sample(logits, Ids{3}, 0).token_id, 1);
  EXPECT_EQ(sampler.sample(logits, Ids{3, 1}, 1).token_id, 1);
  EXPECT_EQ(sampler.sample(logits, Ids{3, 1, 1}, 2).token_id, 0);
}

TEST(SamplerTest, ProcessorRunsFirstAndSeesTheSequence) {
  SamplingParams params = plain();
  params.temperature = 0;
  params.logit_bias = {{1, 1.0f}};
  params.repetition_penalty = 2.0;
  Ids seen;
  params.logits_processor = [&](std::span<const int32_t> ids, std::span<float> logits) {
    seen.assign(ids.begin(), ids.end());
    EXPECT_EQ(logits[1], 3.0f);  // the model's, before bias and penalty
    std::fill(logits.begin(), logits.end(), -kInf);
    logits[1] = 1.0f;
  };
  const Floats logits = {9, 3, 7};
  EXPECT_EQ(Sampler(3, params, {}).sample(logits, Ids{2, 1}, 1).token_id, 1);
  EXPECT_EQ(seen, (Ids{2, 1}));
  params.logits_processor = [](std::span<const int32_t>, std::span<float>) {
    throw std::runtime_error("from the caller");
  };
  EXPECT_THROW(Sampler(3, params, {}).sample(logits, {}, 0), std::runtime_error);
}

// numpy: log_softmax([2, 1, 0.5, -1, 0, 3]).
TEST(SamplerTest, LogprobsAreTheModelsOwn) {
  SamplingParams params = plain();
  params.temperature = 0;
  params.logprobs = 3;
  params.logit_bias = {{3, 100.0f}};
  const TokenLogprob out = Sampler(6, params, {}).sample(Floats{2, 1, 0.5f, -1, 0, 3}, {}, 0);
  EXPECT_EQ(out.token_id, 3);
  EXPECT_NEAR(out.logprob, -4.50283524, 1e-6);
  ASSERT_EQ(out.top.size(), 3u);
  const Ids ids = {5, 0, 1};
  const std::vector<double> logprobs = {-0.50283524, -1.50283524, -2.50283524};
  for (size_t i = 0; i < 3; i++) {
    EXPECT_EQ(out.top[i].first, ids[i]);
    EXPECT_NEAR(out.top[i].second, logprobs[i], 1e-6);
  }
  params.logprobs = -1;
  EXPECT_TRUE(Sampler(6, params, {}).sample(Floats{2, 1, 0.5f, -1, 0, 3}, {}, 0).top.empty());
}

TEST(SamplerTest, LogprobsOfAWideVocabularySumToOne) {
  Floats logits(128256);
  std::mt19937 random(1);
  for (float& logit : logits) logit = std::normal_distribution<float>(0, 3)(random);
  SamplingParams params = plain();
  params.logprobs = 128256;
  const TokenLogprob out = Sampler(128256, params, {}).sample(logits, {}, 0);
  double sum = 0;
  for (const auto& [id, logprob] : out.top) sum += std::exp(double{logprob});
  EXPECT_NEAR(sum, 1.0, 1e-5);
}

std::string failure(const Floats& logits, const SamplingParams& params) {
  try {
    Sampler(static_cast<int64_t>(logits.size()), params, {}).sample(logits, {}, 0);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(SamplerTest, NonFiniteLogitsAreErrors) {
  for (const double temperature : {0.0, 1.0}) {
    SamplingParams params = plain();
    params.temperature = temperature;
    for (const int64_t at : {0, 17, 39}) {  // vectorised part and remainder
      Floats logits(40, 1.0f);
      logits[at] = NAN;
      EXPECT_NE(failure(logits, params).find("token " + std::to_string(at) + " is NaN"),
                std::string::npos)
          << failure(logits, params);
      logits[at] = kInf;
      EXPECT_NE(failure(logits, params).find("token " + std::to_string(at) + " is +infinity"),
                std::string::npos);
      logits[at] = -kInf;
      EXPECT_EQ(failure(logits, params), "no error");
    }
    EXPECT_NE(failure(Floats(40, -kInf), params).find("all 40 logits are -infinity"),
              std::string::npos);
    params.logits_processor = [](std::span<const int32_t>, std::span<float> logits) {
      std::fill(logits.begin(), logits.end(), -kInf);
    };
    EXPECT_NE(failure(Floats(40, 1.0f), params).find("sampling: no token can be chosen"),
              std::string::npos);
  }
}

TEST(SamplerTest, ExtremeTemperaturesStayDefined) {
  SamplingParams params = plain();
  params.temperature = 1e-300;
  EXPECT_EQ(draw_counts({1, 2, 1.999999f}, params, 100)[1], 100);
  params.temperature = 1e300;
  const auto counts = draw_counts({1, 200, -kInf}, params, 4000);
  EXPECT_EQ(counts[2], 0);
  EXPECT_NEAR(counts[0] / 4000.0, 0.5, 0.05);
}

std::string refusal(const SamplingParams& params) {
  try {
    params.validate(100);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

TEST(SamplingParamsTest, RefusesWhatIsOutOfRangeByName) {
  const auto with = [](auto change) {
    SamplingParams params;
    change(params);
    return refusal(params);
  };
  EXPECT_EQ(refusal({}), "accepted");
  EXPECT_EQ(with([](auto& p) { p.top_k = 1000000; }), "accepted");
  EXPECT_EQ(with([](auto& p) { p.logit_bias = {{99, -kInf}}; }), "accepted");
  EXPECT_EQ(with([](auto& p) { p.temperature = -0.5; }),
            "temperature must be finite and at least 0, not -0.5");
  EXPECT_EQ(with([](auto& p) { p.temperature = NAN; }).rfind("temperature", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.temperature = INFINITY; }).rfind("temperature", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.max_new_tokens = -1; }),
            "max_new_tokens must be at least 0, not -1");
  EXPECT_EQ(with([](auto& p) { p.min_new_tokens = 257; }),
            "min_new_tokens must be at most max_new_tokens (256), not 257");
  EXPECT_EQ(with([](auto& p) { p.top_k = -1; }).rfind("top_k", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.top_p = 1.01; }).rfind("top_p", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.top_p = NAN; }).rfind("top_p", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.min_p = -0.1; }).rfind("min_p", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.repetition_penalty = 0; }).rfind("repetition_penalty", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.presence_penalty = NAN; }).rfind("presence_penalty", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.frequency_penalty = -INFINITY; }).rfind("frequency_penalty", 0),
            0u);
  EXPECT_EQ(with([](auto& p) { p.penalty_window = -2; }).rfind("penalty_window", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.logit_bias = {{100, 0.0f}}; }),
            "logit_bias must be a token id in [0, 100), not 100");
  EXPECT_EQ(with([](auto& p) { p.logit_bias = {{-1, 0.0f}}; }).rfind("logit_bias", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.logit_bias = {{1, NAN}}; }).rfind("logit_bias", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.logit_bias = {{1, kInf}}; }).rfind("logit_bias", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.stop = {"a", ""}; }), "stop must not contain an empty text");
  EXPECT_EQ(with([](auto& p) { p.stop_token_ids = {5, 100}; }).rfind("stop_token_ids", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.logprobs = 101; }).rfind("logprobs", 0), 0u);
  EXPECT_EQ(with([](auto& p) { p.logprobs = -2; }).rfind("logprobs", 0), 0u);
}

TEST(SamplingParamsTest, CallersThenTheFolderThenTheLibrary) {
  const SamplingParams usual = SamplingParams().with_defaults();
  EXPECT_EQ(usual.temperature, 0.8);
  EXPECT_EQ(usual.top_k, 40);
  EXPECT_EQ(usual.top_p, 0.95);
  EXPECT_EQ(usual.min_p, 0.05);
  EXPECT_EQ(usual.repetition_penalty, 1.0);
  EXPECT_EQ(usual.penalty_window, 64);
  SamplingDefaults folder;
  folder.temperature = 0.6;
  folder.repetition_penalty = 1.05;
  SamplingParams asked;
  asked.temperature = 0;
  asked.seed = 7;
  const SamplingParams merged = asked.with_defaults(folder);
  EXPECT_EQ(merged.temperature, 0.0);
  EXPECT_EQ(merged.seed, 7u);
  EXPECT_EQ(merged.repetition_penalty, 1.05);
  EXPECT_EQ(merged.penalty_window, -1);  // as transformers counts
  asked.repetition_penalty = 1.2;
  EXPECT_EQ(asked.with_defaults(folder).penalty_window, 64);
  asked.penalty_window = 8;
  EXPECT_EQ(asked.with_defaults(folder).penalty_window, 8);
}

TEST(SamplerTest, RefusesWrongSizesAndIds) {
  SamplingParams params = plain();
  params.repetition_penalty = 1.1;
  EXPECT_THROW(Sampler(0, params, {}), std::invalid_argument);
  EXPECT_THROW(Sampler(4, params, Ids{4}), std::invalid_argument);
  Sampler sampler(4, params, Ids{3});
  EXPECT_THROW(sampler.sample(Floats{1, 2, 3}, {}, 0), std::invalid_argument);
  EXPECT_THROW(sampler.sample(Floats{1, 2, 3, 4}, Ids{1}, 2), std::invalid_argument);
  EXPECT_THROW(sampler.sample(Floats{1, 2, 3, 4}, Ids{1}, -1), std::invalid_argument);
  EXPECT_THROW(sampler.sample(Floats{1, 2, 3, 4}, Ids{4}, 0), std::invalid_argument);
  EXPECT_THROW(sampler.sample(Floats{1, 2, 3, 4}, Ids{-1}, 0), std::invalid_argument);
}

TEST(SamplingParamsTest, FinishReasonNames) {
  EXPECT_STREQ(name_of(FinishReason::kLength), "length");
  EXPECT_STREQ(name_of(FinishReason::kStop), "stop");
  EXPECT_STREQ(name_of(FinishReason::kContext), "context");
  EXPECT_STREQ(name_of(FinishReason::kCancelled), "cancelled");
}

}  // namespace
}  // namespace mustafar
