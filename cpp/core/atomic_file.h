// A file that appears whole or not at all: written beside its target, flushed to disk, renamed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>

namespace mustafar {

class AtomicFile {
 public:
  // Creates the temporary file in the target's folder. Throws Error naming path and reason, as the
  // other calls do; the target stays as it was until commit().
  explicit AtomicFile(std::filesystem::path target);
  ~AtomicFile();  // without commit(): removes the temporary file
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  int64_t written_bytes() const { return written_; }
  void commit();

 private:
  [[noreturn]] void fail(const char* what) const;

  std::filesystem::path target_, temporary_;
  int fd_ = -1;
  int64_t written_ = 0;
};

}  // namespace mustafar
