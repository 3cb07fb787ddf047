// Runs CUDA kernel sources on the host, thread by thread, so that a machine without a GPU can
// execute every kernel of ours and a sanitizer can watch it.
//
// One fiber per CUDA thread; blocks one after another. A fiber runs until it reaches a barrier
// (sync_block, sync_warp, any warp collective), then another runnable fiber is drawn at random from
// a seed. So between two barriers the threads of a block run in an arbitrary order: a kernel whose
// result depends on it lacks a barrier, and shows it as a result that is wrong or changes with the
// seed. What else is caught, each as a simt::Error from launch() unless said otherwise:
//   - deadlock: a thread waits at a barrier that others never reach, or left before it;
//   - lanes of a warp that meet at different collectives;
//   - shared memory past its end, and device memory past its end (both end at a guard page: the
//     process dies with a message; under AddressSanitizer likewise), writes just before either;
//   - shared memory read before it is written: it is filled with 0xCD bytes for every block;
//   - data read before its cp.async has been waited for: a copy happens in cp_async_wait, no
//   sooner;
//   - misaligned cp.async, ldmatrix.
// The device language itself (threadIdx, mma, shuffles, ...) is in cuda/device_ops.cuh, which sends
// each operation here when MUSTAFAR_SIMT is defined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

namespace simt {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Memory whose end (rounded up to 16 bytes) lies at an unreadable page. Bytes before it and in the
// rounding hold a pattern that check() verifies.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void check(const char* what) const;  // throws Error where the pattern around it was overwritten

 private:
  void fill_slack();

  unsigned char* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  unsigned char* data_ = nullptr;
  size_t bytes_ = 0;
};

// The seed of every launch that follows; tests run a kernel under several.
void set_seed(uint32_t seed);
uint32_t seed();

// Runs body once per thread of grid x block; block.x * block.y * block.z is a multiple of 32.
void launch(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body);

// ---- for the running thread ----
Dim3 thread_index();
Dim3 block_index();
Dim3 block_dim();
Dim3 grid_dim();
int lane();
unsigned char* dynamic_shared();
[[noreturn]] void fail(const std::string& what);  // ends the launch with an Error

void sync_block();

// What the lanes of a warp hand to each other in one collective.
constexpr size_t kExchangeBytes = 64;

// Publishes `bytes` of this lane under the name of the collective, waits for the whole warp, and
// returns the 32 published slots, kExchangeBytes apart, valid until the lane's next collective.
const unsigned char* exchange(const char* collective, const void* value, size_t bytes);

template <typename T>
struct Lanes {
  const unsigned char* slots;
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots + static_cast<size_t>(lane) * kExchangeBytes, sizeof(T));
    return value;
  }
};

template <typename T>
Lanes<T> exchange_all(const char* collective, const T& value) {
  static_assert(sizeof(T) <= kExchangeBytes);
  return {exchange(collective, &value, sizeof(T))};
}

// cp.async of one thread: queued, closed into groups, executed by the wait.
void cp_async(void* to_shared, const void* from, int bytes);
void cp_async_commit();
void cp_async_wait(int groups_in_flight);

}  // namespace simt
