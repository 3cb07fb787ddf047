#include "cuda/memory_pool.h"

#include <exception>
#include <new>

#include "cuda/device.h"
#include "mustafar/error.h"

namespace mustafar::cuda {

void* MemoryPool::take(int64_t bytes) {
  {
    const std::lock_guard lock(mutex_);
    if (const auto it = free_.find(bytes); it != free_.end()) {
      void* const memory = it->second;
      free_.erase(it);
      kept_ -= bytes;
      return memory;
    }
  }
  const DeviceScope scope(device_);
  try {
    return device_allocate(bytes);
  } catch (const OutOfMemory&) {
    if (kept() == 0) throw;
  }
  release();
  return device_allocate(bytes);
}

void MemoryPool::give(void* memory, int64_t bytes) noexcept {
  try {
    const std::lock_guard lock(mutex_);
    if (kept_ + bytes <= most_kept_) {
      free_.emplace(bytes, memory);
      kept_ += bytes;
      return;
    }
  } catch (const std::exception&) {  // no room to note it down
  }
  const DeviceScope scope(device_, std::nothrow);
  device_free(memory);
}

int64_t MemoryPool::kept() const {
  const std::lock_guard lock(mutex_);
  return kept_;
}

void MemoryPool::release() noexcept {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) return;
  const DeviceScope scope(device_, std::nothrow);
  for (const auto& [bytes, memory] : free_) device_free(memory);
  free_.clear();
  kept_ = 0;
}

}  // namespace mustafar::cuda
