// What a person at a terminal sees: progress, and quantities in readable units.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace mustafar::cli {

// A bar on stderr, drawn only where stderr is a terminal and the work takes longer than a moment;
// with the time left where that is a while; gone when it ends.
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
  const Clock::time_point start_;
  bool drawn_ = false;
  Clock::time_point next_;  // when to draw
};

std::string format_duration(double seconds);            // "1 h 5 min", "2 min 10 s", "8 s"
std::string format_bytes(double bytes);                 // "1.25 GiB"
std::string format_number(double value, int decimals);  // "1234.50"
std::string format_count(double value);                 // "1.24 B", "610.00 M"
double per_second(double count, double seconds);        // 0 where no time was measured

}  // namespace mustafar::cli
