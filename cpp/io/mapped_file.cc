#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "mustafar/error.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace mustafar {
namespace {

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& what) {
  throw ModelError(path.string() + ": " + what);
}

const char* kind_of(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISSOCK(mode)) return "a socket";
  if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
  return "a special file";
}

void require_regular(const std::filesystem::path& path, mode_t mode) {
  if (!S_ISREG(mode)) fail(path, std::string("expected a regular file, found ") + kind_of(mode));
}

std::string changed_size(size_t before, int64_t now) {
  return "changed size while it is in use: expected " + std::to_string(before) +
         " bytes, the file has " + std::to_string(now);
}

}  // namespace

MappedFile MappedFile::open(const std::filesystem::path& path) {
  struct stat status{};
  // Looked at before it is opened: opening a FIFO may block, opening a device may act on it.
  if (::stat(path.c_str(), &status) != 0) {
    const std::string why = std::string("cannot be opened: ") + std::strerror(errno);
    if (errno == ENOENT) throw Missing<ModelError>(path.string() + ": " + why);
    fail(path, why);
  }
  require_regular(path, status.st_mode);

  MappedFile file;
  file.path_ = path;
  do {
    file.fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  } while (file.fd_ < 0 && errno == EINTR);
  if (file.fd_ < 0) fail(path, std::string("cannot be opened: ") + std::strerror(errno));
  if (::fstat(file.fd_, &status) != 0) {
    fail(path, std::string("cannot be examined: ") + std::strerror(errno));
  }
  require_regular(path, status.st_mode);

  file.bytes_ = static_cast<size_t>(status.st_size);
  if (file.bytes_ > 0) {
    void* mapped = ::mmap(nullptr, file.bytes_, PROT_READ, MAP_SHARED, file.fd_, 0);
    if (mapped == MAP_FAILED) {
      const int error = errno;
      fail(path,
           "cannot be mapped (" + std::to_string(file.bytes_) + " bytes): " + std::strerror(error));
    }
    file.data_ = static_cast<const uint8_t*>(mapped);
    file.guard_ = MappingGuard(mapped, file.bytes_);
  }
  return file;
}

MappedFile::~MappedFile() {
  guard_ = {};  // before the addresses become another's
  if (data_ != nullptr) ::munmap(const_cast<uint8_t*>(data_), bytes_);
  if (fd_ >= 0) ::close(fd_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      fd_(std::exchange(other.fd_, -1)),
      guard_(std::move(other.guard_)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(fd_, other.fd_);
  std::swap(guard_, other.guard_);
  return *this;
}

int64_t MappedFile::size_now() const {
  if (fd_ < 0) return static_cast<int64_t>(bytes_);
  struct stat status{};
  if (::fstat(fd_, &status) != 0) {
    fail(path_, std::string("cannot be examined: ") + std::strerror(errno));
  }
  return status.st_size;
}

void MappedFile::check_read() const {
  const int64_t now = size_now();
  if (now < static_cast<int64_t>(bytes_)) fail(path_, changed_size(bytes_, now));
  if (guard_.lost()) {
    fail(path_, "lost bytes while it is in use: it was cut short for a time, or can't be read");
  }
}

void MappedFile::verify() const {
  check_read();
  const int64_t now = size_now();
  if (now != static_cast<int64_t>(bytes_)) fail(path_, changed_size(bytes_, now));
}

void MappedFile::will_need() const {
  if (data_ != nullptr) ::madvise(const_cast<uint8_t*>(data_), bytes_, MADV_WILLNEED);
}

void MappedFile::release(size_t begin, size_t end) const {
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  begin = (begin + page - 1) / page * page;
  end = std::min(end, bytes_) / page * page;
  if (begin < end) ::madvise(const_cast<uint8_t*>(data_) + begin, end - begin, MADV_DONTNEED);
}

void MappedFile::prefault(size_t begin, size_t end) const {
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  end = std::min(end, bytes_);
  begin = begin / page * page;
  if (begin >= end) return;
  verify();
  int result;
  do {
    result = ::madvise(const_cast<uint8_t*>(data_) + begin, end - begin, MADV_POPULATE_READ);
  } while (result != 0 && (errno == EINTR || errno == EAGAIN));
  if (result == 0) return;
  const int error = errno;
  if (error != EINVAL) {
    verify();  // the better message, where the file was truncated meanwhile
    fail(path_, "cannot be read at bytes " + std::to_string(begin) + " to " + std::to_string(end) +
                    ": " + std::strerror(error));
  }
  // An older kernel: touch every page by hand.
  for (size_t at = begin; at < end; at += page) {
    [[maybe_unused]] const uint8_t touched = *static_cast<const volatile uint8_t*>(data_ + at);
  }
}

}  // namespace mustafar
