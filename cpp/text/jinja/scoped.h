// A variable that has another value for the length of a scope.
#pragma once

#include <utility>

namespace mustafar::jinja {

template <typename T>
class [[nodiscard]] Scoped {
 public:
  Scoped(T& variable, T value)
      : variable_(variable), before_(std::exchange(variable, std::move(value))) {}
  ~Scoped() { variable_ = std::move(before_); }
  Scoped(const Scoped&) = delete;
  Scoped& operator=(const Scoped&) = delete;

 private:
  T& variable_;
  T before_;
};

}  // namespace mustafar::jinja
