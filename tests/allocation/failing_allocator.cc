#include "failing_allocator.h"

#include <dlfcn.h>
#include <execinfo.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<int64_t> left{0};        // until the one that fails; 0: none does
std::atomic<bool> exhausted{false};  // one has failed
std::atomic<mustafar::testing::Reached> reached{mustafar::testing::Reached::kNo};

// Whether a JSON value is being destroyed, by the names of the callers (the program exports them).
bool in_json_destructor() {
  void* frames[64];
  const int n = backtrace(frames, 64);
  for (int i = 0; i < n; i++) {
    Dl_info info;
    if (dladdr(frames[i], &info) == 0 || info.dli_sname == nullptr) continue;
    if (std::strstr(info.dli_sname, "json_value7destroy") != nullptr) return true;
  }
  return false;
}

bool must_fail() {
  if (left.load(std::memory_order_relaxed) <= 0) return false;
  if (left.fetch_sub(1) != 1) return false;
  const bool spared = in_json_destructor();
  using mustafar::testing::Reached;
  reached = spared ? Reached::kSpared : Reached::kFailed;
  exhausted = !spared;
  return !spared;
}

void* allocate(std::size_t bytes) {
  void* memory = must_fail() ? nullptr : std::malloc(bytes > 0 ? bytes : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

namespace mustafar::testing {

void fail_allocation(int64_t n) {
  reached = Reached::kNo;
  left = n;
}

Reached stop_failing() {
  left = 0;
  exhausted = false;
  return reached;
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
