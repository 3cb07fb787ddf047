// What a person at a terminal sees: progress, and quantities in readable units.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace mustafar::cli {

// A bar on stderr, drawn only where stderr is a terminal and the work takes longer than a moment;
// gone when it ends.
class Progress {
 public:
  explicit Progress(std::string label);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void update(int64_t done, int64_t total);
  void clear();

 private:
  using Clock = std::chrono::steady_clock;
  const std::string label_;
  const bool enabled_;
  bool drawn_ = false;
  Clock::time_point next_;  // when to draw
};

std::string format_bytes(double bytes);                 // "1.25 GiB"
std::string format_number(double value, int decimals);  // "1234.50"
std::string format_count(double value);                 // "1.24 B", "610.00 M"
double per_second(double count, double seconds);        // 0 where no time was measured

}  // namespace mustafar::cli
