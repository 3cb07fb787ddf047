#include "core/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <utility>

namespace mustafar {
namespace {

// Long enough to bridge the gaps between the regions of one decode step, short enough not to burn a
// core that somebody else could use.
constexpr auto kSpin = std::chrono::microseconds(50);

// How often this process came out of a fork(): a child has none of its parent's threads.
std::atomic<int> forks{0};

int forks_so_far() {
  static const int kRegistered =
      pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  (void)kRegistered;
  return forks.load(std::memory_order_relaxed);
}

int available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename Condition>
bool spin_until(Condition&& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; i++) {
      if (condition()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return condition();
}

}  // namespace

ThreadPool::ThreadPool(int threads)
    : forks_(forks_so_far()), wake_(std::make_unique<std::condition_variable>()) {
  if (threads <= 0) threads = available_cores();
  for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  if (workers_are_elsewhere()) {  // nothing to wait for, and no waiter that would ever leave
    for (std::thread& worker : workers_) worker.detach();
    wake_.release();
    return;
  }
  {
    std::lock_guard lock(sleep_mutex_);
    stop_ = true;
    generation_++;
  }
  wake_->notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool ThreadPool::workers_are_elsewhere() const {
  return forks_ != forks.load(std::memory_order_relaxed);
}

void ThreadPool::drain(int worker) {
  for (;;) {
    const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
    if (i >= n_) return;
    try {
      function_(context_, i, worker);
    } catch (...) {
      std::lock_guard lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
      next_.store(n_, std::memory_order_relaxed);
    }
  }
}

void ThreadPool::run(int64_t n, Function function, void* context) {
  if (n <= 0) return;
  std::lock_guard region(region_mutex_);
  if (workers_.empty() || n == 1 || workers_are_elsewhere()) {
    for (int64_t i = 0; i < n; i++) function(context, i, 0);
    return;
  }
  function_ = function;
  context_ = context;
  n_ = n;
  error_ = nullptr;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1);
  if (sleepers_.load() > 0) {
    {
      std::lock_guard lock(sleep_mutex_);
    }
    wake_->notify_all();
  }
  drain(0);
  while (!spin_until([&] { return busy_.load(std::memory_order_acquire) == 0; })) {
    std::this_thread::yield();
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::work(int worker) {
  uint64_t seen = 0;
  for (;;) {
    const auto changed = [&] { return generation_.load() != seen; };
    if (!spin_until(changed)) {
      std::unique_lock lock(sleep_mutex_);
      sleepers_++;
      wake_->wait(lock, changed);
      sleepers_--;
    }
    seen = generation_.load(std::memory_order_acquire);
    if (stop_) return;
    drain(worker);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace mustafar
