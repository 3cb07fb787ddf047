// Ctrl-C: the first asks the work to stop, the second leaves at once.
#pragma once

namespace mustafar::cli {

// While one lives, SIGINT sets a flag; the previous handling returns with its end.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
};

bool interrupted();
void clear_interrupt();
void throw_if_interrupted();  // throws Cancelled

}  // namespace mustafar::cli
