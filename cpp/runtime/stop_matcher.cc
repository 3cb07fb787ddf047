#include "runtime/stop_matcher.h"

#include <algorithm>
#include <stdexcept>

namespace mustafar {

StopMatcher::StopMatcher(const std::vector<std::string>& stops) {
  for (const std::string& text : stops) {
    if (text.empty()) throw std::invalid_argument("stop must not contain an empty text");
    Stop stop;
    stop.text = text;
    stop.failure.assign(text.size() + 1, 0);
    int32_t border = 0;
    for (size_t i = 1; i < text.size(); i++) {
      while (border > 0 && text[i] != text[border]) border = stop.failure[border];
      if (text[i] == text[border]) border++;
      stop.failure[i + 1] = border;
    }
    stops_.push_back(std::move(stop));
  }
}

std::string StopMatcher::push(std::string_view piece, bool is_token) {
  if (matched_) return {};
  if (is_token) ends_.push_back(-1);
  const int64_t begin = recent_begin_ + static_cast<int64_t>(recent_.size());
  if (!piece.empty()) {
    const int64_t end = begin + static_cast<int64_t>(piece.size());
    for (auto it = ends_.rbegin(); it != ends_.rend() && *it < 0; ++it) *it = end;
  }

  int64_t certain = begin + static_cast<int64_t>(piece.size());
  for (size_t i = 0; i < piece.size() && !matched_; i++) {
    int64_t longest = 0;
    for (Stop& stop : stops_) {
      while (stop.state > 0 && piece[i] != stop.text[stop.state]) {
        stop.state = stop.failure[stop.state];
      }
      if (piece[i] == stop.text[stop.state]) stop.state++;
      if (stop.state == static_cast<int32_t>(stop.text.size())) {
        matched_ = true;
        longest = std::max<int64_t>(longest, stop.state);
      }
    }
    if (matched_) certain = begin + static_cast<int64_t>(i) + 1 - longest;
  }
  recent_ += piece;
  if (!matched_) {
    int64_t held = 0;
    for (const Stop& stop : stops_) held = std::max<int64_t>(held, stop.state);
    certain -= held;
  }
  std::string out = recent_.substr(certain_ - recent_begin_, certain - certain_);
  certain_ = certain;
  settle();
  if (matched_) {
    kept_tokens_ = settled_tokens_;
    remainder_ = recent_.substr(0, certain_ - recent_begin_);
  }
  return out;
}

void StopMatcher::settle() {
  size_t n = 0;
  while (n < ends_.size() && ends_[n] >= 0 && ends_[n] <= certain_) n++;
  if (n == 0) return;
  recent_.erase(0, ends_[n - 1] - recent_begin_);
  recent_begin_ = ends_[n - 1];
  ends_.erase(ends_.begin(), ends_.begin() + static_cast<int64_t>(n));
  settled_tokens_ += static_cast<int64_t>(n);
}

std::string StopMatcher::flush() {
  if (matched_) return {};
  std::string out = recent_.substr(certain_ - recent_begin_);
  certain_ += static_cast<int64_t>(out.size());
  for (Stop& stop : stops_) stop.state = 0;
  settle();
  return out;
}

int64_t StopMatcher::kept_tokens() const {
  return matched_ ? kept_tokens_ : settled_tokens_ + static_cast<int64_t>(ends_.size());
}

}  // namespace mustafar
