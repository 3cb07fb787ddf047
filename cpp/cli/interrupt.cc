#include "cli/interrupt.h"

#include <unistd.h>

#include <csignal>

#include "cli/commands.h"
#include "mustafar/error.h"

namespace mustafar::cli {
namespace {

volatile std::sig_atomic_t interrupts = 0;

void on_interrupt(int) {
  if (interrupts > 0) _exit(kExitInterrupt);
  interrupts = 1;
}

struct sigaction previous;

}  // namespace

InterruptGuard::InterruptGuard() {
  interrupts = 0;
  struct sigaction action = {};
  action.sa_handler = on_interrupt;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, &previous);
}

InterruptGuard::~InterruptGuard() { sigaction(SIGINT, &previous, nullptr); }

bool interrupted() { return interrupts != 0; }
void clear_interrupt() { interrupts = 0; }

void throw_if_interrupted() {
  if (interrupted()) throw Cancelled("interrupted");
}

}  // namespace mustafar::cli
