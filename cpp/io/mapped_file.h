// A regular file mapped read-only.
//
// Symbolic links are followed, since model caches link into a blob store, but what is opened must
// be a regular file: a FIFO, directory, socket or device is refused before it is opened.
//
// A file that is made shorter by somebody else while it is mapped loses its pages: reading one
// gives zeros then (io/mapping_guard.h), and so do bytes that are cut off inside the last page. Who
// reads asks check_read() before what was read is used. The size is taken once, from the open file;
// verify() compares it with the file as it is now, and prefault() reads pages in a way that reports
// a missing one as an error. Files that are replaced (written anew and renamed), as downloads and
// updates are, keep their pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>

#include "io/mapping_guard.h"

namespace mustafar {

class MappedFile {
 public:
  MappedFile() = default;
  // Throws ModelError naming the path and the reason.
  static MappedFile open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const uint8_t* data() const { return data_; }  // [bytes], aligned to a page; null when empty
  size_t bytes() const { return bytes_; }
  const std::filesystem::path& path() const { return path_; }

  // Throws ModelError if the file no longer has the size it was mapped with, or as check_read().
  void verify() const;
  // Throws ModelError where bytes that were read may not have been the file's: it has lost some
  // since it was mapped.
  void check_read() const;
  // Tells the kernel that the whole file will be read soon. Only a hint.
  void will_need() const;
  // Brings the pages of [begin, end) into memory; throws ModelError where the file lost them.
  void prefault(size_t begin, size_t end) const;
  // Takes the whole pages of [begin, end) out of this process; reading brings them back. Only a
  // hint.
  void release(size_t begin, size_t end) const;

 private:
  int64_t size_now() const;

  std::filesystem::path path_;
  const uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  int fd_ = -1;  // kept for its size
  MappingGuard guard_;
};

}  // namespace mustafar
