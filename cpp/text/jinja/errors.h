// Errors inside the template engine, and the bounds that keep a template from running away.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mustafar::jinja {

// Something that jinja2 would raise too; the interpreter adds the line.
class EvalError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A construct of jinja2 or Python that the engine does not have.
class Unsupported : public EvalError {
 public:
  using EvalError::EvalError;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw EvalError(concat(parts...));
}

template <typename... Parts>
[[noreturn]] void unsupported(const Parts&... parts) {
  throw Unsupported(concat(parts..., " is not supported by this template engine"));
}

// What one rendering may use. A step is about one node evaluated, one list item or kBytesPerStep
// bytes of text made, so the steps bound time and memory together.
struct Budget {
  static constexpr size_t kBytesPerStep = 16;

  int64_t steps = 0;      // left
  int64_t max_steps = 0;  // for the message
  size_t max_bytes = 0;   // of any one text, the output included
  int depth = 0;          // nested evaluations now
  int max_depth = 0;

  void charge(int64_t n) {
    steps -= n;
    if (steps < 0) fail("the template runs for more than ", max_steps, " steps");
  }
  // For a text that grows and is charged once it is complete.
  void check_size(size_t bytes) const {
    if (bytes > max_bytes) fail("text grows beyond ", max_bytes, " bytes");
  }
  void charge_text(size_t bytes) {
    check_size(bytes);
    charge(1 + static_cast<int64_t>(bytes / kBytesPerStep));
  }
};

class DepthGuard {
 public:
  explicit DepthGuard(Budget& budget) : budget_(budget) {
    if (++budget_.depth > budget_.max_depth) {
      budget_.depth--;
      fail("nested deeper than ", budget_.max_depth, " levels");
    }
  }
  ~DepthGuard() { budget_.depth--; }
  DepthGuard(const DepthGuard&) = delete;
  DepthGuard& operator=(const DepthGuard&) = delete;

 private:
  Budget& budget_;
};

}  // namespace mustafar::jinja
