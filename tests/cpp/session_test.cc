// Sessions over a small random model: what must hold whatever happens, without any data files.
#include "mustafar/session.h"

#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <ostream>
#include <string>
#include <thread>
#include <vector>

#include "mustafar/error.h"
#include "mustafar/profile.h"
#include "runtime/row_budget.h"
#include "runtime/session_impl.h"
#include "support/random_model.h"

namespace mustafar {
namespace {

using testing::ids_of;
using testing::small_config;

Model small_model(int64_t kv_budget = 0, DType dtype = DType::kF32) {
  return testing::random_model(small_config(), "cpu", 2, dtype, kv_budget);
}

std::vector<float> copy(std::span<const float> x) { return {x.begin(), x.end()}; }

KVConfig config_of(double sparsity, Pattern pattern, int32_t window, int32_t sinks,
                   ValueType type = ValueType::kAuto) {
  KVConfig kv;
  kv.sparsity = sparsity;
  kv.pattern = pattern;
  kv.window = window;
  kv.sink_tokens = sinks;
  kv.value_dtype = type;
  return kv;
}

// Rows of every size: the costs of layers are far apart.
KVConfig budget_config(double bytes_per_token) {
  const ModelConfig c = small_config();
  auto profile = std::make_shared<Profile>(*Profile::hadamard(c));
  profile->kind = "balanced";
  for (int32_t i = 0; i < c.n_layers * c.n_kv_heads * c.head_dim; i++) {
    profile->k_sigma.push_back(0.5f / static_cast<float>(1 + i % c.head_dim));
    profile->v_sigma.push_back(0.1f / static_cast<float>(1 + i % 5));
  }
  profile->k_cost = {1.0f, 30.0f, 0.01f};
  profile->v_cost = {10.0f, 0.1f, 300.0f};
  KVConfig kv = config_of(0, Pattern::kGroup, 32, 4, ValueType::kCoded);
  kv.budget_bytes_per_token = bytes_per_token;
  kv.profile = std::move(profile);
  return kv;
}

struct NamedConfig {
  const char* name;
  KVConfig kv;
};

void PrintTo(const NamedConfig& config, std::ostream* out) { *out << config.name; }

class SessionTest : public ::testing::TestWithParam<NamedConfig> {};

INSTANTIATE_TEST_SUITE_P(
    Configs, SessionTest,
    ::testing::Values(NamedConfig{"dense", config_of(0, Pattern::kGroup, 32, 0)},
                      NamedConfig{"half", config_of(0.5, Pattern::kGroup, 32, 0)},
                      NamedConfig{"row_without_window", config_of(0.7, Pattern::kRow, 0, 4)},
                      NamedConfig{"int8", config_of(0.5, Pattern::kGroup, 1, 0, ValueType::kInt8)},
                      NamedConfig{"int4_many_sinks",
                                  config_of(0.5, Pattern::kGroup, 32, 70, ValueType::kInt4)},
                      NamedConfig{"budget", budget_config(120)}),
    [](const auto& info) { return std::string(info.param.name); });

TEST_P(SessionTest, ScheduleHoldsAtEveryLength) {
  Session session(small_model(), GetParam().kv);
  const KVConfig& kv = GetParam().kv;
  const auto check = [&] {
    const MemoryUsage memory = session.memory();
    const int64_t n = session.position();
    EXPECT_EQ(memory.compressed_tokens, compressed_tokens(n, kv.sink_tokens, kv.window)) << n;
    EXPECT_EQ(memory.compressed_tokens + memory.dense_tokens, n);
  };
  session.prefill(ids_of(1));
  for (int32_t id : ids_of(300)) {
    session.decode(id);
    check();
  }
  session.prefill(ids_of(3));
  check();
  session.prefill(ids_of(200));
  check();
}

// Bytes of n dense tokens, in the tail's type.
int64_t dense_bytes(int64_t n, DType tail) {
  const ModelConfig config = small_config();
  return n * config.n_layers * 2 * config.n_kv_heads * dtype_bytes(tail, config.head_dim);
}

TEST_P(SessionTest, TheTailGrowsWithItsTokens) {
  const Model model = small_model();
  const KVConfig& kv = GetParam().kv;
  const int64_t most = kv.sink_tokens + kv.window + kBlockTokens;
  Session session(model, kv);
  EXPECT_EQ(session.memory().allocated, 0);
  EXPECT_EQ(model.memory().kv_bytes, 0);
  int64_t tail = 0, largest = 0;
  int n_growths = 0;
  for (int32_t id : ids_of(400)) {
    session.decode(id);
    const MemoryUsage memory = session.memory();
    largest = std::max(largest, memory.dense_tokens);
    const int64_t room = std::min(std::max<int64_t>(16, 2 * largest), most);
    EXPECT_LE(memory.tail, dense_bytes(room, DType::kF32)) << session.position();
    EXPECT_EQ(memory.allocated - memory.used,
              memory.tail - dense_bytes(memory.dense_tokens, DType::kF32));
    EXPECT_GE(memory.allocated, memory.used);
    n_growths += memory.tail != tail;
    tail = memory.tail;
  }
  EXPECT_EQ(tail, dense_bytes(most, DType::kF32));
  EXPECT_LE(n_growths, 8);
  session.reset();
  EXPECT_EQ(session.memory().allocated, 0);
  EXPECT_EQ(model.memory().kv_bytes, 0);
}

TEST_P(SessionTest, GrowingChangesNoResult) {
  const KVConfig& kv = GetParam().kv;
  Session session(small_model(), kv);
  const auto ids = ids_of(kv.sink_tokens + kv.window + kBlockTokens - 1);
  std::vector<std::vector<float>> grown;
  for (int32_t id : ids) grown.push_back(copy(session.decode(id)));
  session.rewind(1);  // leaves the buffer as large as it was
  for (size_t i = 1; i < ids.size(); i++) EXPECT_EQ(copy(session.decode(ids[i])), grown[i]) << i;
}

// The first prefill's own buffer is the only one, and no larger than what it holds needs.
TEST_P(SessionTest, APrefillTakesWhatItsTokensNeed) {
  const KVConfig& kv = GetParam().kv;
  for (const int64_t n : {1, 16, 17, 60, 97, 150, 230}) {
    const Model model = small_model();
    Session session(model, kv);
    session.prefill(ids_of(n));
    const MemoryUsage memory = session.memory();
    const int64_t room = std::max<int64_t>(16, 2 * memory.dense_tokens);
    EXPECT_LE(memory.tail, dense_bytes(room, DType::kF32)) << n;
    if (memory.compressed_tokens > 0) continue;
    EXPECT_EQ(model.memory().kv_bytes, memory.tail);
    EXPECT_EQ(model.memory().kv_peak_bytes,
              memory.tail + dense_bytes(n, DType::kF32) / small_config().n_layers);
  }
}

TEST_P(SessionTest, ATailThatCannotGrowChangesNothing) {
  Session probe(small_model(), GetParam().kv);
  probe.decode(1);
  const int64_t smallest = probe.memory().tail;
  const Model model = small_model(2 * smallest);  // the next step needs more, beside this one
  Session session(model, GetParam().kv), twin(small_model(), GetParam().kv);
  const auto ids = ids_of(60);
  int64_t n = 0;
  try {
    for (; n < 60; n++) {
      session.decode(ids[n]);
      twin.decode(ids[n]);
    }
    FAIL() << "the tail grew beyond kv_budget";
  } catch (const OutOfMemory& error) {
    EXPECT_NE(std::string(error.what()).find("kv_budget"), std::string::npos);
  }
  EXPECT_EQ(n, 16);
  EXPECT_EQ(session.position(), n);
  EXPECT_EQ(model.memory().kv_bytes, smallest);
  EXPECT_EQ(copy(session.logits()), copy(twin.logits()));
  EXPECT_THROW(session.decode(ids[n]), OutOfMemory);
  session.rewind(n - 3);
  twin.rewind(n - 3);
  for (int i = 0; i < 3; i++) EXPECT_EQ(copy(session.decode(5)), copy(twin.decode(5)));
}

// What a scheduler sets aside for a sequence is never too little.
TEST_P(SessionTest, ReservedBytesAreEnough) {
  for (const int64_t prompt : {1, 15, 40, 64}) {
    for (const int64_t n : {16, 17, 33, 64, 90}) {
      if (n < prompt || compressed_tokens(n, GetParam().kv.sink_tokens, GetParam().kv.window) > 0)
        continue;
      const Model model = small_model();
      Session session(model, GetParam().kv);
      session.prefill(ids_of(prompt));
      for (int64_t i = prompt; i < n; i++) session.decode(3);
      EXPECT_LE(model.memory().kv_peak_bytes,
                SequenceCache::bytes_for(*session.impl().spec, prompt, n))
          << prompt << " to " << n;
    }
  }
}

TEST_P(SessionTest, RewindEqualsCutAndPrefill) {
  const Model model = small_model();
  for (const int64_t position : {1, 5, 64, 65, 100, 129, 200, 258}) {
    Session a(model, GetParam().kv), b(model, GetParam().kv);
    const auto ids = ids_of(260);
    a.prefill(ids);
    b.prefill(ids);
    a.rewind(position);
    b.rewind(position);
    EXPECT_EQ(a.position(), position);
    EXPECT_EQ(copy(a.logits()), copy(b.logits()));
    // Once nothing compressed is left, a fresh session is the exact reference.
    if (compressed_tokens(position, GetParam().kv.sink_tokens, GetParam().kv.window) == 0) {
      Session fresh(model, GetParam().kv);
      fresh.prefill(std::span(ids).first(position));
      for (int32_t id : ids_of(5, 3)) {
        const auto expected = copy(fresh.decode(id)), actual = copy(a.decode(id));
        // Sinks are kept as the first, longer call made them; without them it is the same call.
        if (GetParam().kv.sink_tokens == 0) {
          EXPECT_EQ(actual, expected);
        }
        for (size_t i = 0; i < actual.size(); i++) EXPECT_NEAR(actual[i], expected[i], 1e-5);
      }
    }
  }
}

TEST_P(SessionTest, ForkGoesOnAlike) {
  const Model model = small_model();
  Session a(model, GetParam().kv);
  a.prefill(ids_of(170));
  Session b = a.fork();
  for (int32_t id : ids_of(80, 2)) EXPECT_EQ(copy(a.decode(id)), copy(b.decode(id)));
  a.close();
  b.decode(1);
}

TEST_P(SessionTest, StateFileGoesOnAlike) {
  const Model model = small_model();
  const auto path = std::filesystem::temp_directory_path() /
                    ("mustafar_session_test_" + std::to_string(::getpid()));
  Session a(model, GetParam().kv);
  a.prefill(ids_of(170));
  a.save(path);
  Session b = Session::load(model, path, GetParam().kv.profile);
  std::filesystem::remove(path);
  EXPECT_EQ(a.tokens(), b.tokens());
  for (int32_t id : ids_of(80, 2)) EXPECT_EQ(copy(a.decode(id)), copy(b.decode(id)));
}

// Every budget between nothing and enough: a call either succeeds or changes nothing.
TEST_P(SessionTest, RunningOutOfMemoryChangesNothing) {
  const Model reference_model = small_model();
  const auto ids = ids_of(240);
  int64_t enough;
  {
    Session whole(reference_model, GetParam().kv);
    whole.prefill(ids);
    enough = 3 * whole.memory().allocated + (1 << 20);
  }
  int failures = 0;
  for (int64_t budget = 1; budget < enough; budget += enough / 23) {
    const Model model = small_model(budget);
    std::optional<Session> session, twin;
    try {
      session.emplace(model, GetParam().kv);
    } catch (const OutOfMemory&) {
      failures++;
      continue;
    }
    twin.emplace(reference_model, GetParam().kv);
    for (int step = 0; step < 4; step++) {
      const auto part = std::span(ids).subspan(step * 60, 60);
      try {
        session->prefill(part);
        twin->prefill(part);
      } catch (const OutOfMemory& error) {
        EXPECT_NE(std::string(error.what()).find("kv_budget"), std::string::npos);
        failures++;
      }
      EXPECT_EQ(session->tokens(), twin->tokens());
      EXPECT_LE(model.memory().kv_bytes, budget);
    }
    if (session->position() > 0) {
      EXPECT_EQ(copy(session->logits()), copy(twin->logits()));
    }
    session.reset();
    EXPECT_EQ(model.memory().kv_bytes, 0);
  }
  EXPECT_GT(failures, 3);
}

TEST_P(SessionTest, CancelledPrefillChangesNothing) {
  const Model model = small_model();
  Session a(model, GetParam().kv), b(model, GetParam().kv);
  a.prefill(ids_of(150));
  b.prefill(ids_of(150));
  for (int stop_at = 1; stop_at <= 3; stop_at++) {
    int calls = 0;
    a.set_interrupt_check([&] {
      if (++calls == stop_at) throw std::runtime_error("enough");
    });
    EXPECT_THROW(a.prefill(ids_of(200, 5)), std::runtime_error);
    a.set_interrupt_check({});
    EXPECT_EQ(a.tokens(), b.tokens());
  }
  for (int32_t id : ids_of(80, 2)) EXPECT_EQ(copy(a.decode(id)), copy(b.decode(id)));
}

TEST_P(SessionTest, BatchEqualsOneByOne) {
  const Model model = small_model();
  std::vector<Prompt> prompts;
  for (int i = 0; i < 5; i++) prompts.emplace_back(ids_of(20 + 37 * i, i));
  SamplingParams params;
  params.temperature = 0;
  params.max_new_tokens = 70;
  BatchOptions options;
  options.max_batch = 3;
  const auto results = model.generate(prompts, params, GetParam().kv, options);
  ASSERT_EQ(results.size(), prompts.size());
  for (size_t i = 0; i < prompts.size(); i++) {
    Session session(model, GetParam().kv);
    EXPECT_EQ(results[i].token_ids, session.generate(prompts[i], params).token_ids) << i;
  }
  EXPECT_EQ(model.memory().kv_bytes, 0);
}

TEST(SessionBudgetTest, TakesNoMoreThanItsBytes) {
  const Model model = small_model();
  for (const double budget : {72.0, 100.0, 120.0, 211.5, 1000.0}) {
    Session session(model, budget_config(budget));
    session.prefill(ids_of(32 + 4 + 128));
    const MemoryUsage memory = session.memory();
    ASSERT_EQ(memory.compressed_tokens, 128);
    const double bytes = static_cast<double>(memory.values + memory.scales) / 128;
    EXPECT_LE(bytes, budget);
    EXPECT_GT(bytes, std::min(budget, 216.0) - 8) << budget;  // 216: 7 bits everywhere, 8: a word
    EXPECT_EQ(memory.padding, 0);
  }
  EXPECT_THROW(Session(model, budget_config(71)), std::invalid_argument);
  KVConfig kv = budget_config(120);
  auto other = std::make_shared<Profile>(*kv.profile);
  other->k_cost.clear();
  kv.profile = other;
  EXPECT_THROW(Session(model, kv), std::invalid_argument);
}

// A file is bound to the costs that dealt its rows; one without a budget is not.
TEST(SessionBudgetTest, StateFilesNeedTheCostsTheyWereMadeWith) {
  const Model model = small_model();
  const auto path = std::filesystem::temp_directory_path() /
                    ("mustafar_budget_test_" + std::to_string(::getpid()));
  KVConfig kv = budget_config(120);
  auto other = std::make_shared<Profile>(*kv.profile);
  other->k_cost[0] *= 1000;
  for (const bool budgeted : {true, false}) {
    if (!budgeted) kv.budget_bytes_per_token.reset();
    Session session(model, kv);
    session.prefill(ids_of(170));
    session.save(path);
    if (budgeted) {
      EXPECT_THROW(Session::load(model, path, other), StateError);
    } else {
      Session loaded = Session::load(model, path, other);
      EXPECT_EQ(copy(loaded.decode(3)), copy(session.decode(3)));
    }
    std::filesystem::remove(path);
  }
}

TEST(SessionBudgetTest, TheFewestBytesThatPredictTheDivergence) {
  KVConfig kv = budget_config(120);
  const double reached = deal_rows(kv).predicted_kld;
  kv.budget_bytes_per_token = 112;  // a word less in two heads
  const double missed = deal_rows(kv).predicted_kld;
  ASSERT_GT(missed, reached);
  kv.budget_bytes_per_token.reset();
  kv.max_kld = reached;
  const RowSizes rows = deal_rows(kv);
  EXPECT_EQ(rows.predicted_kld, reached);
  kv.max_kld = (reached + missed) / 2;
  EXPECT_EQ(deal_rows(kv).k_row_bytes, rows.k_row_bytes);
  kv.max_kld = missed;
  EXPECT_EQ(deal_rows(kv).predicted_kld, missed);
  kv.max_kld = 1e-300;
  EXPECT_THROW(deal_rows(kv), std::invalid_argument);
}

TEST(SessionFaultTest, RowsThatAreNotFiniteCannotBeQuantised) {
  ModelConfig config = small_config();
  class Poisoned : public TensorSource {
   public:
    explicit Poisoned(const ModelConfig& config) : good_(random_tensors(config, DType::kF32, 7)) {
      infinite_.assign(int64_t{config.n_kv_heads} * config.head_dim * config.hidden_size, 3e38f);
    }
    bool has(const std::string& name) const override { return good_->has(name); }
    StoredTensor tensor(const std::string& name, const std::vector<int64_t>& shape) const override {
      if (name == "model.layers.1.self_attn.v_proj.weight") return {infinite_.data(), DType::kF32};
      return good_->tensor(name, shape);
    }

   private:
    std::unique_ptr<TensorSource> good_;
    std::vector<float> infinite_;
  };
  ModelOptions options;
  options.device = "cpu";
  const Model model = make_model(config, std::make_shared<Poisoned>(config), options);
  Session session(model, config_of(0.5, Pattern::kGroup, 0, 0, ValueType::kInt8));
  try {
    session.prefill(ids_of(100));
    FAIL() << "rows with infinities were quantised";
  } catch (const StateError& error) {
    EXPECT_NE(std::string(error.what()).find("layer 1"), std::string::npos) << error.what();
  }
  EXPECT_EQ(session.position(), 0);
  // By decode as well: the 64th token completes a block.
  for (int32_t id : ids_of(63)) session.decode(id);
  EXPECT_THROW(session.decode(5), StateError);
  EXPECT_EQ(session.position(), 63);
}

// A cache never looks larger than the dense one would be.
TEST(SessionMemoryTest, ShortConversationsUseNoMoreThanDense) {
  const Model model = small_model(0, DType::kBF16);
  for (const char* preset : {"dense", "lossless"}) {
    Session session(model, KVConfig::preset(preset, model));
    for (int32_t id : ids_of(300)) {
      session.decode(id);
      const MemoryUsage memory = session.memory();
      EXPECT_LE(memory.used, memory.dense_equivalent) << preset << " " << session.position();
      if (memory.compressed_tokens == 0) {
        EXPECT_EQ(memory.used, memory.dense_equivalent);
      }
    }
  }
}

TEST(SessionMemoryTest, IdleSessionsDoNotKeepALiveOneFromItsNextTurn) {
  const auto ids = ids_of(200), turn = ids_of(20, 2);
  int64_t live_needs, idle_holds;
  {
    const Model model = small_model();
    Session live(model);
    live.prefill(ids);
    live.prefill(turn);
    live.decode(1);
    live_needs = model.memory().kv_peak_bytes;
    Session idle(model);
    idle.prefill(ids_of(1));
    idle_holds = idle.memory().allocated;
  }
  const Model model = small_model(live_needs + idle_holds);
  Session live(model), empty(model), begun(model);
  live.prefill(ids);
  begun.prefill(ids_of(1));
  live.prefill(turn);
  live.decode(1);
  EXPECT_EQ(live.position(), 221);
  EXPECT_LE(5 * idle_holds, dense_bytes(100, DType::kF32));
}

TEST(SessionFaultTest, SessionsOnManyThreads) {
  const Model model = small_model();
  std::vector<std::thread> threads;
  std::vector<std::vector<int32_t>> results(4);
  SamplingParams params;
  params.temperature = 0;
  params.max_new_tokens = 60;
  for (size_t i = 0; i < results.size(); i++) {
    threads.emplace_back([&, i] {
      Session session(model);
      results[i] = session.generate(ids_of(90), params).token_ids;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& result : results) EXPECT_EQ(result, results[0]);
}

// What one of several threads does on a shared model, and every number that comes of it.
std::vector<float> work_of(const Model& model, int which) {
  std::vector<float> out;
  const auto add = [&](std::span<const float> x) { out.insert(out.end(), x.begin(), x.end()); };
  SamplingParams params;
  params.seed = 5;
  params.max_new_tokens = 70;
  params.ignore_eos = true;
  if (which == 0) {  // prefill and decode
    Session session(model, config_of(0.5, Pattern::kGroup, 32, 0));
    add(session.prefill(ids_of(150)));
    for (int32_t id : ids_of(60, 2)) add(session.decode(id));
  } else if (which == 1) {  // generation
    KVConfig kv = config_of(0.5, Pattern::kGroup, 32, 0, ValueType::kInt8);
    kv.k_policy = PrunePolicy::kOutputAware;
    kv.profile = Profile::hadamard(model.config());
    Session session(model, kv);
    for (int32_t id : session.generate(ids_of(90), params).token_ids) out.push_back(id);
    add(session.logits());
  } else if (which == 2) {  // continuous batching
    BatchOptions options;
    options.max_batch = 2;
    const std::vector<Prompt> prompts = {ids_of(40), ids_of(150, 2), ids_of(90, 3)};
    for (const auto& result : model.generate(prompts, params, {}, options)) {
      out.insert(out.end(), result.token_ids.begin(), result.token_ids.end());
    }
  } else {  // forks in a batch, rewind
    Session a(model, config_of(0.7, Pattern::kRow, 0, 4));
    a.prefill(ids_of(200));
    Session b = a.fork();
    b.rewind(120);
    Session* const both[] = {&a, &b};
    for (int32_t id : ids_of(60, 2)) add(Session::decode_batch(both, std::vector{id, id}));
  }
  return out;
}

TEST(SessionFaultTest, ThreadsShareAModelWhileOneOfThemIsCancelled) {
  constexpr int kWorks = 4, kRounds = 3, kCancels = 12;
  std::vector<std::vector<float>> alone, shared(2 * kWorks);
  for (int i = 0; i < kWorks; i++) alone.push_back(work_of(small_model(), i));

  const Model model = small_model();
  std::vector<std::thread> threads;
  for (int i = 0; i < 2 * kWorks; i++) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < kRounds; round++) {
        const auto numbers = work_of(model, i % kWorks);
        shared[i].insert(shared[i].end(), numbers.begin(), numbers.end());
      }
    });
  }
  Session victim(model), undisturbed(model);
  victim.prefill(ids_of(100));
  undisturbed.prefill(ids_of(100));
  std::atomic<int> begun{0}, cancels{0};
  threads.emplace_back([&] {
    for (int i = 1; i <= kCancels; i++) {
      while (begun < i) std::this_thread::yield();
      victim.cancel();
      cancels = i;
      victim.cancel();  // at any time, of this call or the next
    }
  });
  for (int i = 1; i <= kCancels; i++) {
    const auto await_cancel = [&](int64_t, int64_t) {
      begun = i;
      while (cancels < i) std::this_thread::yield();
    };
    EXPECT_THROW(victim.prefill(ids_of(200, 5), await_cancel), Cancelled);
    EXPECT_EQ(victim.tokens(), undisturbed.tokens());
  }
  begun = kCancels;
  for (std::thread& thread : threads) thread.join();

  for (int i = 0; i < 2 * kWorks; i++) {
    std::vector<float> expected;
    for (int round = 0; round < kRounds; round++) {
      expected.insert(expected.end(), alone[i % kWorks].begin(), alone[i % kWorks].end());
    }
    EXPECT_EQ(shared[i], expected) << "work " << i % kWorks;
  }
  for (int32_t id : ids_of(80, 2)) EXPECT_EQ(copy(victim.decode(id)), copy(undisturbed.decode(id)));
  victim.close();
  undisturbed.close();
  EXPECT_EQ(model.memory().kv_bytes, 0);
}

TEST(SessionFaultTest, OtherThreadsMayAskForTheTokensMeanwhile) {
  const Model model = small_model();
  Session session(model);
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  threads.emplace_back([&] {
    session.prefill(ids_of(30));
    for (int32_t id : ids_of(150)) session.decode(id);
    session.rewind(20);
    done = true;
  });
  const auto first = ids_of(30), then = ids_of(150);
  std::vector<int32_t> all = first;
  all.insert(all.end(), then.begin(), then.end());
  while (!done) {
    const std::vector<int32_t> seen = session.tokens();
    ASSERT_LE(seen.size(), all.size());
    EXPECT_TRUE(std::equal(seen.begin(), seen.end(), all.begin()));
    EXPECT_LE(session.position(), static_cast<int64_t>(all.size()));
  }
  threads[0].join();
  EXPECT_EQ(session.position(), 20);
}

TEST(ProfileTest, HadamardIsItsOwnInverse) {
  for (int32_t d : {8, 16, 64, 80, 96, 128}) {
    ModelConfig config = small_config();
    config.head_dim = d;
    const auto profile = Profile::hadamard(config);
    const float* f = profile->k_forward.data();
    const float* b = profile->k_backward.data();
    for (int32_t i = 0; i < d; i++) {
      for (int32_t j = 0; j < d; j++) {
        double sum = 0;
        for (int32_t k = 0; k < d; k++) sum += static_cast<double>(f[i * d + k]) * b[k * d + j];
        EXPECT_NEAR(sum, i == j, 1e-5);
      }
    }
  }
}

}  // namespace
}  // namespace mustafar
