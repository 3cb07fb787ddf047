#include "core/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>

#include "core/available_cores.h"
#include "core/fork.h"
#include "core/turn.h"

namespace mustafar {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough to bridge the gaps between the regions of one decode step, short enough not to burn a
// core that somebody else could use.
constexpr auto kSpin = std::chrono::microseconds(50);

// Iterations of one region at most; longer loops are run as several.
constexpr int64_t kRegionIterations = int64_t{1} << 30;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename Condition>
bool spin_until(Condition&& condition) {
  const auto deadline = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; i++) {
      if (condition()) return true;
      pause();
    }
  } while (Clock::now() < deadline);
  return condition();
}

// Between iterations, on a worker.
void take_turns(Turn& turn) {
  const auto now = Clock::now();
  switch (turn.next(now)) {
    case Turn::Next::kGoOn:
      return;
    case Turn::Next::kYield:
      std::this_thread::yield();
      return turn.begin_after_yield(now, Clock::now());
    case Turn::Next::kRest:
      std::this_thread::sleep_for(Turn::kRest);
      return turn.begin(Clock::now());
  }
}

}  // namespace

ThreadPool::ThreadPool(int threads) : forks_(forks_so_far()) {
  if (threads <= 0) threads = default_threads();
  for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  if (workers_are_elsewhere()) {
    // Nothing to wait for, and nothing to detach either: a thread of this process may have got what
    // was a worker's place, and with it the handle's value.
    for (std::thread& worker : workers_) std::construct_at(&worker);
    return;
  }
  stop_.store(true);
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool ThreadPool::workers_are_elsewhere() const { return forks_ != forks_so_far(); }

template <typename Between>
void ThreadPool::drain(int worker, Between&& between) {
  uint32_t left = unclaimed_.load(std::memory_order_acquire);
  while (left > 0) {
    if (!unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acquire)) continue;
    uint32_t ended = 1;
    try {
      function_(context_, first_ + (n_ - left), worker);
    } catch (...) {
      {
        std::lock_guard lock(error_mutex_);
        if (!error_) error_ = std::current_exception();
      }
      ended += unclaimed_.exchange(0, std::memory_order_acquire);  // these are skipped
    }
    finish(ended);
    between();
    left = unclaimed_.load(std::memory_order_acquire);
  }
}

void ThreadPool::finish(uint32_t iterations) {
  if (unfinished_.fetch_sub(iterations, std::memory_order_acq_rel) == iterations) {
    unfinished_.notify_all();
  }
}

void ThreadPool::run(int64_t n, Function function, void* context) {
  if (n <= 0) return;
  const auto run_alone = [&] {
    for (int64_t i = 0; i < n; i++) function(context, i, 0);
  };
  // A region that ran at the fork holds its mutex for ever.
  if (workers_are_elsewhere()) return run_alone();
  std::lock_guard region(region_mutex_);
  if (workers_.empty() || n == 1) return run_alone();
  for (int64_t first = 0; first < n; first += kRegionIterations) {
    run_region(first, static_cast<uint32_t>(std::min(kRegionIterations, n - first)), function,
               context);
  }
}

void ThreadPool::run_region(int64_t first, uint32_t n, Function function, void* context) {
  function_ = function;
  context_ = context;
  first_ = first;
  n_ = n;
  error_ = nullptr;
  unfinished_.store(n, std::memory_order_relaxed);
  unclaimed_.store(n, std::memory_order_release);
  caller_core_.store(sched_getcpu(), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  drain(0, [] {});
  // Whoever is still inside an iteration may have lost its core to another process. Sleeping then
  // gives it ours, where a caller that went on spinning would keep it away.
  const auto ended = [&] { return unfinished_.load(std::memory_order_acquire) == 0; };
  while (!spin_until(ended)) {
    const uint32_t left = unfinished_.load(std::memory_order_acquire);
    if (left > 0) unfinished_.wait(left, std::memory_order_acquire);
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::work(int worker) {
  uint32_t seen = 0;
  Turn turn(Clock::now());
  for (;;) {
    const auto changed = [&] { return generation_.load(std::memory_order_acquire) != seen; };
    if (!spin_until(changed)) {
      generation_.wait(seen, std::memory_order_acquire);
      turn.begin(Clock::now());
    }
    take_turns(turn);
    // Beside a busy process the scheduler may well put a worker on its caller's core, where each
    // keeps the other from working.
    const int core = sched_getcpu();
    if (core >= 0 && core == caller_core_.load(std::memory_order_relaxed) && !leave_core(core)) {
      std::this_thread::sleep_for(Turn::kRest);
    }
    seen = generation_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    drain(worker, [&] { take_turns(turn); });
  }
}

}  // namespace mustafar
