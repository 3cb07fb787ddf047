// Device memory that waits for the next allocation of its size instead of going back to the driver:
// cudaFree stops the device, and caches that grow free and allocate the same sizes again and again.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>

namespace mustafar::cuda {

// Of one device, whichever is current to the callers. Thread-safe. What is taken may still be read
// by work under way for whom it was before: its new owner writes it in the same stream.
class MemoryPool {
 public:
  // most_kept: bytes.
  explicit MemoryPool(int64_t most_kept, int32_t device = 0)
      : most_kept_(most_kept), device_(device) {}
  ~MemoryPool() { release(); }
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  // Gives back what it keeps before it throws OutOfMemory.
  void* take(int64_t bytes);
  void give(void* memory, int64_t bytes) noexcept;
  int64_t kept() const;  // bytes

 private:
  void release() noexcept;  // everything, to the driver

  const int64_t most_kept_;
  const int32_t device_;
  mutable std::mutex mutex_;
  std::multimap<int64_t, void*> free_;  // by size
  int64_t kept_ = 0;
};

}  // namespace mustafar::cuda
