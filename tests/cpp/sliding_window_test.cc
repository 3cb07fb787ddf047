// Models whose layers have a sliding window: what their caches drop, and that nothing shows it.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "kv/slab_size.h"
#include "mustafar/engine.h"
#include "mustafar/session.h"
#include "runtime/session_impl.h"
#include "support/asked.h"
#include "support/caller.h"
#include "support/random_model.h"
#include "support/sampling.h"

namespace mustafar {
namespace {

using testing::alone;
using testing::Asked;
using testing::Caller;
using testing::ids_of;
using Ids = std::vector<int32_t>;

constexpr int32_t kWindow = 100;
constexpr int64_t kContext = 2000;

ModelConfig windowed_config(const std::vector<bool>& layers = {}, int32_t window = kWindow) {
  ModelConfig config = testing::small_config({.max_position_embeddings = kContext});
  config.sliding_window = window;
  config.traits.window_layers = layers;
  return config;
}

Model windowed_model(int64_t kv_budget = 0, const std::vector<bool>& layers = {},
                     DType dtype = DType::kF32, int32_t window = kWindow) {
  return testing::random_model(windowed_config(layers, window), "cpu", 2, dtype, kv_budget);
}

std::vector<float> copy(std::span<const float> x) { return {x.begin(), x.end()}; }

Ids joined(Ids a, const Ids& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

struct Case {
  const char* name;
  KVConfig kv;
  DType dtype = DType::kF32;
  int32_t window = kWindow;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

KVConfig setting(double sparsity, ValueType type, int32_t window, int32_t sinks) {
  KVConfig kv;
  kv.sparsity = sparsity;
  kv.value_dtype = type;
  kv.window = window;
  kv.sink_tokens = sinks;
  return kv;
}

std::vector<Case> cases() {
  std::vector<Case> all = {
      {"exact", setting(0, ValueType::kAuto, 32, 4)},
      {"half", setting(0.5, ValueType::kAuto, 32, 0)},
      {"int8", setting(0.5, ValueType::kInt8, 0, 70), DType::kBF16},
      {"int4_narrow", setting(0.5, ValueType::kInt4, 32, 4), DType::kBF16, 20},
      {"one_token", setting(0, ValueType::kAuto, 1, 4), DType::kF32, 1},
      {"a_block", setting(0, ValueType::kInt8, 32, 4), DType::kF32, 64},
      {"output_aware", setting(0.5, ValueType::kAuto, 32, 4)},
      {"wide", setting(0.5, ValueType::kInt8, 32, 4), DType::kBF16, 500},
  };
  all[6].kv.k_policy = PrunePolicy::kOutputAware;
  return all;
}

class SlidingWindowTest : public ::testing::TestWithParam<Case> {
 protected:
  static Model model(int64_t kv_budget = 0) {
    return windowed_model(kv_budget, {}, GetParam().dtype, GetParam().window);
  }
};

INSTANTIATE_TEST_SUITE_P(Settings, SlidingWindowTest, ::testing::ValuesIn(cases()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(SlidingWindowTest, WhatIsDroppedIsSeenByNoOne) {
  const Model model = SlidingWindowTest::model();
  const auto spec = model.impl()->cache_spec(GetParam().kv);
  ASSERT_EQ(spec->widest_window, GetParam().window);
  auto keeps = std::make_shared<CacheSpec>(*spec);
  keeps->widest_window = 0;
  Caller drops(model, spec, kContext), whole(model, keeps, kContext);
  uint32_t seed = 0;
  const auto prefill = [&](int64_t n) {
    const Ids ids = ids_of(n, ++seed);
    EXPECT_EQ(drops.prefill(ids), whole.prefill(ids)) << n << " at " << seed;
  };
  const auto decode = [&](int64_t n) {
    for (const int32_t id : ids_of(n, ++seed)) EXPECT_EQ(drops.decode(id), whole.decode(id));
  };
  const auto check_held = [&] {
    const int64_t n = drops.cache.length();
    EXPECT_EQ(drops.cache.compressed(), whole.cache.compressed());
    EXPECT_EQ(std::ssize(drops.cache.pages()), spec->held_blocks(n)) << n;
    EXPECT_LE(std::ssize(drops.cache.pages()) * 64, GetParam().window + 126 + 63);
    EXPECT_EQ(std::ssize(whole.cache.pages()) * 64, whole.cache.compressed());
  };
  for (const int64_t n : {150, 1, 70, 333}) {
    prefill(n);
    check_held();
    decode(90);
    check_held();
  }
  // A step back from here, each in its own way.
  for (const int64_t back : {1, 20, 64, 65}) {
    const int64_t length = drops.cache.length() - back;
    ASSERT_TRUE(drops.cache.can_cut(length) || back > 64) << back;
    if (!drops.cache.can_cut(length)) continue;
    Caller a(model, spec, kContext), b(model, keeps, kContext);
    a.cache = drops.cache.cut_store(length);
    b.cache = whole.cache.cut_store(length);
    ASSERT_EQ(a.cache.length(), b.cache.length());
    const Ids ids = ids_of(200, 99);
    EXPECT_EQ(a.prefill(ids), b.prefill(ids));
    for (const int32_t id : ids) EXPECT_EQ(a.decode(id), b.decode(id));
  }
}

TEST_P(SlidingWindowTest, ReservedBytesAreEnough) {
  for (const int64_t prompt : {1, 200, 700}) {
    const Model model = SlidingWindowTest::model();
    Session session(model, GetParam().kv);
    const CacheSpec& spec = *session.impl().spec;
    session.prefill(ids_of(prompt));
    int32_t dense = 0;
    EXPECT_LE(SequenceCache::call_bytes(spec, 0, prompt, dense), model.memory().kv_peak_bytes);
    // Slabs hold some pages more than are asked for.
    const int64_t slack = slab_bytes(spec.layout.page_bytes, 1) + 64 * spec.layout.page_bytes;
    for (int64_t n = prompt; n < prompt + 300; n++) {
      EXPECT_LE(model.memory().kv_peak_bytes, SequenceCache::bytes_for(spec, prompt, n) + slack);
      EXPECT_LE(session.memory().allocated, SequenceCache::held_bytes(spec, n));
      session.decode(3);
    }
    const MemoryUsage memory = session.memory();
    EXPECT_EQ(memory.compressed_tokens, 64 * spec.held_blocks(session.position()));
    EXPECT_EQ(memory.dense_equivalent,
              int64_t{4} * std::min<int64_t>(GetParam().window, session.position()) * 3 * 2 * 16);
  }
}

TEST_P(SlidingWindowTest, ForkStateFileAndLogitsGoOnAlike) {
  const Model model = SlidingWindowTest::model();
  const auto path = std::filesystem::temp_directory_path() /
                    ("mustafar_sliding_window_test_" + std::to_string(::getpid()));
  Session a(model, GetParam().kv);
  a.prefill(ids_of(570));
  for (const int32_t id : ids_of(100, 5)) a.decode(id);
  a.save(path);
  Session b = Session::load(model, path), c = a.fork();
  std::filesystem::remove(path);
  EXPECT_EQ(a.tokens(), b.tokens());
  EXPECT_EQ(a.memory().compressed_tokens, b.memory().compressed_tokens);
  for (const int32_t id : ids_of(150, 2)) {
    const std::vector<float> expected = copy(a.decode(id));
    EXPECT_EQ(copy(b.decode(id)), expected);
    EXPECT_EQ(copy(c.decode(id)), expected);
  }
}

// By little the store is cut, as ever; by more all is computed again from the tokens.
TEST_P(SlidingWindowTest, ARewindGoesAnywhere) {
  const Model model = SlidingWindowTest::model();
  const Ids ids = ids_of(900);
  for (const int64_t position : {899, 880, 836, 700, 300, 90, 1}) {
    Session a(model, GetParam().kv), fresh(model, GetParam().kv);
    a.prefill(ids);
    const bool far = !a.impl().cache->can_cut(position);
    a.rewind(position);
    EXPECT_EQ(a.position(), position);
    fresh.prefill(std::span(ids).first(position));
    for (const int32_t id : ids_of(100, 3)) {
      const auto expected = copy(fresh.decode(id)), actual = copy(a.decode(id));
      if (far) {
        EXPECT_EQ(actual, expected) << position;
      } else if (GetParam().name == std::string("exact")) {
        for (size_t i = 0; i < actual.size(); i++) EXPECT_NEAR(actual[i], expected[i], 1e-4);
      }
    }
  }
  Session a(model, GetParam().kv);
  a.prefill(ids);
  a.rewind(300);
  a.rewind(250);  // and on from there
  EXPECT_EQ(a.logits().size(), static_cast<size_t>(testing::kSmallVocab));
}

TEST(SlidingWindow, LayersThatSeeAllKeepEverything) {
  const Model model = windowed_model(0, {true, false, true});
  Session session(model, setting(0, ValueType::kAuto, 32, 4));
  session.prefill(ids_of(900));
  const MemoryUsage memory = session.memory();
  EXPECT_EQ(memory.compressed_tokens, compressed_tokens(900, 4, 32));
  EXPECT_EQ(memory.dense_equivalent, 4 * (2 * kWindow + 900) * 2 * 16);
  // Two models that differ in their windows alone are not the same.
  EXPECT_NE(model.fingerprint(), windowed_model().fingerprint());
  EXPECT_NE(model.fingerprint(), windowed_model(0, {true, true, false}).fingerprint());
  Session other(windowed_model(), setting(0, ValueType::kAuto, 32, 4));
  EXPECT_NE(copy(session.logits()), copy(other.prefill(ids_of(900))));
}

// A long prompt holds no more of its store than its end needs.
TEST(SlidingWindow, ALongPromptFitsWhereItsStoreWouldNot) {
  const KVConfig kv = setting(0, ValueType::kAuto, 32, 4);
  const CacheSpec spec = *windowed_model().impl()->cache_spec(kv);
  const int64_t budget = SequenceCache::bytes_for(spec, 1900, 1999) + (64 << 10);
  EXPECT_LT(budget, 1900 / 64 * spec.layout.page_bytes);
  Session session(windowed_model(budget), kv), twin(windowed_model(), kv);
  EXPECT_EQ(copy(session.prefill(ids_of(1900))), copy(twin.prefill(ids_of(1900))));
  for (const int32_t id : ids_of(99)) EXPECT_EQ(copy(session.decode(id)), copy(twin.decode(id)));
}

TEST(SlidingWindow, TheEngineGivesWhatSessionsGive) {
  const KVConfig kv = setting(0.5, ValueType::kAuto, 32, 4);
  std::vector<Asked> requests;
  for (uint32_t i = 0; i < 12; i++) {
    Asked request;
    request.ids = joined(ids_of(300 + 100 * (i % 3), i % 2), ids_of(40 + 50 * (i % 5), i));
    request.prefixes = {300};
    request.params = testing::sampled(40 + static_cast<int32_t>(i), i);
    requests.push_back(request);
  }
  const int64_t page = windowed_model().impl()->cache_spec(kv)->layout.page_bytes;
  // With room for all, and with room for a few at a time.
  for (const int64_t budget : {int64_t{0}, 45 * page + (int64_t{2} << 20)}) {
    const Model model = windowed_model(budget), roomy = windowed_model();
    Engine engine(model, kv, {.max_batch = 8, .prefill_tokens = 128});
    std::vector<Request> handles;
    for (const Asked& request : requests) {
      handles.push_back(engine.submit(request.ids, request.params, {.prefixes = request.prefixes}));
    }
    for (size_t i = 0; i < requests.size(); i++) {
      EXPECT_EQ(handles[i].result().token_ids, alone(roomy, kv, requests[i]).token_ids) << i;
    }
  }
}

TEST(SlidingWindow, ApproximateReuseTakesNothingThatWasDropped) {
  const KVConfig kv = setting(0, ValueType::kAuto, 32, 4);
  const Model model = windowed_model();
  Engine engine(model, kv, {.prefix_cache = PrefixCache::kApproximate});
  const Ids ids = ids_of(600);
  const auto greedy = [&](const Ids& prompt) {
    SamplingParams params = testing::sampled(60, 1);
    params.temperature = 0;
    const GenerateResult made = engine.submit(prompt, params).result();
    Session session(windowed_model(), kv);
    EXPECT_EQ(made.token_ids, session.generate(prompt, params).token_ids);
    return std::pair(made.stats.cached_tokens, joined(prompt, made.token_ids));
  };
  const auto [none, whole] = greedy(ids);
  EXPECT_EQ(none, 0);
  // On from the end all of it is there; from the middle what its window saw is gone.
  const auto [all, longer] = greedy(joined(whole, ids_of(20, 5)));
  EXPECT_EQ(all, 659);
  EXPECT_EQ(greedy(joined(Ids(ids.begin(), ids.begin() + 300), ids_of(20, 6))).first, 0);
  EXPECT_EQ(greedy(joined(longer, ids_of(5, 7))).first, std::ssize(longer) - 1);
}

}  // namespace
}  // namespace mustafar
