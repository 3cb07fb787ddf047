// A fixed set of worker threads that run the iterations of a loop. Regions from several callers are
// run one after another, so that sessions on different threads share one pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace mustafar {

class ThreadPool {
 public:
  // threads >= 1 counts the calling thread; 0 takes default_threads() (core/available_cores.h).
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs body(i, worker) for every i in [0, n), worker in [0, size()); returns when all are done: a
  // worker that has no core just now is not waited for unless it is inside an iteration, and its
  // share is done by the others. Iterations are handed out in order, one at a time. The first
  // exception is rethrown here, after the region has ended; iterations not yet begun are then
  // skipped. Must not be nested.
  template <typename Body>
  void parallel_for(int64_t n, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run(
        n, [](void* context, int64_t i, int worker) { (*static_cast<Plain*>(context))(i, worker); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

  // The same for n rows of an array; on the calling thread alone where they have so few words that
  // it is done before a region would have started.
  template <typename Body>
  void parallel_rows(int64_t n, int64_t words_per_row, Body&& body) {
    if (n * words_per_row > kFewWords) return parallel_for(n, body);
    for (int64_t i = 0; i < n; i++) body(i, 0);
  }

 private:
  static constexpr int64_t kFewWords = 16 * 1024;

  using Function = void (*)(void* context, int64_t i, int worker);

  void run(int64_t n, Function function, void* context);
  void run_region(int64_t first, uint32_t n, Function function, void* context);
  void work(int worker);
  template <typename Between>
  void drain(int worker, Between&& between);
  void finish(uint32_t iterations);
  // In a child process after fork(): regions then run on the calling thread alone, those of several
  // callers beside each other.
  bool workers_are_elsewhere() const;

  const int forks_;  // of this process, when the workers were started

  std::vector<std::thread> workers_;
  std::mutex region_mutex_;  // one region at a time

  // The region that is running. Only who holds an iteration that is not finished may read the plain
  // members: the region cannot end before that, so they are those of the iteration's own region,
  // whenever its worker came.
  Function function_ = nullptr;
  void* context_ = nullptr;
  int64_t first_ = 0;
  uint32_t n_ = 0;
  std::exception_ptr error_;
  std::mutex error_mutex_;
  alignas(64) std::atomic<uint32_t> unclaimed_{0};   // iterations that nobody has taken
  alignas(64) std::atomic<uint32_t> unfinished_{0};  // of all n; waited for by the caller

  // Counts regions. Workers watch it for a moment, then sleep on it.
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<int> caller_core_{-1};  // when the region began
  std::atomic<bool> stop_{false};
};

}  // namespace mustafar
