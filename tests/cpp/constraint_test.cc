// Constrained output: masks in the sampler, and who asks a constraint what.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "mustafar/model.h"
#include "mustafar/session.h"
#include "runtime/sampler.h"
#include "support/random_model.h"

namespace mustafar {
namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

Model small_model() {
  return testing::random_model(testing::small_config(), "cpu", 2, DType::kF32, 0);
}

void allow_id(std::span<uint32_t> allowed, int32_t id) {
  allowed[id / 32] |= uint32_t{1} << (id % 32);
}

TEST(SamplerMaskTest, ChoosesAsFromLogitsOfMinusInfinity) {
  std::mt19937 random(3);
  for (const int64_t vocab : {1, 31, 32, 64, 100, 1000}) {
    std::normal_distribution<float> normal(0.0f, 3.0f);
    std::vector<float> logits(vocab), masked(vocab);
    std::vector<uint32_t> allowed(vocab / 32 + 1);
    for (int64_t i = 0; i < vocab; i++) logits[i] = masked[i] = normal(random);
    for (uint32_t& bits : allowed) bits = random() % 3 == 0 ? ~0u : random() & random();
    allow_id(allowed, static_cast<int32_t>(vocab - 1));
    for (int64_t i = 0; i < vocab; i++) {
      if ((allowed[i / 32] >> (i % 32) & 1) == 0) masked[i] = kForbidden;
    }
    for (const double temperature : {0.0, 1.5}) {
      SamplingParams params;
      params.temperature = temperature;
      params.seed = 5;
      Sampler by_bits(vocab, params, {}), by_logits(vocab, params, {});
      for (int i = 0; i < 20; i++) {
        EXPECT_EQ(by_bits.sample(logits, {}, 0, allowed).token_id,
                  by_logits.sample(masked, {}, 0).token_id)
            << vocab << " logits, temperature " << temperature;
      }
    }
  }
}

TEST(SamplerMaskTest, NothingAllowsWhatItForbids) {
  SamplingParams params;
  params.temperature = 0;
  params.logprobs = 1;
  params.logit_bias = {{3, 1e6f}};
  params.logits_processor = [](std::span<const int32_t>, std::span<float> logits) {
    logits[4] = 1e6f;
  };
  Sampler sampler(10, params, {});
  std::vector<float> logits(10, 0.0f);
  logits[5] = 2;
  std::vector<uint32_t> allowed(1);
  allow_id(allowed, 7);
  const TokenLogprob chosen = sampler.sample(logits, {}, 0, allowed);
  EXPECT_EQ(chosen.token_id, 7);
  EXPECT_EQ(chosen.top.at(0).first, 5) << "log-probabilities are the model's own";
}

TEST(SamplerMaskTest, RefusesAMaskOfAnotherSize) {
  Sampler sampler(64, {}, {});
  const std::vector<float> logits(64);
  const std::vector<uint32_t> allowed(2);  // 64 / 32 + 1 are expected
  EXPECT_THROW(sampler.sample(logits, {}, 0, allowed), std::invalid_argument);
}

// Lets the ids of a script follow each other, from `may_end_at` on also the end.
class Script final : public TokenConstraint {
 public:
  Script(std::vector<int32_t> ids, size_t may_end_at) : ids_(std::move(ids)), end_(may_end_at) {}
  bool allow(std::span<uint32_t> allowed) override {
    EXPECT_TRUE(std::all_of(allowed.begin(), allowed.end(), [](uint32_t x) { return x == 0; }));
    if (at_ < ids_.size()) allow_id(allowed, ids_[at_]);
    return at_ >= end_;
  }
  bool accept(int32_t token) override {
    EXPECT_EQ(token, ids_.at(at_));
    return ++at_ < ids_.size();
  }

 private:
  std::vector<int32_t> ids_;
  size_t end_, at_ = 0;
};

SamplingParams scripted(const std::vector<int32_t>& ids, size_t may_end_at) {
  SamplingParams params;
  params.temperature = 1.0;
  params.seed = 1;
  params.constraint = [=] { return std::make_unique<Script>(ids, may_end_at); };
  return params;
}

TEST(ConstraintTest, TheOutputEndsWhereNothingMayFollow) {
  const Model model = small_model();
  Session session(model);
  const std::vector<int32_t> script = {5, 9, 5, 3, 31};
  const std::vector<int32_t> prompt = {1, 2, 3};
  const GenerateResult result = session.generate(Prompt(prompt), scripted(script, 5));
  EXPECT_EQ(result.token_ids, script);
  EXPECT_EQ(result.finish_reason, FinishReason::kStop);
  EXPECT_EQ(session.position(), static_cast<int64_t>(prompt.size() + script.size()));
}

TEST(ConstraintTest, TheLimitCutsIt) {
  const Model model = small_model();
  Session session(model);
  SamplingParams params = scripted({5, 9, 5, 3}, 4);
  params.max_new_tokens = 3;
  const GenerateResult result = session.generate(Prompt(std::vector<int32_t>{1}), params);
  EXPECT_EQ(result.token_ids, (std::vector<int32_t>{5, 9, 5}));
  EXPECT_EQ(result.finish_reason, FinishReason::kLength);
}

// Notes what it is told of the limits, and ends the output where two tokens are left.
TEST(ConstraintTest, KnowsTheLimitsAndMayEndInTime) {
  class Counting final : public TokenConstraint {
   public:
    explicit Counting(std::vector<int64_t>* left) : left_(*left) {}
    bool allow(std::span<uint32_t> allowed) override {
      allow_id(allowed, 5);
      return false;
    }
    bool accept(int32_t) override { return left_.back() > 3; }
    void set_tokens_left(int64_t n) override { left_.push_back(n); }
    bool ended_early() const override { return left_.back() <= 3; }

   private:
    std::vector<int64_t>& left_;
  };
  const Model model = small_model();
  std::vector<int64_t> left;
  SamplingParams params;
  params.constraint = [&] { return std::make_unique<Counting>(&left); };
  params.max_new_tokens = 6;
  const Prompt prompt(std::vector<int32_t>{1, 2});
  Session session(model);
  GenerateResult result = session.generate(prompt, params);
  EXPECT_EQ(left, (std::vector<int64_t>{6, 5, 4, 3}));
  EXPECT_EQ(result.token_ids.size(), 4U);
  EXPECT_EQ(result.finish_reason, FinishReason::kLength);

  left.clear();
  Session small(model, {}, 7);  // the context ends first
  result = small.generate(prompt, params);
  EXPECT_EQ(left, (std::vector<int64_t>{5, 4, 3}));
  EXPECT_EQ(result.finish_reason, FinishReason::kLength);

  left.clear();
  EXPECT_EQ(model.generate(std::vector<Prompt>{prompt}, params)[0].token_ids.size(), 4U);
  EXPECT_EQ(left, (std::vector<int64_t>{6, 5, 4, 3}));
}

TEST(ConstraintTest, EndsComeWhereTheyMayAlone) {
  const Model model = small_model();
  const int32_t stop = 17;
  for (const size_t may_end_at : {0, 2, 3}) {
    Session session(model);
    SamplingParams params = scripted({5, 9, 5, 3}, may_end_at);
    params.stop_token_ids = {stop};
    params.logit_bias = {{stop, 1e4f}};  // ends as soon as it may
    const GenerateResult result = session.generate(Prompt(std::vector<int32_t>{1}), params);
    ASSERT_EQ(result.token_ids.size(), may_end_at + 1);
    EXPECT_EQ(result.token_ids.back(), stop);
    EXPECT_EQ(result.finish_reason, FinishReason::kStop);
  }
}

TEST(ConstraintTest, EveryOutputOfABatchHasItsOwn) {
  const Model model = small_model();
  const std::vector<Prompt> prompts = {std::vector<int32_t>{1, 2}, std::vector<int32_t>{3},
                                       std::vector<int32_t>{4, 5, 6}};
  const std::vector<int32_t> script = {5, 9, 5, 3, 31};
  for (const GenerateResult& result : model.generate(prompts, scripted(script, 5))) {
    EXPECT_EQ(result.token_ids, script);
  }
  const std::vector<SamplingParams> each = {scripted({7}, 1), SamplingParams(),
                                            scripted({8, 8, 8}, 3)};
  const std::vector<GenerateResult> results = model.generate(prompts, each);
  EXPECT_EQ(results[0].token_ids, (std::vector<int32_t>{7}));
  EXPECT_EQ(results[2].token_ids, (std::vector<int32_t>{8, 8, 8}));
}

// What a constraint throws ends the call and leaves the session as it was.
TEST(ConstraintTest, ItsErrorsEndTheCall) {
  class Failing final : public TokenConstraint {
    bool allow(std::span<uint32_t> allowed) override {
      allow_id(allowed, 1);
      return false;
    }
    bool accept(int32_t) override {
      if (++taken_ == 3) throw std::domain_error("no more");
      return true;
    }
    int taken_ = 0;
  };
  const Model model = small_model();
  Session session(model);
  session.prefill(std::vector<int32_t>{4, 5});
  SamplingParams params;
  params.constraint = [] { return std::make_unique<Failing>(); };
  EXPECT_THROW(session.generate(Prompt(std::vector<int32_t>{1}), params), std::domain_error);
  EXPECT_EQ(session.position(), 2);
}

}  // namespace
}  // namespace mustafar
