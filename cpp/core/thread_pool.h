// A fixed set of worker threads that run the iterations of a loop. Regions from several callers are
// run one after another, so that sessions on different threads share one pool.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace mustafar {

class ThreadPool {
 public:
  // threads >= 1 counts the calling thread; 0 takes one per core the process may run on.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs body(i, worker) for every i in [0, n), worker in [0, size()); returns when all are done.
  // Iterations are handed out in order, one at a time. The first exception is rethrown here, after
  // the region has ended; iterations not yet begun are then skipped. Must not be nested.
  template <typename Body>
  void parallel_for(int64_t n, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run(
        n, [](void* context, int64_t i, int worker) { (*static_cast<Plain*>(context))(i, worker); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using Function = void (*)(void* context, int64_t i, int worker);

  void run(int64_t n, Function function, void* context);
  void work(int worker);
  void drain(int worker);
  // In a child process after fork(): regions then run on the calling thread alone.
  bool workers_are_elsewhere() const;

  const int forks_;  // of this process, when the workers were started

  std::vector<std::thread> workers_;
  std::mutex region_mutex_;  // one region at a time

  // The region that is running.
  Function function_ = nullptr;
  void* context_ = nullptr;
  int64_t n_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  std::exception_ptr error_;
  std::mutex error_mutex_;

  // Wakes workers: they spin on the generation for a moment, then sleep.
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex sleep_mutex_;
  std::unique_ptr<std::condition_variable> wake_;
};

}  // namespace mustafar
