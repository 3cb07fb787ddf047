// Requests that begin alike: what is computed once, and that results are those of the same calls.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "mustafar/calibration.h"
#include "mustafar/engine.h"
#include "mustafar/error.h"
#include "mustafar/profile.h"
#include "mustafar/session.h"
#include "runtime/scheduler.h"
#include "support/asked.h"
#include "support/random_model.h"
#include "support/sampling.h"

namespace mustafar {
namespace {

using testing::alone;
using testing::Asked;
using testing::half;
using testing::ids_of;
using Ids = std::vector<int32_t>;

Model small_model(DType dtype = DType::kF32, int64_t kv_budget = 0) {
  return testing::random_model(testing::small_config(), "cpu", 2, dtype, kv_budget);
}

SamplingParams sampled(int32_t n, uint64_t seed) {
  SamplingParams params = testing::sampled(n, seed);
  params.logprobs = 2;
  return params;
}

Ids joined(Ids a, const Ids& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

void expect_same(const GenerateResult& a, const GenerateResult& b) {
  EXPECT_EQ(a.token_ids, b.token_ids);
  EXPECT_EQ(a.finish_reason, b.finish_reason);
  ASSERT_EQ(a.logprobs.size(), b.logprobs.size());
  for (size_t i = 0; i < a.logprobs.size(); i++) {
    EXPECT_EQ(a.logprobs[i].logprob, b.logprobs[i].logprob);  // every bit
  }
}

struct Case {
  const char* name;
  DType dtype;
  KVConfig kv;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](const char* name, DType dtype) -> KVConfig& {
    all.push_back({name, dtype, {}});
    return all.back().kv;
  };
  add("dense", DType::kF32).value_dtype = ValueType::kAuto;
  add("pruned", DType::kF32) = half();
  add("int8", DType::kBF16);
  KVConfig& aware = add("output_aware", DType::kF32);
  aware = half();
  aware.k_policy = PrunePolicy::kOutputAware;
  KVConfig& int4 = add("int4_without_window", DType::kBF16);
  int4.value_dtype = ValueType::kInt4;
  int4.window = 0;
  int4.sink_tokens = 0;
  int4.profile = Profile::hadamard(small_model().config());
  KVConfig& coded = add("coded", DType::kBF16);
  coded.value_dtype = ValueType::kCoded;
  const Prompt text = ids_of(400, 9);
  coded.profile = std::make_shared<const Profile>(calibrate(small_model(DType::kBF16), {&text, 1}));
  return all;
}

class EnginePrefixTest : public ::testing::TestWithParam<Case> {};

INSTANTIATE_TEST_SUITE_P(Settings, EnginePrefixTest, ::testing::ValuesIn(cases()),
                         [](const auto& info) { return info.param.name; });

// Prompts that branch off at random from a few texts, in calls of any lengths.
std::vector<Asked> branching(int n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<Asked> requests;
  for (int i = 0; i < n; i++) {
    Asked request;
    for (uint32_t part = 0, n_parts = 1 + random() % 4; part < n_parts; part++) {
      request.ids = joined(request.ids, ids_of(20 + 30 * (random() % 4), random() % 2));
      if (random() % 3 != 0) request.prefixes.push_back(static_cast<int64_t>(request.ids.size()));
    }
    request.ids = joined(request.ids, ids_of(1 + random() % 70, random()));
    request.params = sampled(1 + static_cast<int32_t>(random() % 50), random());
    requests.push_back(request);
  }
  return requests;
}

TEST_P(EnginePrefixTest, ReuseIsTheSameCallsBitForBit) {
  const Model model = small_model(GetParam().dtype);
  const std::vector<Asked> requests = branching(20, 4);
  Engine engine(model, GetParam().kv, {.max_batch = 6, .prefill_tokens = 90});
  std::vector<Request> running;
  for (const Asked& each : requests) {
    running.push_back(engine.submit(each.ids, each.params, {.prefixes = each.prefixes}));
  }
  int64_t tokens = 0, cached = 0;
  for (size_t i = 0; i < requests.size(); i++) {
    const GenerateResult result = running[i].result();
    expect_same(result, alone(model, GetParam().kv, requests[i]));
    EXPECT_LT(result.stats.cached_tokens, result.stats.prompt_tokens);
    tokens += result.stats.prompt_tokens;
    cached += result.stats.cached_tokens;
  }
  const EngineStats stats = engine.stats();
  EXPECT_GT(cached, tokens / 8);
  EXPECT_EQ(stats.reused_tokens, cached);
  EXPECT_EQ(stats.prompt_tokens, tokens - cached);
  EXPECT_GT(stats.prefix_bytes, 0);
  EXPECT_LE(stats.prefix_bytes, stats.kv_bytes);
  engine.close();
  EXPECT_EQ(engine.stats().prefixes, 0);
  EXPECT_EQ(model.memory().kv_bytes, 0);
}

TEST_P(EnginePrefixTest, ShortMemoryDropsPrefixesThenPausesAndChangesNothing) {
  const Model free = small_model(GetParam().dtype);
  std::vector<Asked> requests = branching(10, 8);
  int64_t need = 0;
  std::vector<GenerateResult> expected;
  for (Asked& each : requests) {
    each.params.max_new_tokens += 100;
    Session session(free, GetParam().kv);
    session.prefill(each.ids);
    session.generate(Ids{1}, sampled(150, 1));
    need = std::max(need, session.memory().allocated);
    expected.push_back(alone(free, GetParam().kv, each));
  }
  const Model model = small_model(GetParam().dtype, 3 * need);
  Engine engine(model, GetParam().kv, {.prefill_tokens = 64});
  std::vector<Request> running;
  for (const Asked& each : requests) {
    running.push_back(engine.submit(each.ids, each.params, {.prefixes = each.prefixes}));
  }
  for (size_t i = 0; i < requests.size(); i++) expect_same(running[i].result(), expected[i]);
  EXPECT_LE(model.memory().kv_peak_bytes, 3 * need);
  EXPECT_EQ(engine.stats().failed, 0);
  engine.close();
  EXPECT_EQ(model.memory().kv_bytes, 0);
}

TEST(PrefixCacheTest, APinnedPrefixIsComputedOnce) {
  const Model model = small_model();
  Engine engine(model, half(), {.prefill_tokens = 64});
  const Ids system = ids_of(300);
  EXPECT_EQ(engine.pin(system), 300);
  EXPECT_EQ(engine.pin(system), 300);
  std::vector<Request> running;
  std::vector<Asked> requests;
  int64_t rest = 0;
  for (int i = 0; i < 32; i++) {
    requests.push_back({joined(system, ids_of(5 + i, i)), {300}, sampled(10, i)});
    running.push_back(engine.submit(requests[i].ids, requests[i].params));
    rest += 5 + i;
  }
  int64_t n_computed = 0;
  for (int i = 0; i < 32; i++) {
    const GenerateResult result = running[i].result();
    expect_same(result, alone(model, half(), requests[i]));
    n_computed += result.stats.cached_tokens == 0 ? 1 : 0;
    EXPECT_EQ(result.stats.prompt_tokens, 305 + i);
  }
  EXPECT_EQ(n_computed, 1);
  EXPECT_EQ(engine.stats().prompt_tokens, 300 + rest);
  EXPECT_EQ(engine.stats().reused_tokens, 31 * 300);
  EXPECT_EQ(engine.stats().prefixes, 1);
}

TEST(PrefixCacheTest, PinnedPrefixesNestAndAreTakenBack) {
  const Model model = small_model();
  Engine engine(model, half());
  const Ids outer = ids_of(100), inner = joined(outer, ids_of(80, 2));
  engine.pin(inner);
  engine.pin(outer);
  const Asked both{joined(inner, ids_of(7, 3)), {100, 180}, sampled(5, 1)};
  expect_same(engine.submit(both.ids, both.params).result(), alone(model, half(), both));
  const Asked whole{inner, {100}, sampled(5, 1)};  // a pinned prefix is a prompt, too
  const GenerateResult result = engine.submit(whole.ids, whole.params).result();
  expect_same(result, alone(model, half(), whole));
  EXPECT_EQ(result.stats.cached_tokens, 100);
  EXPECT_TRUE(engine.unpin(outer));
  EXPECT_FALSE(engine.unpin(outer));
  const Asked one{both.ids, {180}, sampled(5, 1)};
  const GenerateResult after = engine.submit(one.ids, one.params).result();
  expect_same(after, alone(model, half(), one));
  EXPECT_EQ(after.stats.cached_tokens, 0) << "other calls are another prefix";
}

TEST(PrefixCacheTest, WithoutReuseResultsAreTheSame) {
  const Model model = small_model();
  Engine engine(model, half(), {.prefix_cache = PrefixCache::kOff});
  Engine none(model, half(), {.prefix_bytes = 0});
  const Ids system = ids_of(150);
  for (Engine* each : {&engine, &none}) {
    each->pin(system);
    for (int i = 0; i < 2; i++) {
      const Asked request{joined(system, ids_of(20, i)), {70, 150}, sampled(20, i)};
      const GenerateResult result =
          each->submit(request.ids, request.params, {.prefixes = {70}}).result();
      expect_same(result, alone(model, half(), request));
      EXPECT_EQ(result.stats.cached_tokens, 0);
    }
    EXPECT_EQ(each->stats().prefixes, 0);
    EXPECT_EQ(each->stats().prompt_tokens, 2 * 170);
  }
}

TEST(PrefixCacheTest, ExactReuseNeverCrossesCalls) {
  const Model model = small_model();
  Engine engine(model, half());
  const Ids ids = ids_of(250);
  for (const std::vector<int64_t>& prefixes :
       std::vector<std::vector<int64_t>>{{}, {200}, {}, {100, 200}, {100}, {200}, {100, 200}}) {
    const Asked request{ids, prefixes, sampled(20, 1)};
    expect_same(engine.submit(ids, request.params, {.prefixes = prefixes}).result(),
                alone(model, half(), request));
  }
  EXPECT_EQ(engine.stats().prefixes, 3);
  EXPECT_EQ(engine.stats().reused_tokens, 100 + 200 + 200);
}

// Turns of a conversation: the next one's prompt begins with all that was said.
TEST(PrefixCacheTest, ApproximateReuseGoesOnFromWhatIsKept) {
  const Model model = small_model();
  Engine engine(model, half(), {.prefix_cache = PrefixCache::kApproximate});
  Session session(model, half());
  Ids ids = ids_of(150);
  GenerateResult made = engine.submit(ids, sampled(40, 1)).result();
  EXPECT_EQ(made.stats.cached_tokens, 0);
  expect_same(made, session.generate(ids, sampled(40, 1)));
  for (int turn = 2; turn < 5; turn++) {
    // The newest token is in no cache yet.
    const auto held = static_cast<int64_t>(ids.size() + made.token_ids.size()) - 1;
    session.rewind(held);
    const Ids said = ids_of(30, turn);
    ids = joined(joined(ids, made.token_ids), said);
    made = engine.submit(ids, sampled(40, turn)).result();
    EXPECT_EQ(made.stats.cached_tokens, held);
    expect_same(made, session.generate(Ids(ids.begin() + held, ids.end()), sampled(40, turn)));
    EXPECT_EQ(engine.stats().prefixes, 1) << "a longer one makes those before it needless";
  }
  // Another branch: down to whole blocks, the rest again.
  const Ids branch = joined(Ids(ids.begin(), ids.begin() + 200), ids_of(20, 77));
  const int64_t kept = 4 + compressed_tokens(200, 4, 32);
  made = engine.submit(branch, sampled(40, 9)).result();
  EXPECT_EQ(made.stats.cached_tokens, kept);
  EXPECT_EQ(engine.stats().prefixes, 2);
  // Too little in common.
  EXPECT_EQ(engine.submit(joined(Ids(ids.begin(), ids.begin() + 60), branch), sampled(1, 1))
                .result()
                .stats.cached_tokens,
            0);
}

TEST(PrefixCacheTest, ApproximateReuseOfOneThatRuns) {
  const Model model = small_model();
  Model::Impl& impl = *model.impl();
  Scheduler scheduler(impl, half(),
                      {.prefill_tokens = 64, .prefix_cache = PrefixCache::kApproximate});
  std::vector<std::shared_ptr<Job>> jobs;
  const Ids common = ids_of(300);
  for (uint32_t i = 0; i < 5; i++) {
    jobs.push_back(
        make_job(impl, joined(common, ids_of(10, i)), sampled(30, i), false, false, "it"));
    jobs.back()->order = i;
    jobs.back()->on_end = [](std::exception_ptr error) { EXPECT_EQ(error, nullptr); };
    scheduler.add(jobs.back());
  }
  while (!scheduler.idle()) scheduler.round();
  // No block has left the first one's tail since.
  EXPECT_EQ(scheduler.counts().reused_tokens, 4 * 300);
  EXPECT_EQ(scheduler.counts().prompt_tokens, 5 * 310 - 4 * 300);
}

// Choices of one request, say.
TEST(PrefixCacheTest, TheSamePromptIsComputedOnce) {
  const Model model = small_model();
  Model::Impl& impl = *model.impl();
  for (const int32_t prefill_tokens : {16, 512}) {  // over several rounds, and in one
    Scheduler scheduler(impl, half(), {.max_batch = 7, .prefill_tokens = prefill_tokens});
    std::vector<std::shared_ptr<Job>> jobs;
    std::vector<Asked> asked;
    for (uint32_t i = 0; i < 7; i++) {
      asked.push_back({ids_of(180), {}, sampled(30, i)});
      if (i == 3) asked[i].prefixes = {100};  // other calls
      if (i == 5) asked[i].ids = ids_of(180, 2);
      jobs.push_back(make_job(impl, asked[i].ids, asked[i].params, false, false, "it"));
      if (i == 3) jobs[i]->end_call_at(100, false);
      jobs[i]->order = i;
      jobs[i]->on_end = [](std::exception_ptr error) { EXPECT_EQ(error, nullptr); };
      scheduler.add(jobs[i]);
    }
    while (!scheduler.idle()) scheduler.round();
    for (size_t i = 0; i < jobs.size(); i++) {
      expect_same(jobs[i]->loop->result, alone(model, half(), asked[i]));
    }
    EXPECT_EQ(scheduler.counts().prompt_tokens, 3 * 180);
    EXPECT_EQ(scheduler.counts().reused_tokens, 4 * 180);
  }
}

// Whoever computes a prefix for others may fail or go: the next one does it.
TEST(PrefixCacheTest, APrefixWhoseFirstRequestEndsIsComputedByTheNext) {
  const Model model = small_model();
  Model::Impl& impl = *model.impl();
  Scheduler scheduler(impl, half(), {.prefill_tokens = 16});
  const Ids common = ids_of(200);
  std::vector<std::shared_ptr<Job>> jobs;
  std::vector<Asked> requests;
  for (uint32_t i = 0; i < 4; i++) {
    requests.push_back({joined(common, ids_of(10, i)), {200}, sampled(20, i)});
    if (i == 1) {
      requests[i].params.logits_processor = [](std::span<const int32_t>, std::span<float>) {
        throw std::domain_error("mine");
      };
    }
    jobs.push_back(make_job(impl, requests[i].ids, requests[i].params, false, false, "it"));
    jobs.back()->order = i;
    jobs.back()->end_call_at(200, false);
    jobs.back()->on_end = [](std::exception_ptr) {};
    scheduler.add(jobs.back());
  }
  scheduler.round();
  EXPECT_EQ(scheduler.n_running(), 1);
  EXPECT_EQ(scheduler.n_waiting(), 3);
  *jobs[0]->cancelled = true;
  while (!scheduler.idle()) scheduler.round();
  EXPECT_EQ(scheduler.counts().cancelled, 1);
  EXPECT_EQ(scheduler.counts().failed, 1);
  EXPECT_EQ(scheduler.counts().reused_tokens, 2 * 200);
  for (const size_t i : {2, 3}) {
    expect_same(jobs[i]->loop->result, alone(model, half(), requests[i]));
  }
  EXPECT_EQ(scheduler.prefixes().size(), 1);
  scheduler.drop_prefixes();
  EXPECT_EQ(model.memory().kv_bytes, 0);
}

TEST(PrefixCacheTest, WhatIsWrongIsRefused) {
  const Model model = small_model();
  Engine engine(model, half());
  const SamplingParams params = sampled(1, 1);
  EXPECT_THROW(engine.submit(ids_of(9), params, {.prefixes = {0}}), std::invalid_argument);
  EXPECT_THROW(engine.submit(ids_of(9), params, {.prefixes = {3, 10}}), std::invalid_argument);
  EXPECT_NO_THROW(engine.submit(ids_of(9), params, {.prefixes = {9, 4, 4}}).result());
  EXPECT_THROW(engine.pin(Ids{}), std::invalid_argument);
  EXPECT_THROW(engine.pin(Ids{500}), std::invalid_argument);
  EXPECT_THROW(engine.pin(ids_of(601)), ContextOverflow);
  EXPECT_THROW(engine.pin("text"), TokenizerError);
  EXPECT_THROW(Engine(model, half(), {.prefix_bytes = -1}), std::invalid_argument);
  EXPECT_THROW(parse_prefix_cache("fast"), std::invalid_argument);
  engine.close();
  EXPECT_THROW(engine.pin(ids_of(9)), StateError);
}

}  // namespace
}  // namespace mustafar
