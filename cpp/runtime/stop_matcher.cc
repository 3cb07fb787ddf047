#include "runtime/stop_matcher.h"

#include <algorithm>
#include <stdexcept>

namespace mustafar {

StopMatcher::StopMatcher(const std::vector<std::string>& stops,
                         const std::vector<bool>& sees_hidden) {
  for (const std::string& text : stops) {
    if (text.empty()) throw std::invalid_argument("stop must not contain an empty text");
    Stop stop;
    stop.text = text;
    stop.sees_hidden = !sees_hidden.empty() && sees_hidden[stops_.size()];
    sees_hidden_ = sees_hidden_ || stop.sees_hidden;
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

void StopMatcher::Stop::take(char byte, bool is_hidden) {
  while (state > 0 && byte != text[state]) state = failure[state];
  if (byte == text[state]) state++;
  if (!sees_hidden) return;
  hidden.push_back(is_hidden);
  hidden.erase(hidden.begin(), hidden.end() - state);
}

int64_t StopMatcher::Stop::visible() const {
  return sees_hidden ? std::count(hidden.begin(), hidden.end(), false) : state;
}

void StopMatcher::find_match(int64_t end) {
  int64_t longest = -1;
  for (const Stop& stop : stops_) {
    if (stop.complete()) longest = std::max(longest, stop.visible());
  }
  matched_ = longest >= 0;
  if (matched_) match_begin_ = end - longest;
}

std::string StopMatcher::push_hidden(std::string_view piece) {
  if (matched_) return {};
  const int64_t end = recent_begin_ + static_cast<int64_t>(recent_.size());
  for (size_t i = 0; i < piece.size() && !matched_; i++) {
    for (Stop& stop : stops_) {
      if (stop.sees_hidden) stop.take(piece[i], /*is_hidden=*/true);
    }
    find_match(end);
  }
  return advance();
}

std::string StopMatcher::advance() {
  int64_t certain = match_begin_;
  if (!matched_) {
    int64_t held = 0;
    for (const Stop& stop : stops_) held = std::max(held, stop.visible());
    certain = recent_begin_ + static_cast<int64_t>(recent_.size()) - held;
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

std::string StopMatcher::push(std::string_view piece, bool is_token) {
  if (matched_) return {};
  if (is_token) ends_.push_back(-1);
  const int64_t begin = recent_begin_ + static_cast<int64_t>(recent_.size());
  if (!piece.empty()) {
    const int64_t end = begin + static_cast<int64_t>(piece.size());
    for (auto it = ends_.rbegin(); it != ends_.rend() && *it < 0; ++it) *it = end;
  }

  for (size_t i = 0; i < piece.size() && !matched_; i++) {
    for (Stop& stop : stops_) stop.take(piece[i], /*is_hidden=*/false);
    find_match(begin + static_cast<int64_t>(i) + 1);
  }
  recent_ += piece;
  return advance();
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
  for (Stop& stop : stops_) {
    stop.state = 0;
    stop.hidden.clear();
  }
  settle();
  return out;
}

int64_t StopMatcher::kept_tokens() const {
  return matched_ ? kept_tokens_ : settled_tokens_ + static_cast<int64_t>(ends_.size());
}

}  // namespace mustafar
