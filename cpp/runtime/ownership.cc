#include "runtime/ownership.h"

#include "mustafar/error.h"

namespace mustafar {

Ownership::Entry Ownership::enter(const void* owner) noexcept {
  const std::lock_guard lock(mutex_);
  if (closed_) return Entry::kClosed;
  if (running_) return occupied();
  if (owner_ != owner) return owner == nullptr ? Entry::kOwned : Entry::kNotYours;
  running_ = true;
  forks_ = forks_so_far();
  return Entry::kEntered;
}

Ownership::Entry Ownership::enter_beside_owner() noexcept {
  const std::lock_guard lock(mutex_);
  if (closed_) return Entry::kClosed;
  if (running_) return occupied();
  running_ = true;
  forks_ = forks_so_far();
  return Entry::kEntered;
}

Ownership::Entry Ownership::enter_to_close() noexcept {
  const std::lock_guard lock(mutex_);
  if (closed_) return Entry::kClosed;
  if (running_) return occupied();
  running_ = closed_ = true;
  forks_ = forks_so_far();
  owner_ = nullptr;
  return Entry::kEntered;
}

void Ownership::leave() noexcept {
  const std::lock_guard lock(mutex_);
  running_ = false;
  if (owner_ == nullptr) cancelled_ = false;
}

void Ownership::require(Entry entry) {
  switch (entry) {
    case Entry::kEntered:
      return;
    case Entry::kRunning:
      throw StateError(
          "the session is in use by another call: a session serves one thread at a time");
    case Entry::kLost:
      throw StateError(
          "the session was in use by another thread's call when this process was forked: it can be "
          "used in the process that was forked alone");
    case Entry::kOwned:
      throw StateError(
          "the session is in use by a generation that has not ended: take it to its end, stop it "
          "or drop it first");
    case Entry::kNotYours:
      throw StateError("the generation has ended");
    case Entry::kClosed:
      throw StateError("the session is closed");
  }
}

void Ownership::give_to(const void* owner) noexcept {
  const std::lock_guard lock(mutex_);
  owner_ = owner;
}

void Ownership::take_from(const void* owner) noexcept {
  const std::lock_guard lock(mutex_);
  if (owner_ != owner) return;
  owner_ = nullptr;
  if (!running_) cancelled_ = false;
}

void Ownership::cancel() noexcept {
  const std::lock_guard lock(mutex_);
  if (running_ || owner_ != nullptr) cancelled_ = true;
}

Ownership::Entry Ownership::occupied() const noexcept {
  return forks_ == forks_so_far() ? Entry::kRunning : Entry::kLost;
}

bool Ownership::lost() const noexcept {
  const std::lock_guard lock(mutex_);
  return running_ && occupied() == Entry::kLost;
}

bool Ownership::closed() const noexcept {
  const std::lock_guard lock(mutex_);
  return closed_;
}

}  // namespace mustafar
