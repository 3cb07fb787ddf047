#include "gil.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace py = pybind11;

namespace mustafar {
namespace {

std::atomic<bool> ending{false};
std::thread::id ender;          // the thread that ends the interpreter, once `ending`
std::atomic<int> inside{0};     // threads in native work that have not been stopped
std::atomic<int> returning{0};  // threads about to take the lock
thread_local int released = 0;  // how often this thread let go of it

// Called before taking the lock, with entered_lock() after it: counts the thread among those that
// the end waits for, or stops it for good.
void enter_lock() {
  returning++;
  if (!ending || ender == std::this_thread::get_id()) return;
  inside--;
  returning--;
  for (;;) ::pause();
}
void entered_lock() { returning--; }

// Runs with the lock, before the interpreter starts to end. Native work in progress looks for
// signals every few milliseconds, which stops it there.
void prepare_to_end() {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::seconds kPatience{2};  // for work that looks for no signals
  ender = std::this_thread::get_id();
  ending = true;
  const py::gil_scoped_release release;
  const auto start = Clock::now();
  while (returning > 0 || (inside > 0 && Clock::now() - start < kPatience)) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace

ReleaseGil::ReleaseGil() {
  inside++;
  released++;
  state_ = PyEval_SaveThread();
}

ReleaseGil::~ReleaseGil() {
  enter_lock();
  PyEval_RestoreThread(state_);
  entered_lock();
  released--;
  inside--;
}

AcquireGil::AcquireGil() {
  if (PyGILState_Check() == 1) return;
  if (released == 0) {  // a thread of the library's own, which its owner waits for
    gil_.emplace();
    return;
  }
  enter_lock();
  gil_.emplace();
  entered_lock();
}

void register_gil() {
  pthread_atfork(nullptr, nullptr, [] {  // the child has this thread alone
    inside = released;
    returning = 0;
  });
  py::module_::import("atexit").attr("register")(py::cpp_function(&prepare_to_end));
}

}  // namespace mustafar
