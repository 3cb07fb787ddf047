// What fork() needs: a child process has its parent's memory as it was at that moment, and of its
// threads only the one that forked. Whatever another thread held or was changing stays so for ever.
#pragma once

#include <atomic>
#include <mutex>

namespace mustafar {

// How often this process and those it descends from were forked: what was noted before a fork
// differs from what the child finds.
int forks_so_far() noexcept;

// A mutex that a child never meets locked: fork() waits until nobody holds one, so that what they
// guard is whole in the child. For short sections that wait for nothing but other mutexes of this
// kind and call nothing of the library's users: whoever forks may hold what those wait for, as
// Python's lock.
class ForkSafeMutex {
 public:
  void lock() noexcept;
  void unlock() noexcept;

 private:
  std::mutex mutex_;
};

// A mutex for sections that take long or call back. Where another thread held it when this process
// was forked, lock() throws StateError: what it guards was being changed.
class LongMutex {
 public:
  explicit LongMutex(const char* lost) : lost_(lost) {}  // what the error says; a literal
  void lock();
  void unlock() noexcept;

 private:
  void enter_child();

  const char* const lost_;
  std::atomic<int> forks_{forks_so_far()};  // of the process that mutex_ belongs to
  std::atomic<bool> held_{false};
  std::mutex mutex_;
};

// Deletes what belongs to this process. What a thread of its parent may have been waiting on or
// changing is left as it is: not even a destructor can deal with it.
struct DeleteInOwnProcess {
  int forks = forks_so_far();
  template <typename T>
  void operator()(T* object) const {
    if (forks == forks_so_far()) delete object;
  }
};

}  // namespace mustafar
