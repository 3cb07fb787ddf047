// Memory runs out at every allocation of every call in turn: each gives OutOfMemory or
// std::bad_alloc, leaves the session, the model and the files as they were, and leaks nothing (the
// leak checker of a sanitised build looks at the whole process).
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <new>
#include <string>
#include <vector>

#include "failing_allocator.h"
#include "mustafar/chat.h"
#include "mustafar/error.h"
#include "mustafar/session.h"
#include "support/tiny_model.h"

namespace mustafar {
namespace {

namespace fs = std::filesystem;

std::vector<int32_t> some_tokens(int n) {
  std::vector<int32_t> ids;
  for (int i = 0; i < n; i++) ids.push_back(i * 7 % 256);
  return ids;
}

std::vector<float> copy(std::span<const float> values) { return {values.begin(), values.end()}; }

std::string bytes_of(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

class AllocationFailure : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::write_tiny_model(folder_.path());
    model_.emplace(load());
    kv_.sparsity = 0.75;
    kv_.window = 16;
  }

  Model load() const {
    ModelOptions options;
    options.threads = 1;
    return Model::load(folder_.path(), options);
  }

  Session session(int n_tokens) const {
    Session s(*model_, kv_);
    if (n_tokens > 0) s.prefill(some_tokens(n_tokens));
    return s;
  }

  // Runs `call` with its first, second, ... allocation failing, that one alone and all later ones
  // with it in turn, until it gets through; `after` runs after every failure. Every one is tried up
  // to the 400th, then ever fewer.
  template <typename Call, typename After>
  void fail_each(const char* what, Call&& call, After&& after) {
    int failures = 0;
    for (int64_t n = 1;; n += 1 + std::max<int64_t>(0, n - 400) / 16) {
      ASSERT_LT(n, 1'000'000) << what;
      // The other way round every other time, so that both have their turn where few are tried.
      for (const bool and_all_later : {n % 2 == 0, n % 2 == 1}) {
        if (!fails_at(what, n, and_all_later, call)) {
          EXPECT_GT(failures, 0) << what;
          std::printf("%s: %d failures\n", what, failures);
          return;
        }
        failures++;
        after();
        if (HasFailure()) FAIL() << what << ": allocation " << n;
      }
    }
  }

  // Whether `call` threw for lack of memory.
  template <typename Call>
  static bool fails_at(const char* what, int64_t n, bool and_all_later, Call&& call) {
    bool thrown = true;
    std::string error;
    testing::fail_allocation(n, and_all_later);
    try {
      call();
      thrown = false;
    } catch (const OutOfMemory&) {
    } catch (const std::bad_alloc&) {
    } catch (const std::exception& other) {
      testing::stop_failing();
      error = other.what();
    }
    const bool failed = testing::stop_failing();
    EXPECT_EQ(error, "") << what << ": another error, allocation " << n;
    if (!thrown) {
      EXPECT_FALSE(failed) << what << ": allocation " << n << " failed, and nobody was told";
    }
    return thrown;
  }

  // A call on a session of n tokens: after each failure the session is as it was; in the end it is
  // as one that was never disturbed, to the bit.
  template <typename Call>
  void fail_each_on_session(const char* what, int n_tokens, Call&& call) {
    Session undisturbed = session(n_tokens), disturbed = session(n_tokens);
    const std::vector<int32_t> before = disturbed.tokens();
    const int64_t held = model_->memory().kv_bytes;
    call(undisturbed);
    const int64_t grown = model_->memory().kv_bytes - held;
    fail_each(
        what, [&] { call(disturbed); },
        [&] {
          EXPECT_EQ(disturbed.tokens(), before);
          EXPECT_EQ(disturbed.position(), static_cast<int64_t>(before.size()));
          EXPECT_EQ(model_->memory().kv_bytes, held + grown);
        });
    EXPECT_EQ(disturbed.tokens(), undisturbed.tokens()) << what;
    EXPECT_EQ(copy(disturbed.decode(5)), copy(undisturbed.decode(5))) << what;
    EXPECT_EQ(disturbed.memory().allocated, undisturbed.memory().allocated) << what;
  }

  testing::TemporaryFolder folder_;
  std::optional<Model> model_;
  KVConfig kv_;
};

TEST_F(AllocationFailure, LoadingAModel) {
  Session witness = session(30);
  fail_each("load", [&] { load(); }, [] {});
  Session other(load(), kv_);
  other.prefill(some_tokens(30));
  EXPECT_EQ(copy(witness.decode(5)), copy(other.decode(5)));
}

TEST_F(AllocationFailure, OpeningASession) {
  const int64_t held = model_->memory().kv_bytes;
  fail_each(
      "session", [&] { Session(*model_, kv_); },
      [&] { EXPECT_EQ(model_->memory().kv_bytes, held); });
}

TEST_F(AllocationFailure, PrefillThatCompresses) {
  fail_each_on_session("prefill", 0, [](Session& s) { s.prefill(some_tokens(200)); });
  fail_each_on_session("second prefill", 70, [](Session& s) { s.prefill(some_tokens(90)); });
}

TEST_F(AllocationFailure, DecodeThatCommitsABlock) {
  fail_each_on_session("decode", 30, [](Session& s) { s.decode(9); });
  fail_each_on_session("decode that grows the tail", 24, [](Session& s) { s.decode(9); });
  fail_each_on_session("first decode", 0, [](Session& s) { s.decode(9); });
  fail_each_on_session("commit", 79, [](Session& s) { s.decode(9); });
  kv_.k_policy = PrunePolicy::kOutputAware;
  kv_.value_dtype = ValueType::kInt8;
  fail_each_on_session("commit, output_aware", 79, [](Session& s) { s.decode(9); });
}

TEST_F(AllocationFailure, Rewind) {
  fail_each_on_session("rewind across blocks", 200, [](Session& s) { s.rewind(100); });
}

TEST_F(AllocationFailure, Score) {
  fail_each_on_session("score", 90, [](Session& s) { s.score(some_tokens(90)); });
}

TEST_F(AllocationFailure, DecodeBatch) {
  Session undisturbed = session(79), a = session(79), b = session(20);
  const std::vector<int32_t> next = {9, 9};
  const auto step = [&](Session& x) {
    Session* const both[] = {&x, &b};
    return Session::decode_batch(both, next);
  };
  fail_each(
      "decode_batch", [&] { step(a); },
      [&] {
        EXPECT_EQ(a.position(), 79);
        EXPECT_EQ(b.position(), 20);
      });
  b.rewind(20);
  step(undisturbed);
  EXPECT_EQ(copy(a.decode(5)), copy(undisturbed.decode(5)));
}

TEST_F(AllocationFailure, Fork) {
  Session original = session(90), control = session(90);
  std::optional<Session> fork;
  fail_each(
      "fork", [&] { fork.emplace(original.fork()); }, [&] { EXPECT_FALSE(fork.has_value()); });
  const std::vector<float> expected = copy(control.decode(5));
  ASSERT_TRUE(fork.has_value());
  EXPECT_EQ(copy(fork->decode(5)), expected);
  EXPECT_EQ(copy(original.decode(5)), expected);
}

TEST_F(AllocationFailure, SaveAndLoad) {
  Session s = session(90), other = session(30);
  const fs::path file = folder_.path() / "session";
  other.save(file);
  const std::string old = bytes_of(file);
  fail_each("save", [&] { s.save(file); }, [&] { EXPECT_TRUE(bytes_of(file) == old); });
  EXPECT_FALSE(bytes_of(file) == old);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_.path()), fs::directory_iterator()), 5)
      << "a temporary file stayed";
  const int64_t held = model_->memory().kv_bytes;
  std::optional<Session> loaded;
  fail_each(
      "load state", [&] { loaded.emplace(Session::load(*model_, file)); },
      [&] { EXPECT_EQ(model_->memory().kv_bytes, held); });
  ASSERT_TRUE(loaded.has_value());
  EXPECT_EQ(copy(loaded->decode(5)), copy(s.decode(5)));
}

TEST_F(AllocationFailure, Generate) {
  SamplingParams params;
  params.temperature = 0.7;
  params.seed = 3;
  params.max_new_tokens = 5;
  params.ignore_eos = true;
  Session undisturbed = session(70), disturbed = session(70);
  const GenerateResult expected = undisturbed.generate("Hello", params);
  GenerateResult actual;
  fail_each(
      "generate", [&] { actual = disturbed.generate("Hello", params); },
      [&] { EXPECT_EQ(disturbed.position(), 70); });
  EXPECT_EQ(actual.token_ids, expected.token_ids);
}

TEST_F(AllocationFailure, Chat) {
  Session s = session(0);
  Chat chat(s);
  SamplingParams params;
  params.temperature = 0;
  params.max_new_tokens = 3;
  chat.send("One", params);
  const std::string before = chat.messages_json();
  const auto as_before = [&] {
    while (chat.messages().size() > 2 && chat.undo()) {
    }
    EXPECT_EQ(chat.messages_json(), before);
    const std::vector<int32_t> prompt = chat.prompt_tokens();
    const std::vector<int32_t> held = s.tokens();
    ASSERT_LE(held.size(), prompt.size());
    EXPECT_TRUE(std::equal(held.begin(), held.end(), prompt.begin()));
  };
  const auto turn = [&] {
    chat.send("Two", params);
    chat.save(folder_.path() / "chat.json");
    chat.load(folder_.path() / "chat.json");
  };
  fail_each("chat", turn, as_before);
  EXPECT_EQ(chat.messages().size(), 4u);
}

}  // namespace
}  // namespace mustafar
