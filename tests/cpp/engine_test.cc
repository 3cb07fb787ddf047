// The engine over a small random model: every request gets what it gets alone.
#include "mustafar/engine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "format/block_format.h"
#include "mustafar/error.h"
#include "mustafar/session.h"
#include "runtime/scheduler.h"
#include "support/random_model.h"
#include "support/sampling.h"

namespace mustafar {
namespace {

using testing::half;
using testing::ids_of;
using testing::sampled;

Model small_model(int64_t kv_budget = 0) {
  return testing::random_model(testing::small_config(), "cpu", 2, DType::kF32, kv_budget);
}

GenerateResult alone(const Model& model, const std::vector<int32_t>& ids,
                     const SamplingParams& params) {
  Session session(model, half());
  return session.generate(ids, params);
}

void expect_same(const GenerateResult& a, const GenerateResult& b) {
  EXPECT_EQ(a.token_ids, b.token_ids);
  EXPECT_EQ(a.finish_reason, b.finish_reason);
}

// A logits processor that holds the engine's thread until it is let go.
struct Hold {
  std::atomic<bool> reached{false}, go{false};
  LogitsProcessor processor() {
    return [this](std::span<const int32_t>, std::span<float>) {
      reached = true;
      while (!go) std::this_thread::yield();
    };
  }
  void wait() const {
    while (!reached) std::this_thread::yield();
  }
};

TEST(EngineTest, RequestsGetWhatTheyGetAloneFromAnyThread) {
  const Model model = small_model();
  Engine engine(model, half(), {.max_batch = 4, .prefill_tokens = 40});
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; t++) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 6; i++) {
        const std::vector<int32_t> ids = ids_of(1 + random() % 130, random());
        const SamplingParams params = sampled(1 + static_cast<int32_t>(random() % 80), random());
        Request request = engine.submit(ids, params);
        Request cancelled = engine.submit(ids, sampled(400, 1));
        if (random() % 2 == 0) std::this_thread::yield();
        cancelled.cancel();
        expect_same(request.result(), alone(model, ids, params));
        EXPECT_EQ(cancelled.result().finish_reason, FinishReason::kCancelled);
        EXPECT_EQ(request.prompt_tokens(), static_cast<int64_t>(ids.size()));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  engine.close();
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.finished, 18);
  EXPECT_EQ(stats.cancelled, 18);
  EXPECT_EQ(stats.running + stats.waiting + stats.paused + stats.failed, 0);
  EXPECT_EQ(stats.kv_bytes, 0);
  EXPECT_EQ(model.memory().kv_bytes, 0);
}

TEST(EngineTest, ShortMemoryPausesTheYoungestAndLosesNothing) {
  const Model free = small_model();
  std::vector<std::vector<int32_t>> prompts;
  std::vector<GenerateResult> expected;
  int64_t need = 0;
  for (int i = 0; i < 8; i++) {
    prompts.push_back(ids_of(30 + 11 * i, i));
    Session session(free, half());
    expected.push_back(session.generate(prompts.back(), sampled(330, i)));
    need = std::max(need, session.memory().allocated);
  }
  const Model model = small_model(3 * need);
  Engine engine(model, half(), {.prefill_tokens = 64});
  std::vector<Request> requests;
  for (int i = 0; i < 8; i++) requests.push_back(engine.submit(prompts[i], sampled(330, i)));
  int64_t prompt_tokens = 0;
  for (int i = 0; i < 8; i++) {
    expect_same(requests[i].result(), expected[i]);
    prompt_tokens += static_cast<int64_t>(prompts[i].size());
  }
  EXPECT_LE(model.memory().kv_peak_bytes, 3 * need);
  engine.close();
  EXPECT_GT(engine.stats().prompt_tokens, prompt_tokens) << "nobody was paused";
  EXPECT_EQ(engine.stats().failed, 0);
}

TEST(EngineTest, ARequestThatFitsNoBudgetFailsAlone) {
  const Model free = small_model();
  Session session(free, half());
  session.prefill(ids_of(160));
  const Model model = small_model(session.memory().allocated);
  Engine engine(model, half());
  EXPECT_THROW(engine.submit(ids_of(600)), OutOfMemory);
  Request large = engine.submit(ids_of(60), sampled(500, 1));
  Request small = engine.submit(ids_of(10), sampled(20, 2));
  EXPECT_THROW(large.result(), OutOfMemory);
  EXPECT_THROW(large.result(), OutOfMemory);
  expect_same(small.result(), alone(free, ids_of(10), sampled(20, 2)));
}

// What submit says that a request needs where the budget is a byte.
int64_t bytes_needed(const KVConfig& kv, const EngineOptions& options, int64_t n,
                     const RequestOptions& request) {
  const Model model = small_model(1);
  Engine engine(model, kv, options);
  try {
    engine.submit(ids_of(n), sampled(1, 1), request);
  } catch (const OutOfMemory& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("kv_budget = 1:"), std::string::npos) << message;
    const std::string before = "needs ";
    return std::stoll(message.substr(message.find(before) + before.size()));
  }
  ADD_FAILURE() << "a byte was enough";
  return 0;
}

TEST(EngineTest, APromptIsRefusedByTheByte) {
  KVConfig by_queries = half();
  by_queries.k_policy = PrunePolicy::kOutputAware;
  by_queries.sink_tokens = 0;
  by_queries.window = 64;
  struct Case {
    int64_t n;
    std::vector<int64_t> prefixes;
  };
  const Case cases[] = {{1, {}},     {40, {}},     {100, {}},         {300, {}},
                        {300, {20}}, {300, {200}}, {300, {130, 140}}, {300, {299, 300}}};
  for (const KVConfig& kv : {half(), by_queries}) {
    for (const PrefixCache mode : {PrefixCache::kExact, PrefixCache::kOff}) {
      for (const Case& c : cases) {
        SCOPED_TRACE(std::to_string(c.n) + " tokens, " + std::to_string(c.prefixes.size()) +
                     " prefixes, " + name_of(mode));
        const EngineOptions options{.prefill_tokens = 128, .prefix_cache = mode};
        const RequestOptions request{.prefixes = c.prefixes};
        const int64_t needed = bytes_needed(kv, options, c.n, request);
        {
          // Every call's pages may come in a slab of their own.
          const auto more_slabs = static_cast<int64_t>(c.prefixes.size());
          const Model model = small_model(needed + more_slabs * kSlabSlack);
          Engine engine(model, kv, options);
          EXPECT_EQ(engine.submit(ids_of(c.n), sampled(1, 1), request).result().token_ids.size(),
                    1u);
        }
        const Model model = small_model(needed - 1);
        Engine engine(model, kv, options);
        EXPECT_THROW(engine.submit(ids_of(c.n), sampled(1, 1), request), OutOfMemory);
        EXPECT_EQ(engine.stats().failed, 0);
        // Nothing is computed for no token.
        EXPECT_NO_THROW(engine.submit(ids_of(c.n), sampled(0, 1), request).result());
      }
    }
  }
}

TEST(EngineTest, APinnedPrefixCountsInWhatAPromptNeeds) {
  const int64_t whole = bytes_needed(half(), {}, 590, {});
  const Model model = small_model(whole - 1);
  Engine engine(model, half());
  EXPECT_THROW(engine.submit(ids_of(590), sampled(1, 1)), OutOfMemory);
  std::vector<int32_t> prefix = ids_of(590);
  prefix.resize(300);
  engine.pin(prefix);
  EXPECT_EQ(engine.submit(ids_of(590), sampled(1, 1)).result().token_ids.size(), 1u);
}

TEST(EngineTest, WhatOthersLeaveMayMakeAPromptFit) {
  const EngineOptions options{.prefix_cache = PrefixCache::kApproximate};
  const Model model = small_model(bytes_needed(half(), {}, 590, {}) - 1);
  Engine engine(model, half(), options);
  std::vector<int32_t> beginning = ids_of(590);
  beginning.resize(500);
  engine.submit(beginning, sampled(1, 1)).result();
  EXPECT_EQ(engine.submit(ids_of(590), sampled(1, 1)).result().token_ids.size(), 1u);
}

TEST(EngineTest, ErrorsBelongToTheirRequest) {
  const Model model = small_model();
  Engine engine(model, half());
  SamplingParams broken = sampled(30, 1);
  broken.logits_processor = [](std::span<const int32_t>, std::span<float>) {
    throw std::domain_error("mine");
  };
  Request good = engine.submit(ids_of(20), sampled(50, 3));
  EXPECT_THROW(engine.submit(ids_of(20), broken).result(), std::domain_error);
  expect_same(good.result(), alone(model, ids_of(20), sampled(50, 3)));
  EXPECT_THROW(engine.submit(std::vector<int32_t>{}), std::invalid_argument);
  EXPECT_THROW(engine.submit(std::vector<int32_t>{500}), std::invalid_argument);
  EXPECT_THROW(engine.submit(ids_of(601)), ContextOverflow);
  EXPECT_THROW(engine.submit("text"), TokenizerError);
  EXPECT_THROW(engine.submit(ids_of(2), {}, {.timeout_seconds = 0.0}), std::invalid_argument);
  EXPECT_THROW(Engine(model, half(), {.max_batch = 0}), std::invalid_argument);
  EXPECT_THROW(Engine(model, half(), {.max_waiting = 0}), std::invalid_argument);
  EXPECT_THROW(Engine(model, half(), {.prefill_tokens = 0}), std::invalid_argument);
}

TEST(EngineTest, PrioritiesTimeoutsAndAFullQueue) {
  const Model model = small_model();
  Hold hold;
  std::vector<char> order;
  const auto noted = [&](char name) {
    SamplingParams params = sampled(1, 1);
    params.logits_processor = [&order, name](std::span<const int32_t>, std::span<float>) {
      order.push_back(name);
    };
    return params;
  };
  Engine engine(model, half(), {.max_batch = 1, .max_waiting = 3});
  SamplingParams held = sampled(1, 1);
  held.logits_processor = hold.processor();
  Request first = engine.submit(ids_of(3), held);
  hold.wait();
  Request low = engine.submit(ids_of(3), noted('l'));
  Request high = engine.submit(ids_of(3), noted('h'), {.priority = 2});
  Request late = engine.submit(ids_of(3), noted('t'), {.timeout_seconds = 1e-6});
  EXPECT_THROW(engine.submit(ids_of(3)), QueueFull);
  EXPECT_EQ(engine.stats().waiting, 3);
  EXPECT_FALSE(low.wait(0.001));
  hold.go = true;
  EXPECT_EQ(late.result().finish_reason, FinishReason::kTimeout);
  low.wait();
  high.wait();
  EXPECT_EQ(order, (std::vector<char>{'h', 'l'}));
  EXPECT_TRUE(first.done());
}

TEST(EngineTest, ACallbackMayCloseAndDropTheEngine) {
  const Model model = small_model();
  auto engine = std::make_unique<Engine>(model, half());
  Hold hold;
  std::atomic<bool> dropped{false};
  SamplingParams params = sampled(100, 1);
  params.logits_processor = [&](std::span<const int32_t>, std::span<float>) {
    if (dropped) return;
    hold.processor()({}, {});
    engine.reset();
    dropped = true;
  };
  Request request = engine->submit(ids_of(5), params);
  Request other = engine->submit(ids_of(5), sampled(400, 2));
  hold.go = true;
  EXPECT_EQ(request.result().finish_reason, FinishReason::kCancelled);
  EXPECT_EQ(other.result().finish_reason, FinishReason::kCancelled);
  EXPECT_TRUE(dropped);
}

TEST(EngineTest, ClosedEnginesRefuseAndMovedOnesGoOn) {
  const Model model = small_model();
  Engine engine(model, half());
  Request request = engine.submit(ids_of(5), sampled(30, 1));
  Engine moved = std::move(engine);
  expect_same(request.result(), alone(model, ids_of(5), sampled(30, 1)));
  Request live = moved.submit(ids_of(5), sampled(500, 1));
  moved.close();
  EXPECT_EQ(live.result().finish_reason, FinishReason::kCancelled);
  EXPECT_THROW(moved.submit(ids_of(5)), StateError);
}

// A long prompt's rows are computed between the decode steps of what runs already.
TEST(EngineTest, HandlesThatWereMovedFromSaySo) {
  Engine first(small_model());
  Engine engine = std::move(first);
  Request empty = engine.submit(ids_of(4), sampled(2, 1));
  Request request = std::move(empty);
  EXPECT_THROW(first.submit(ids_of(4)), StateError);
  EXPECT_THROW(first.stats(), StateError);
  EXPECT_THROW(first.close(), StateError);
  EXPECT_THROW(first.model(), StateError);
  EXPECT_THROW(first.kv_config(), StateError);
  EXPECT_THROW(empty.cancel(), StateError);
  EXPECT_THROW(empty.done(), StateError);
  EXPECT_THROW(empty.prompt_tokens(), StateError);
  EXPECT_THROW(empty.text_from(0), StateError);
  EXPECT_THROW(empty.tokens_from(0), StateError);
  EXPECT_THROW(empty.wait(), StateError);
  EXPECT_THROW(empty.result(), StateError);
  EXPECT_THROW(empty.set_on_change({}), StateError);
  EXPECT_EQ(request.result().token_ids.size(), 2u);
}

TEST(EngineTest, StreamsGoOnWhileALongPromptIsComputed) {
  const Model model = small_model();
  Model::Impl& impl = *model.impl();
  Scheduler scheduler(impl, half(), {.prefill_tokens = 16});
  std::vector<std::shared_ptr<Job>> jobs;
  for (const int64_t n : {10, 590, 12}) {
    jobs.push_back(make_job(impl, ids_of(n), sampled(n == 590 ? 3 : 200, 1), false, false, "it"));
    jobs.back()->order = jobs.size();
    jobs.back()->on_end = [](std::exception_ptr) {};
    scheduler.add(jobs.back());
  }
  int rounds = 0;
  while (!jobs[1]->first_token) {
    scheduler.round();
    rounds++;
  }
  EXPECT_GT(rounds, 2);
  // One token a round; the short prompt behind the long one came in with the first.
  EXPECT_GE(jobs[0]->loop->made_tokens(), rounds);
  EXPECT_GE(jobs[2]->loop->made_tokens(), rounds - 1);
}

}  // namespace
}  // namespace mustafar
