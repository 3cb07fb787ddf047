// Children that are forked while other threads are in the middle of something: they have what those
// did not use, are told of the rest, and never wait for threads that they do not have.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "core/fork.h"
#include "core/thread_pool.h"
#include "kv/block_pool.h"
#include "mustafar/chat.h"
#include "mustafar/engine.h"
#include "mustafar/error.h"
#include "mustafar/session.h"
#include "support/child_process.h"
#include "support/sampling.h"
#include "support/tiny_model.h"

namespace mustafar {
namespace {

using testing::in_child;

// ThreadSanitizer ends a child that starts a thread.
#if defined(__SANITIZE_THREAD__)
constexpr bool kChildMayStartThreads = false;
#else
constexpr bool kChildMayStartThreads = true;
#endif

template <typename Call>
std::string refusal_of(Call&& call) {
  try {
    call();
  } catch (const StateError& error) {
    return error.what();
  }
  return "not refused";
}

bool says(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// A thread that is in the middle of something until it is let go.
class Held {
 public:
  void hold() {
    held_ = true;
    held_.notify_all();
    free_.wait(false);
  }
  void wait_until_held() { held_.wait(false); }
  void let_go() {
    free_ = true;
    free_.notify_all();
  }

 private:
  std::atomic<bool> held_{false}, free_{false};
};

TEST(ProcessForkThreadTest, ARegionThatRunsDoesNotStopTheChild) {
  auto pool = std::make_unique<ThreadPool>(3);
  Held inside;
  std::thread caller([&] {
    pool->parallel_for(3, [&](int64_t i, int) {
      if (i == 0) inside.hold();
    });
  });
  inside.wait_until_held();
  EXPECT_TRUE(in_child([&]() -> std::string {
    int64_t sum = 0;
    pool->parallel_for(100, [&](int64_t i, int) { sum += i; });
    if (sum != 4950) return "the sum is " + std::to_string(sum);
    try {
      pool->parallel_for(9, [](int64_t i, int) {
        if (i == 5) throw std::runtime_error("planted");
      });
      return "nothing was thrown";
    } catch (const std::runtime_error&) {
    }
    // Threads of the child may lie where the parent's lay; the pool's end leaves them alone.
    std::vector<std::thread> own;
    for (int i = 0; kChildMayStartThreads && i < 8; i++) own.emplace_back([] {});
    pool.reset();
    for (std::thread& thread : own) thread.join();
    return "";
  }));
  inside.let_go();
  caller.join();
}

TEST(ProcessForkThreadTest, ForkWaitsForShortSections) {
  ForkSafeMutex outer, inner;
  int64_t a = 0, b = 0;
  std::atomic<bool> stop{false};
  std::vector<std::thread> changing;
  for (int t = 0; t < 3; t++) {
    changing.emplace_back([&] {
      while (!stop) {
        const std::lock_guard lock(outer);
        a++;
        std::this_thread::yield();
        const std::lock_guard nested(inner);
        b++;
      }
    });
  }
  for (int i = 0; i < 30 && !HasFailure(); i++) {
    EXPECT_TRUE(in_child([&]() -> std::string {
      {
        const std::lock_guard lock(outer);
        const std::lock_guard nested(inner);
        if (a != b) return std::to_string(a) + " and " + std::to_string(b);
      }
      return in_child([&] {
        const std::lock_guard lock(outer);
        return std::string();
      })
                 ? ""
                 : "the child's child failed";
    })) << i;
  }
  stop = true;
  for (std::thread& thread : changing) thread.join();
  EXPECT_EQ(a, b);
}

TEST(ProcessForkThreadTest, SeveralThreadsFork) {
  ForkSafeMutex mutex;
  std::vector<std::thread> forking;
  std::atomic<int> failed{0};
  for (int t = 0; t < 3; t++) {
    forking.emplace_back([&] {
      for (int i = 0; i < 10; i++) {
        {
          const std::lock_guard lock(mutex);
        }
        const bool fine = in_child([&] {
          const std::lock_guard lock(mutex);
          return std::string();
        });
        if (!fine) failed++;
      }
    });
  }
  for (std::thread& thread : forking) thread.join();
  EXPECT_EQ(failed, 0);
}

TEST(ProcessForkThreadTest, ALongSectionOfAnotherThreadIsRefused) {
  LongMutex mutex("it was being changed");
  Held inside;
  std::thread other([&] {
    const std::lock_guard lock(mutex);
    inside.hold();
  });
  inside.wait_until_held();
  const auto refused = [&]() -> std::string {
    for (int i = 0; i < 2; i++) {
      const std::string text = refusal_of([&] { const std::lock_guard lock(mutex); });
      if (text != "it was being changed") return text;
    }
    return "";
  };
  EXPECT_TRUE(in_child(refused));
  inside.let_go();
  other.join();
  EXPECT_TRUE(in_child([&]() -> std::string {
    const std::lock_guard lock(mutex);
    return "";
  }));
  // The thread that forked leaves its own section, and may enter again.
  mutex.lock();
  EXPECT_TRUE(in_child([&]() -> std::string {
    mutex.unlock();
    const std::lock_guard lock(mutex);
    return "";
  }));
  mutex.unlock();
}

class ModelForkThreadTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::write_tiny_model(folder_.path());
    ModelOptions options;
    options.threads = 2;
    model_.emplace(Model::load(folder_.path(), options));
  }

  // What a child does with the model and a session that no call used at the fork.
  std::string use(Session& idle, const std::vector<float>& expected) {
    const std::span<const float> row = idle.decode(5);
    if (std::vector<float>(row.begin(), row.end()) != expected) return "other logits";
    idle.rewind(3);
    Session fresh(*model_);
    if (fresh.generate("Hello there", testing::greedy(90)).token_ids.size() != 90)
      return "too few tokens";
    if (model_->generate(std::vector<Prompt>{"a", "b"}, testing::greedy(3)).size() != 2)
      return "no batch";
    Chat chat(fresh);
    if (chat.send("Who?", testing::greedy(4)).token_ids.empty()) return "no reply";
    const auto state = folder_.path() / ("state-" + std::to_string(::getpid()));
    fresh.save(state);
    Session loaded = Session::load(*model_, state);
    if (loaded.position() != fresh.position()) return "another state";
    fresh.score(model_->tokenizer().encode("a text"));
    if (model_->memory().kv_bytes <= 0) return "no memory counted";
    return "";
  }

  testing::TemporaryFolder folder_;
  std::optional<Model> model_;
};

TEST_F(ModelForkThreadTest, AtAnyMomentOfOtherThreads) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "the sanitizer's allocator has locks that are held in a child for ever";
#endif
  Session idle(*model_), copy(*model_);
  const std::vector<int32_t> ids(90, 7);
  idle.prefill(ids);
  copy.prefill(ids);
  const std::span<const float> row = copy.decode(5);
  const std::vector<float> expected(row.begin(), row.end());

  std::atomic<bool> stop{false};
  auto busy = std::make_unique<Session>(*model_);
  std::vector<std::thread> working;
  working.emplace_back([&] {
    while (!stop) {
      busy->generate("Hello", testing::greedy(70));
      busy->reset();
    }
  });
  working.emplace_back([&] {  // pages and budgets
    while (!stop) {
      Session session(*model_);
      session.prefill(ids);
      session.fork();
    }
  });
  for (int i = 0; i < 12 && !HasFailure(); i++) {
    EXPECT_TRUE(in_child([&]() -> std::string {
      std::string failure = use(idle, expected);
      if (!failure.empty()) return failure;
      try {
        busy->decode(1);
      } catch (const StateError& error) {
        if (!says(error.what(), "when this process was forked")) return error.what();
      }
      busy->cancel();
      busy->position();
      busy.reset();
      idle.close();
      model_.reset();
      return "";
    })) << i;
  }
  stop = true;
  for (std::thread& thread : working) thread.join();
  EXPECT_EQ(use(idle, expected), "");
}

TEST_F(ModelForkThreadTest, ASessionInACallIsRefusedInTheChild) {
  auto busy = std::make_unique<Session>(*model_);
  auto chat = std::make_unique<Chat>(*busy);
  auto reply = std::make_unique<ChatReply>(chat->start("Hello", testing::greedy(200)));
  Held inside;
  std::atomic<bool> first{true};
  busy->set_interrupt_check([&] {
    if (first.exchange(false)) inside.hold();
  });
  std::thread caller([&] {
    std::string piece;
    reply->step(piece);
  });
  inside.wait_until_held();
  EXPECT_TRUE(in_child([&]() -> std::string {
    std::string piece;
    const std::vector<std::function<void()>> calls = {
        [&] { busy->decode(1); },         [&] { busy->prefill(std::vector<int32_t>{1}); },
        [&] { busy->reset(); },           [&] { busy->close(); },
        [&] { reply->step(piece); },      [&] { chat->send("again"); },
        [&] { chat->add({"user", "x"}); }};
    for (const auto& call : calls) {
      const std::string text = refusal_of(call);
      if (!says(text, "when this process was forked")) return text;
    }
    busy->position();
    busy->memory();
    reply->stop();
    reply->result();
    if (chat->messages().size() != 1) return "other messages";
    reply.reset();
    chat.reset();
    busy.reset();
    Session fresh(*model_);
    return fresh.generate("a", testing::greedy(5)).token_ids.size() == 5 ? "" : "too few tokens";
  }));
  inside.let_go();
  caller.join();
  reply->stop();
  EXPECT_EQ(chat->messages().size(), 2);
}

TEST_F(ModelForkThreadTest, ACallThatForksGoesOnInBothProcesses) {
  Session alone(*model_), session(*model_);
  const std::string expected = alone.generate("Hello", testing::greedy(80)).text;
  bool forked = false, is_child = false;
  const auto generate = [&] {
    return session.generate("Hello", testing::greedy(80), [&](std::string_view) {
      if (forked) return true;
      forked = true;
      // The child comes out of this call too.
      is_child = ::fork() == 0;
      if (is_child) ::alarm(60);
      return true;
    });
  };
  const std::string text = generate().text;
  if (is_child) {
    session.decode(1);
    ::_exit(text == expected ? 0 : 1);
  }
  EXPECT_EQ(text, expected);
  int status = -1;
  ::wait(&status);
  EXPECT_EQ(status, 0);
}

TEST_F(ModelForkThreadTest, AnEngineThatWorksIsRefusedInTheChild) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "the sanitizer's allocator has locks that are held in a child for ever";
#endif
  auto engine = std::make_unique<Engine>(*model_, KVConfig(), EngineOptions());
  auto request = std::make_unique<Request>(engine->submit("Hello", testing::greedy(4000)));
  std::thread waiting([&] { request->wait(); });
  std::thread reading([&] { request->text_from(1 << 20, 30); });
  for (int i = 0; i < 5 && !HasFailure(); i++) {
    EXPECT_TRUE(in_child([&]() -> std::string {
      const std::vector<std::function<void()>> calls = {
          [&] { engine->submit("a", testing::greedy(1)); },
          [&] { engine->stats(); },
          [&] { request->wait(); },
          [&] { request->cancel(); },
          [&] { request->result(); },
          [&] { request->text_from(0, 0); }};
      for (const auto& call : calls) {
        const std::string text = refusal_of(call);
        if (!says(text, "forked from")) return text;
      }
      engine->close();
      request.reset();
      engine.reset();
      if (!kChildMayStartThreads) return "";
      Engine own(*model_, KVConfig(), EngineOptions());
      return own.submit("a", testing::greedy(5)).result().token_ids.size() == 5 ? ""
                                                                                : "too few tokens";
    })) << i;
  }
  request->cancel();
  waiting.join();
  reading.join();
}

TEST_F(ModelForkThreadTest, ARequestThatHasEndedMayBeDroppedBesideItsWaiters) {
  Engine engine(*model_, KVConfig(), EngineOptions());
  auto request = std::make_unique<Request>(engine.submit("Hello", testing::greedy(2)));
  request->wait();
  Held inside;
  std::thread told([&] {  // inside the request's own lock and its waiters' list
    request->set_on_change([&] { inside.hold(); });
  });
  inside.wait_until_held();
  EXPECT_TRUE(in_child([&]() -> std::string {
    request.reset();
    return "";
  }));
  inside.let_go();
  told.join();
}

}  // namespace
}  // namespace mustafar
