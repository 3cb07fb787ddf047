#include "core/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "mustafar/error.h"

namespace mustafar {
namespace {

// Repeats a system call that a signal interrupted: network file systems end any of them early.
template <typename Call>
auto uninterrupted(Call&& call) {
  for (;;) {
    const auto result = call();
    if (result >= 0 || errno != EINTR) return result;
  }
}

}  // namespace

AtomicFile::AtomicFile(std::filesystem::path target) : target_(std::move(target)) {
  static std::atomic<uint64_t> counter{0};
  // A name may be taken: by what a killed process left behind, or a writer on another machine.
  constexpr int kAttempts = 1000;
  for (int i = 0; i < kAttempts && fd_ < 0; i++) {
    temporary_ = target_;
    temporary_ += ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(counter++);
    fd_ = uninterrupted(
        [&] { return ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644); });
    if (fd_ < 0 && errno != EEXIST) break;
  }
  if (fd_ < 0) fail("cannot create");
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::fail(const char* what) const {
  const std::string reason = std::strerror(errno);
  throw Error(std::string(what) + " " + target_.string() + " (through " +
              temporary_.filename().string() + "): " + reason);
}

void AtomicFile::write(const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const size_t most = std::min(bytes, size_t{1} << 30);
    const ssize_t n = uninterrupted([&] { return ::write(fd_, p, most); });
    if (n < 0) fail("cannot write");
    p += n;
    bytes -= static_cast<size_t>(n);
    written_ += n;
  }
}

void AtomicFile::commit() {
  // Named before the rename: nothing may fail once the target has changed.
  const std::filesystem::path folder =
      target_.has_parent_path() ? target_.parent_path() : std::filesystem::path(".");
  if (uninterrupted([&] { return ::fsync(fd_); }) != 0) fail("cannot flush");
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) fail("cannot rename to");
  ::close(std::exchange(fd_, -1));
  // The rename survives a crash once the folder is flushed, which not every file system offers.
  const int directory = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory >= 0) {
    ::fsync(directory);
    ::close(directory);
  }
}

}  // namespace mustafar
