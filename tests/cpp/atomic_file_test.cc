// Files that appear whole or not at all, while the system interrupts, shortens and refuses calls:
// the linker puts the functions below in place of open, write and fsync (tests/CMakeLists.txt).
#include "core/atomic_file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "mustafar/error.h"
#include "mustafar/session.h"
#include "support/tiny_model.h"

namespace {

// What befalls the calls of this thread while `on`: a third is interrupted, a third of the writes
// is cut short; those numbered write_error and fsync_error fail for good.
struct Faults {
  bool on = false;
  std::mt19937 random{1};
  int64_t writes = 0, fsyncs = 0;
  int64_t write_error = -1, fsync_error = -1;
  int64_t interrupted = 0, shortened = 0;

  bool interrupt() {
    if (!on || random() % 3 != 0) return false;
    interrupted++;
    errno = EINTR;
    return true;
  }
};
thread_local Faults faults;

bool fail(int error) {
  errno = error;
  return true;
}

}  // namespace

extern "C" {
int __real_open(const char* path, int flags, mode_t mode);
ssize_t __real_write(int fd, const void* data, size_t bytes);
int __real_fsync(int fd);

int __wrap_open(const char* path, int flags, ...) {
  if (faults.interrupt()) return -1;
  va_list list;
  va_start(list, flags);
  const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(list, mode_t) : 0;
  va_end(list);
  return __real_open(path, flags, mode);
}

ssize_t __wrap_write(int fd, const void* data, size_t bytes) {
  if (faults.interrupt()) return -1;
  if (faults.on && faults.writes++ == faults.write_error && fail(ENOSPC)) return -1;
  if (faults.on && bytes > 1 && faults.random() % 3 == 0) {
    faults.shortened++;
    bytes = 1 + faults.random() % (bytes - 1);
  }
  return __real_write(fd, data, bytes);
}

int __wrap_fsync(int fd) {
  if (faults.interrupt()) return -1;
  if (faults.on && faults.fsyncs++ == faults.fsync_error && fail(EIO)) return -1;
  return __real_fsync(fd);
}
}

namespace mustafar {
namespace {

namespace fs = std::filesystem;

class WithFaults {
 public:
  explicit WithFaults(uint32_t seed) {
    faults = Faults();
    faults.random.seed(seed);
    faults.on = true;
  }
  ~WithFaults() { faults.on = false; }
  WithFaults(const WithFaults&) = delete;
};

std::string bytes_of(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

std::string content(size_t bytes, uint32_t seed) {
  std::mt19937 random(seed);
  std::string text(bytes, '\0');
  for (char& c : text) c = static_cast<char>(random());
  return text;
}

// In pieces of all sizes.
void write_in_pieces(AtomicFile& file, const std::string& text, uint32_t seed) {
  std::mt19937 random(seed);
  for (size_t at = 0; at < text.size();) {
    const size_t n = std::min<size_t>(1 + random() % 5000, text.size() - at);
    file.write(text.data() + at, n);
    at += n;
  }
}

class AtomicFileTest : public ::testing::Test {
 protected:
  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const auto& entry : fs::directory_iterator(folder_.path())) {
      out.push_back(entry.path().filename());
    }
    return out;
  }

  testing::TemporaryFolder folder_;
  const fs::path target_ = folder_.path() / "target";
};

TEST_F(AtomicFileTest, InterruptedAndShortCallsLeaveNoTrace) {
  int64_t interrupted = 0, shortened = 0;
  for (uint32_t seed = 0; seed < 20; seed++) {
    const std::string text = content(seed * 3001, seed);
    WithFaults with(seed);
    AtomicFile file(target_);
    write_in_pieces(file, text, seed);
    EXPECT_EQ(file.written_bytes(), static_cast<int64_t>(text.size()));
    file.commit();
    EXPECT_TRUE(bytes_of(target_) == text) << seed;
    interrupted += faults.interrupted;
    shortened += faults.shortened;
  }
  EXPECT_GT(interrupted, 20);
  EXPECT_GT(shortened, 20);
  EXPECT_EQ(names(), std::vector<std::string>{"target"});
}

TEST_F(AtomicFileTest, ErrorsKeepTheOldFile) {
  std::ofstream(target_) << "old";
  const std::string text = content(20000, 1);
  for (int64_t n = 0; n < 5; n++) {
    WithFaults with(static_cast<uint32_t>(n));
    (n == 4 ? faults.fsync_error : faults.write_error) = n % 4;
    try {
      AtomicFile file(target_);
      write_in_pieces(file, text, 1);
      file.commit();
      ADD_FAILURE() << "error " << n << " went unnoticed";
    } catch (const Error& error) {
      const char* reason = n == 4 ? "cannot flush" : "No space left";
      EXPECT_NE(std::string(error.what()).find(reason), std::string::npos) << error.what();
    }
    EXPECT_EQ(bytes_of(target_), "old");
    EXPECT_EQ(names(), std::vector<std::string>{"target"});
  }
}

TEST_F(AtomicFileTest, ThreadsWritingOneFileNeverMix) {
  std::vector<std::string> texts;
  for (uint32_t i = 0; i < 3; i++) texts.push_back(content(30000 + i * 777, i));
  const auto is_whole = [&](const std::string& text) {
    return std::find(texts.begin(), texts.end(), text) != texts.end();
  };
  std::ofstream(target_, std::ios::binary) << texts[0];
  std::atomic<int> writing{3};
  std::vector<std::thread> writers;
  for (uint32_t i = 0; i < 3; i++) {
    writers.emplace_back([&, i] {
      WithFaults with(i);
      for (int round = 0; round < 30; round++) {
        AtomicFile file(target_);
        write_in_pieces(file, texts[i], round);
        file.commit();
      }
      writing--;
    });
  }
  while (writing > 0) EXPECT_TRUE(is_whole(bytes_of(target_)));
  for (std::thread& writer : writers) writer.join();
  EXPECT_TRUE(is_whole(bytes_of(target_)));
  EXPECT_EQ(names(), std::vector<std::string>{"target"});
}

// A killed process leaves its temporary file; another may have its number, as in a container.
TEST_F(AtomicFileTest, LeftoversOfAKilledProcessDoNotStandInTheWay) {
  std::vector<std::string> left;
  {
    AtomicFile file(target_);
    const std::string name = names().at(0);
    const size_t dash = name.rfind('-') + 1;
    for (int i = 1; i <= 3; i++) {
      left.push_back(name.substr(0, dash) + std::to_string(std::stoi(name.substr(dash)) + i));
    }
  }
  for (const std::string& name : left) std::ofstream(folder_.path() / name) << "left";
  AtomicFile file(target_);
  file.write("new", 3);
  file.commit();
  EXPECT_EQ(bytes_of(target_), "new");
  for (const std::string& name : left) EXPECT_EQ(bytes_of(folder_.path() / name), "left");
}

TEST_F(AtomicFileTest, ASessionSavedUnderFaultsGoesOnAlike) {
  testing::write_tiny_model(folder_.path());
  ModelOptions options;
  options.threads = 1;
  const Model model = Model::load(folder_.path(), options);
  Session session(model);
  std::vector<int32_t> ids(200);
  for (size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<int32_t>(i * 7 % 256);
  session.prefill(ids);
  for (uint32_t seed = 0; seed < 10; seed++) {
    {
      WithFaults with(seed);
      session.save(target_);
      EXPECT_GT(faults.interrupted, 0);
    }
    Session other = Session::load(model, target_);
    const std::span<const float> expected = session.decode(5), actual = other.decode(5);
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), actual.begin(), actual.end()));
  }
}

}  // namespace
}  // namespace mustafar
