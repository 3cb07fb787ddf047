// Letting go of Python's lock around native work, and taking it back.
//
// Unlike pybind11's guards these outlive the interpreter: where it ends while a daemon thread is in
// native work, taking the lock would end that thread by unwinding through C++, which aborts the
// process (Python before 3.14). Such a thread stays where it is until the process is gone.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

namespace mustafar {

class ReleaseGil {
 public:
  ReleaseGil();
  ~ReleaseGil();
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  PyThreadState* state_;
};

class AcquireGil {
 public:
  AcquireGil();

 private:
  std::optional<pybind11::gil_scoped_acquire> gil_;
};

// Registers what has to happen before the interpreter ends, and in a child process after fork().
void register_gil();

}  // namespace mustafar
