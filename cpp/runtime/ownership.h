// Whose a session is at the moment.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "core/fork.h"

namespace mustafar {

// A session serves one call at a time. Between the calls that make a generation's tokens it belongs
// to that generation, its owner: other calls are refused until the generation has ended. Nothing
// here waits for a call, so that no caller can wait for itself (a callback, a signal handler).
class Ownership {
 public:
  enum class Entry : uint8_t {
    kEntered,
    kRunning,   // another call runs
    kLost,      // another thread's call ran when this process was forked
    kOwned,     // it belongs to a generation
    kNotYours,  // it belongs to this generation no more
    kClosed,
  };

  // Begins a call, of `owner` where that is not null; leave() ends it.
  Entry enter(const void* owner) noexcept;
  // Begins a call that changes nothing that a generation depends on.
  Entry enter_beside_owner() noexcept;
  // Begins the last call: from now on it is closed, and who owned it owns it no more.
  Entry enter_to_close() noexcept;
  void leave() noexcept;
  // Throws StateError for what is not kEntered.
  static void require(Entry entry);

  // By the call that runs: between calls it belongs to `owner` from now on.
  void give_to(const void* owner) noexcept;
  // It belongs to `owner` no more; nothing where it did not.
  void take_from(const void* owner) noexcept;

  // Meant for the call that runs, or the generation that owns it; nothing where there is neither.
  void cancel() noexcept;
  // Whether it was called since, once.
  bool take_cancel() noexcept { return cancelled_.load() && cancelled_.exchange(false); }
  bool closed() const noexcept;
  // Whether a call that ran when this process was forked runs still. Where that is another thread's
  // it does so for ever, and what it was changing must be left alone.
  bool lost() const noexcept;

 private:
  Entry occupied() const noexcept;  // by the call that runs

  mutable ForkSafeMutex mutex_;
  bool running_ = false, closed_ = false;
  int forks_ = 0;  // when the call that runs began
  const void* owner_ = nullptr;
  std::atomic<bool> cancelled_{false};
};

}  // namespace mustafar
