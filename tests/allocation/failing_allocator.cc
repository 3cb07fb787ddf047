#include "failing_allocator.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {

std::atomic<int64_t> left{0};        // until the one that fails; 0: none does
std::atomic<bool> exhausted{false};  // one has failed
std::atomic<bool> for_good{false};   // all later ones fail as well

bool must_fail() {
  if (exhausted.load(std::memory_order_relaxed) && for_good) return true;
  if (left.load(std::memory_order_relaxed) <= 0) return false;
  if (left.fetch_sub(1) != 1) return false;
  exhausted = true;
  return true;
}

void* allocate(std::size_t bytes) {
  void* memory = must_fail() ? nullptr : std::malloc(bytes > 0 ? bytes : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

namespace mustafar::testing {

void fail_allocation(int64_t n, bool and_all_later) {
  for_good = and_all_later;
  left = n;
}

bool stop_failing() {
  left = 0;
  return exhausted.exchange(false);
}

}  // namespace mustafar::testing

void* operator new(std::size_t bytes) { return allocate(bytes); }
void* operator new[](std::size_t bytes) { return allocate(bytes); }
// Who asks this way has another way to go on (std::stable_sort): such a call is not counted.
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return std::malloc(bytes > 0 ? bytes : 1);
}
void* operator new[](std::size_t bytes, const std::nothrow_t& tag) noexcept {
  return operator new(bytes, tag);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }

extern "C" {
void* __real_aligned_alloc(std::size_t alignment, std::size_t bytes);
void* __wrap_aligned_alloc(std::size_t alignment, std::size_t bytes) {
  return must_fail() || exhausted ? nullptr : __real_aligned_alloc(alignment, bytes);
}
}
