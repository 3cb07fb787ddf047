#include "core/fork.h"

#include <pthread.h>

#include <memory>

#include "mustafar/error.h"

namespace mustafar {
namespace {

std::atomic<int> forks{0};

// The gate in front of all ForkSafeMutexes. Both are changed and looked at in one order of all
// threads (seq_cst): who enters sees who forks, or is seen.
std::atomic<int> inside{0};   // threads that hold one or wait for one
std::atomic<int> forking{0};  // 1: a thread waits for those to leave, or forks
thread_local int depth = 0;   // of this thread's sections

void leave() noexcept {
  inside--;
  if (forking != 0) inside.notify_all();
}

void enter() noexcept {
  for (;;) {
    inside++;
    if (forking == 0) return;
    leave();
    forking.wait(1);
  }
}

int own_sections() { return depth > 0 ? 1 : 0; }  // of a signal handler that forks

void before_fork() {
  while (forking.exchange(1) != 0) forking.wait(1);  // another thread forks just now
  for (int others = inside; others > own_sections(); others = inside) inside.wait(others);
}

void after_fork_in_parent() {
  forking = 0;
  forking.notify_all();
}

void after_fork_in_child() {
  forks++;
  inside = own_sections();
  forking = 0;
}

// From the library's start: a first use might be in a thread while another forks.
[[maybe_unused]] const int kRegistered =
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);

}  // namespace

int forks_so_far() noexcept { return forks.load(std::memory_order_relaxed); }

void ForkSafeMutex::lock() noexcept {
  if (depth++ == 0) enter();
  mutex_.lock();
}

void ForkSafeMutex::unlock() noexcept {
  mutex_.unlock();
  if (--depth == 0) leave();
}

void LongMutex::lock() {
  if (forks_.load(std::memory_order_acquire) != forks_so_far()) enter_child();
  mutex_.lock();
  held_ = true;
}

void LongMutex::unlock() noexcept {
  held_ = false;
  mutex_.unlock();
}

void LongMutex::enter_child() {
  static ForkSafeMutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  if (forks_ == forks_so_far()) return;
  if (held_) throw StateError(lost_);
  std::construct_at(&mutex_);  // it may be locked by who was about to hold it
  forks_.store(forks_so_far(), std::memory_order_release);
}

}  // namespace mustafar
