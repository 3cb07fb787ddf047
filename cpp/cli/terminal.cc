#include "cli/terminal.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

namespace mustafar::cli {
namespace {

constexpr auto kPatience = std::chrono::milliseconds(400);
constexpr auto kInterval = std::chrono::milliseconds(100);
constexpr int kWidth = 32;                // cells of the bar
constexpr double kSecondsBeforeLeft = 3;  // of work, before the time left is told

}  // namespace

Progress::Progress(std::string label)
    : label_(std::move(label)),
      enabled_(isatty(STDERR_FILENO) == 1),
      start_(Clock::now()),
      next_(start_ + kPatience) {}

Progress::~Progress() { clear(); }

void Progress::update(int64_t done, int64_t total) {
  if (!enabled_ || total <= 0) return;
  const Clock::time_point now = Clock::now();
  if (now < next_) return;
  next_ = now + kInterval;
  drawn_ = true;
  const double share = std::clamp(static_cast<double>(done) / static_cast<double>(total), 0.0, 1.0);
  const int filled = static_cast<int>(share * kWidth);
  const double seconds = std::chrono::duration<double>(now - start_).count();
  std::string left;
  if (share > 0 && seconds >= kSecondsBeforeLeft) {
    left = ", " + format_duration(seconds * (1 - share) / share) + " left";
  }
  std::fprintf(stderr, "\r%s [%s%s] %3d%%%s\033[K", label_.c_str(),
               std::string(filled, '#').c_str(), std::string(kWidth - filled, '.').c_str(),
               static_cast<int>(share * 100), left.c_str());
  std::fflush(stderr);
}

void Progress::clear() {
  if (!drawn_) return;
  drawn_ = false;
  std::fputs("\r\033[K", stderr);
  std::fflush(stderr);
}

std::string format_duration(double seconds) {
  const auto s = static_cast<int64_t>(seconds + 0.5);
  const auto part = [](int64_t n, const char* unit) { return std::to_string(n) + unit; };
  if (s >= 3600) return part(s / 3600, " h ") + part(s % 3600 / 60, " min");
  if (s >= 60) return part(s / 60, " min ") + part(s % 60, " s");
  return part(s, " s");
}

std::string format_number(double value, int decimals) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", decimals, value);
  return text;
}

std::string format_bytes(double bytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1024 && unit < 4) {
    bytes /= 1024;
    unit++;
  }
  return format_number(bytes, unit == 0 ? 0 : 2) + " " + units[unit];
}

std::string format_count(double value) {
  if (value >= 1e9) return format_number(value / 1e9, 2) + " B";
  if (value >= 1e6) return format_number(value / 1e6, 2) + " M";
  if (value >= 1e3) return format_number(value / 1e3, 2) + " K";
  return format_number(value, 0);
}

double per_second(double count, double seconds) { return seconds > 0 ? count / seconds : 0.0; }

}  // namespace mustafar::cli
