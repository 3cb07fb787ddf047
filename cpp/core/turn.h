// When a worker gives its core to others of its own accord. The scheduler takes a core away at the
// end of a time slice, in the middle of an iteration, and the region then waits for a slice of the
// neighbour's: milliseconds, where an iteration takes microseconds. Who leaves before that, between
// iterations, holds nobody up.
#pragma once

#include <chrono>

namespace mustafar {

class Turn {
 public:
  using Time = std::chrono::steady_clock::time_point;

  static constexpr auto kLength = std::chrono::microseconds(1000);  // less than a time slice
  static constexpr auto kRest = std::chrono::microseconds(1500);
  // A yield that took so long gave the core to somebody who uses up a slice; kernel threads and
  // interrupts are shorter.
  static constexpr auto kSlice = std::chrono::microseconds(1500);
  // For how long the core then counts as shared. Until that is over nothing is asked.
  static constexpr auto kShared = std::chrono::milliseconds(20);

  enum class Next {
    kGoOn,
    kYield,  // on a core that nobody else wants one short system call
    kRest,   // sleep for kRest: a yield alone gives way only where the scheduler holds this fair
  };

  explicit Turn(Time now) : start_(now) {}

  Next next(Time now) const {
    if (now - start_ < kLength) return Next::kGoOn;
    return now < shared_until_ ? Next::kRest : Next::kYield;
  }

  // The thread has its core again: after sleep, or after a yield.
  void begin(Time now) { start_ = now; }
  void begin_after_yield(Time yielded, Time now) {
    if (now - yielded >= kSlice) shared_until_ = now + kShared;
    start_ = now;
  }

 private:
  Time start_, shared_until_{};
};

}  // namespace mustafar
