// An owned, aligned, move-only block of host memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mustafar {

class HostBuffer {
 public:
  static constexpr size_t kAlignment = 128;
  static constexpr size_t kHugePage = size_t{2} << 20;

  HostBuffer() = default;
  // Uninitialised memory, aligned to kAlignment; throws std::bad_alloc. From one huge page on it is
  // aligned to one and asks Linux for them: attention jumps from slot to slot, and walking tables
  // of small pages then costs more than the bytes.
  explicit HostBuffer(size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    const size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    data_ = rounded < bytes ? nullptr : std::aligned_alloc(alignment, rounded);
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: it may be refused
#endif
  }
  ~HostBuffer() { std::free(data_); }
  HostBuffer(HostBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  HostBuffer& operator=(HostBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  void* data() { return data_; }
  const void* data() const { return data_; }
  template <typename T>
  T* as() {
    return static_cast<T*>(data_);
  }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data_);
  }
  size_t bytes() const { return bytes_; }

  // Grows to at least `bytes`; what it held is lost when it grows.
  void ensure(size_t bytes) {
    if (bytes > bytes_) *this = HostBuffer(bytes);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace mustafar
