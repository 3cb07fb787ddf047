// Files that are cut short while they are mapped: an error that names them, on whichever thread and
// at whatever moment, and never the end of the process; every other SIGBUS stays the program's.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "core/thread_pool.h"
#include "io/json_file.h"
#include "io/mapped_file.h"
#include "mustafar/engine.h"
#include "mustafar/error.h"
#include "mustafar/session.h"
#include "support/child_process.h"
#include "support/sampling.h"
#include "support/tiny_model.h"

namespace mustafar {
namespace {

namespace fs = std::filesystem;
using testing::status_of_child;

size_t page() { return static_cast<size_t>(::sysconf(_SC_PAGESIZE)); }

uint8_t read_byte(const uint8_t* at) { return *static_cast<const volatile uint8_t*>(at); }

class LostFileTest : public ::testing::Test {
 protected:
  fs::path pages(const std::string& name, size_t n) const {
    return folder_.write(name, std::string(n * page(), 'x'));
  }

  testing::TemporaryFolder folder_;
};

TEST_F(LostFileTest, PagesThatHaveGoneReadAsZerosAndAreTold) {
  const fs::path path = pages("a", 4);
  MappedFile file = MappedFile::open(path);
  EXPECT_EQ(read_byte(file.data() + 2 * page()), 'x');
  file.check_read();
  fs::resize_file(path, page());
  const MappedFile moved = std::move(file);
  EXPECT_EQ(read_byte(moved.data() + 2 * page() + 5), 0);
  EXPECT_EQ(read_byte(moved.data() + 3 * page()), 0);
  EXPECT_EQ(read_byte(moved.data()), 'x');
  EXPECT_MODEL_ERROR(moved.check_read(), "changed size while it is in use");
  EXPECT_MODEL_ERROR(moved.check_read(), path.string());
  fs::resize_file(path, 4 * page());
  EXPECT_MODEL_ERROR(moved.check_read(), "lost bytes while it is in use");
  EXPECT_MODEL_ERROR(moved.verify(), "lost bytes while it is in use");
  MappedFile::open(path).check_read();
}

TEST_F(LostFileTest, BytesInsideTheLastPageAreToldTheSame) {
  const fs::path path = pages("a", 2);
  const MappedFile file = MappedFile::open(path);
  fs::resize_file(path, 2 * page() - 1);
  EXPECT_EQ(read_byte(file.data() + 2 * page() - 1), 0);
  EXPECT_MODEL_ERROR(file.check_read(), "changed size while it is in use");
}

TEST_F(LostFileTest, WhatIsReplacedOrGrowsIsRead) {
  const fs::path path = pages("a", 2);
  const MappedFile file = MappedFile::open(path);
  fs::resize_file(path, 3 * page());
  file.check_read();
  fs::rename(folder_.write("b", "short"), path);
  EXPECT_EQ(read_byte(file.data() + page()), 'x');
  file.check_read();
}

TEST_F(LostFileTest, EveryThreadMayMeetALostPage) {
  constexpr int kThreads = 3;
  const fs::path path = pages("a", kThreads + 1);
  const MappedFile file = MappedFile::open(path);
  fs::resize_file(path, 1);
  ThreadPool pool(kThreads);
  // Each on a thread of its own, the last pages first: those before them are still to be lost.
  std::atomic<int> next{kThreads};
  std::atomic<int> zeros{0};
  pool.parallel_for(kThreads, [&](int64_t i, int) {
    const int mine = static_cast<int>(kThreads - i);
    while (next != mine) std::this_thread::yield();
    if (read_byte(file.data() + mine * page()) == 0) zeros++;
    next--;
    while (next != 0) std::this_thread::yield();
  });
  EXPECT_EQ(zeros, kThreads);
  EXPECT_MODEL_ERROR(file.check_read(), "changed size");
}

TEST_F(LostFileTest, OfManyFilesOnlyTheOneThatLostBytesSaysSo) {
  std::vector<MappedFile> files;
  for (int i = 0; i < 100; i++) files.push_back(MappedFile::open(pages(std::to_string(i), 1)));
  for (int i : {0, 40, 99}) {
    fs::resize_file(folder_.path() / std::to_string(i), 0);
    EXPECT_EQ(read_byte(files[i].data()), 0);
  }
  for (int i = 0; i < 100; i++) {
    const bool lost = i == 0 || i == 40 || i == 99;
    EXPECT_EQ(read_byte(files[i].data()), lost ? 0 : 'x') << i;
  }
}

// A page of nobody's that can't be read.
const uint8_t* foreign_page(const fs::path& path) {
  FILE* const file = std::fopen(path.c_str(), "r+");
  void* const mapped = ::mmap(nullptr, page(), PROT_READ, MAP_SHARED, ::fileno(file), 0);
  const bool cut = ::ftruncate(::fileno(file), 0) == 0;
  return cut && mapped != MAP_FAILED ? static_cast<const uint8_t*>(mapped) : nullptr;
}

std::atomic<int> faults_seen{0}, signals_seen{0};
std::atomic<const void*> last_address{nullptr};
struct sigaction beneath{};

// As a program's own: makes the page readable.
void repair(int, siginfo_t* info, void*) {
  if (info->si_code <= 0) {
    signals_seen++;
    return;
  }
  faults_seen++;
  last_address = info->si_addr;
  ::mmap(info->si_addr, page(), PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

void repair_without_info(int) {
  signals_seen++;
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  ::mmap(const_cast<void*>(last_address.load()), page(), PROT_READ,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

void pass_on(int signal, siginfo_t* info, void* context) {
  signals_seen++;
  beneath.sa_sigaction(signal, info, context);
}

struct sigaction handler(void (*function)(int, siginfo_t*, void*), int flags = 0) {
  struct sigaction action{};
  action.sa_sigaction = function;
  action.sa_flags = SA_SIGINFO | flags;
  sigemptyset(&action.sa_mask);
  return action;
}

struct sigaction plain_handler(void (*function)(int), int flags = 0) {
  struct sigaction action{};
  action.sa_handler = function;
  action.sa_flags = flags;
  sigemptyset(&action.sa_mask);
  return action;
}

struct sigaction current() {
  struct sigaction now{};
  ::sigaction(SIGBUS, nullptr, &now);
  return now;
}

// Each in a child, whose handlers are nobody else's.
class SigbusTest : public LostFileTest {
 protected:
  void SetUp() override {
    own_ = pages("own", 2);
    foreign_ = pages("foreign", 1);
  }

  // A file of which everything is lost.
  MappedFile open_lost() const {
    MappedFile file = MappedFile::open(pages("own", 2));
    fs::resize_file(own_, 0);
    return file;
  }

  fs::path own_, foreign_;
};

TEST_F(SigbusTest, OthersReachTheHandlerThatWasThere) {
  EXPECT_EQ(status_of_child([&] {
              const struct sigaction before = handler(repair);
              ::sigaction(SIGBUS, &before, nullptr);
              {
                const MappedFile file = open_lost();
                const uint8_t* const foreign = foreign_page(foreign_);
                if (read_byte(foreign) != 0 || faults_seen != 1 || last_address != foreign) {
                  return false;
                }
                if (read_byte(file.data()) != 0 || faults_seen != 1) return false;
                ::raise(SIGBUS);
                ::kill(::getpid(), SIGBUS);
                if (signals_seen != 2) return false;
              }
              return current().sa_sigaction == repair;
            }),
            0);
}

TEST_F(SigbusTest, AHandlerWithoutInformationIsCalledAsOne) {
  EXPECT_EQ(status_of_child([&] {
              const struct sigaction before = plain_handler(repair_without_info, SA_NODEFER);
              ::sigaction(SIGBUS, &before, nullptr);
              const MappedFile file = open_lost();
              last_address = foreign_page(foreign_);
              return read_byte(static_cast<const uint8_t*>(last_address.load())) == 0 &&
                     signals_seen == 1 && read_byte(file.data()) == 0 && signals_seen == 1;
            }),
            0);
}

TEST_F(SigbusTest, WithoutAHandlerOthersEndTheProcess) {
  for (const bool ignored : {false, true}) {
    const struct sigaction before = plain_handler(ignored ? SIG_IGN : SIG_DFL);
    const int fault = status_of_child([&] {
      ::sigaction(SIGBUS, &before, nullptr);
      const MappedFile file = open_lost();
      return read_byte(file.data()) == 0 && read_byte(foreign_page(pages("f", 1))) == 0;
    });
    EXPECT_TRUE(WIFSIGNALED(fault) && WTERMSIG(fault) == SIGBUS) << fault;
    const int sent = status_of_child([&] {
      ::sigaction(SIGBUS, &before, nullptr);
      const MappedFile file = MappedFile::open(own_);
      ::raise(SIGBUS);
      return true;
    });
    EXPECT_EQ(WIFSIGNALED(sent), !ignored) << sent;
  }
}

TEST_F(SigbusTest, AHandlerForOneCallIsCalledOnce) {
  const int status = status_of_child([&] {
    const struct sigaction before = handler(repair, static_cast<int>(SA_RESETHAND));
    ::sigaction(SIGBUS, &before, nullptr);
    const MappedFile file = open_lost();
    if (read_byte(foreign_page(foreign_)) != 0 || faults_seen != 1) return true;
    read_byte(foreign_page(pages("second", 1)));
    return true;
  });
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS) << status;
}

TEST_F(SigbusTest, OneThatIsPutOnTopStaysThere) {
  EXPECT_EQ(status_of_child([&] {
              const struct sigaction before = handler(repair);
              ::sigaction(SIGBUS, &before, nullptr);
              const struct sigaction top = handler(pass_on);
              {
                const MappedFile file = open_lost();
                ::sigaction(SIGBUS, &top, &beneath);
                if (read_byte(file.data()) != 0 || signals_seen != 1) return false;
              }
              if (current().sa_sigaction != pass_on) return false;
              // A later file is guarded through it, and others go all the way down.
              const MappedFile later = MappedFile::open(pages("later", 1));
              if (current().sa_sigaction != pass_on) return false;
              fs::resize_file(folder_.path() / "later", 0);
              if (read_byte(later.data()) != 0 || signals_seen != 2 || faults_seen != 0) {
                return false;
              }
              return read_byte(foreign_page(foreign_)) == 0 && signals_seen == 3 &&
                     faults_seen == 1;
            }),
            0);
}

TEST_F(SigbusTest, OneThatWasTakenOutComesBack) {
  EXPECT_EQ(status_of_child([&] {
              const MappedFile first = MappedFile::open(pages("first", 1));
              const struct sigaction standard = plain_handler(SIG_DFL);
              ::sigaction(SIGBUS, &standard, nullptr);
              const MappedFile file = open_lost();
              return read_byte(file.data()) == 0;
            }),
            0);
}

TEST_F(SigbusTest, TheEnvironmentLeavesItToTheProgram) {
  EXPECT_EQ(status_of_child([&] {
              ::setenv("MUSTAFAR_SIGBUS", "off", 1);
              const struct sigaction before = handler(repair);
              ::sigaction(SIGBUS, &before, nullptr);
              const MappedFile file = open_lost();
              if (current().sa_sigaction != repair) return false;
              return read_byte(file.data()) == 0 && faults_seen == 1;
            }),
            0);
}

class LostWeightsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::write_tiny_model(folder_.path());
    testing::write_tiny_model(whole_.path());
  }

  Model load(const std::string& weights = "auto", std::function<void()> progress = {}) const {
    ModelOptions options;
    options.threads = 2;
    options.weights = weights;
    if (progress) options.progress = [progress](int64_t, int64_t) { progress(); };
    return Model::load(folder_.path(), options);
  }
  fs::path file() const { return folder_.path() / "model.safetensors"; }
  void cut() const { fs::resize_file(file(), 100); }

  testing::TemporaryFolder folder_, whole_;
};

TEST_F(LostWeightsTest, BetweenTwoStepsTheSessionStaysAsItWas) {
  Model model = load();
  Session session(model);
  session.prefill(std::vector<int32_t>(300, 7));
  session.decode(8);
  const std::vector<int32_t> tokens = session.tokens();
  Session other = session.fork();
  cut();
  const std::vector<std::function<void()>> calls = {
      [&] { session.decode(5); },
      [&] { session.prefill(std::vector<int32_t>{1, 2, 3}); },
      [&] { session.generate("on", testing::greedy(5)); },
      [&] { session.score(std::vector<int32_t>{1, 2, 3}); },
      [&] {
        Session* const both[] = {&session, &other};
        Session::decode_batch(both, std::vector<int32_t>{1, 2});
      },
      [&] { session.rewind(100); },
      [&] { model.generate(std::vector<Prompt>{"a", "b"}, testing::greedy(2)); }};
  for (const auto& call : calls) {
    EXPECT_MODEL_ERROR(call(), file().string() + ": changed size while it is in use");
    EXPECT_EQ(session.tokens(), tokens);
  }
  // What it holds is whole: saved, and read by a model whose file is, it goes on.
  session.save(folder_.path() / "state");
  Session loaded = Session::load(Model::load(whole_.path()), folder_.path() / "state");
  Session expected(Model::load(whole_.path()));
  expected.prefill(std::vector<int32_t>(300, 7));
  expected.decode(8);
  const std::span<const float> a = loaded.decode(5), b = expected.decode(5);
  EXPECT_EQ(std::vector<float>(a.begin(), a.end()), std::vector<float>(b.begin(), b.end()));
}

TEST_F(LostWeightsTest, InTheMiddleOfAForward) {
  const Model model = load();
  Session session(model);
  session.prefill(std::vector<int32_t>{1, 2, 3});
  int64_t parts = 0;
  EXPECT_MODEL_ERROR(session.prefill(std::vector<int32_t>(700, 7),
                                     [&](int64_t, int64_t) {
                                       if (parts++ == 0) cut();
                                     }),
                     "changed size while it is in use");
  EXPECT_GT(parts, 0);
  EXPECT_EQ(session.position(), 3);
}

TEST_F(LostWeightsTest, CutForAMomentIsToldToo) {
  const Model model = load();
  Session session(model);
  const std::vector<int32_t> ids(700, 7);
  const auto bytes = fs::file_size(file());
  EXPECT_THROW(session.prefill(ids, [&](int64_t, int64_t) { cut(); }), ModelError);
  fs::resize_file(file(), bytes);
  // Its bytes are zeros now. That the model has met them is not forgotten.
  EXPECT_MODEL_ERROR(session.decode(1), "lost bytes while it is in use");
}

TEST_F(LostWeightsTest, WhileAThreadGenerates) {
  const Model model = load();
  Session session(model);
  std::atomic<int> made{0};
  std::thread cutting([&] {
    while (made < 20) std::this_thread::yield();
    cut();
  });
  Generation generation = session.start("Hello", testing::greedy(100000));
  const int64_t prompt = session.position();
  std::string piece;
  const auto run = [&] {
    while (generation.step(piece)) made++;
  };
  EXPECT_MODEL_ERROR(run(), "changed size while it is in use");
  cutting.join();
  EXPECT_GE(generation.result().token_ids.size(), 20u);
  EXPECT_EQ(session.position(),
            prompt + static_cast<int64_t>(generation.result().token_ids.size()));
}

TEST_F(LostWeightsTest, EveryRequestOfAnEngineFails) {
  const Model model = load();
  Engine engine(model, KVConfig(), EngineOptions());
  Request first = engine.submit("Hello", testing::greedy(4000)),
          second = engine.submit("a", testing::greedy(4000));
  first.text_from(0);
  cut();
  EXPECT_MODEL_ERROR(first.result(), "changed size while it is in use");
  EXPECT_MODEL_ERROR(second.result(), "changed size while it is in use");
  Request third = engine.submit("a", testing::greedy(4));
  EXPECT_MODEL_ERROR(third.result(), "changed size while it is in use");
  EXPECT_EQ(engine.stats().failed, 3);
}

TEST_F(LostWeightsTest, WhileItIsLoaded) {
  for (const char* weights : {"auto", "int8:row"}) {
    testing::write_tiny_model(folder_.path());
    EXPECT_MODEL_ERROR(load(weights, [&] { cut(); }), "changed size while it is in use");
  }
}

TEST_F(LostWeightsTest, QuantisedOnLoadingItNeedsTheFileNoMore) {
  Session session(load("int8:row")), expected(load("int8:row"));
  const std::string text = expected.generate("Hello", testing::greedy(50)).text;
  cut();
  EXPECT_EQ(session.generate("Hello", testing::greedy(50)).text, text);
}

TEST_F(LostWeightsTest, StateAndJsonFilesThatChangeWhileTheyAreRead) {
  const Model model = load();
  Session session(model);
  session.prefill(std::vector<int32_t>(900, 7));
  const fs::path state = folder_.path() / "state";
  const fs::path json = folder_.path() / "config.json";
  session.save(state);
  const auto state_bytes = fs::file_size(state), json_bytes = fs::file_size(json);
  std::atomic<bool> stop{false};
  std::thread changing([&] {
    for (int i = 0; !stop; i++) {
      fs::resize_file(state, i % 2 == 0 ? page() * (i % 7) : state_bytes);
      fs::resize_file(json, i % 2 == 0 ? i % 300 : json_bytes);
    }
  });
  int refused = 0;
  for (int i = 0; i < 200; i++) {
    try {
      Session::load(model, state);
    } catch (const StateError&) {
      refused++;
    }
    try {
      read_json_file(json, 1 << 20);
    } catch (const ModelError&) {
      refused++;
    }
  }
  stop = true;
  changing.join();
  EXPECT_GT(refused, 0);
}

}  // namespace
}  // namespace mustafar
