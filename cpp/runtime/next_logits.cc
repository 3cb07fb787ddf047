#include "runtime/next_logits.h"

#include <utility>

namespace mustafar {

float* NextLogits::room(int64_t vocab) {
  room_.resize(vocab);
  return room_.data();
}

void NextLogits::set_from_room() {
  std::swap(values_, room_);
  drop();
  whole_ = true;
}

void NextLogits::set(std::span<const float> logits) {
  values_.assign(logits.begin(), logits.end());
  drop();
  whole_ = true;
}

void NextLogits::set_top(TopLogits top, const float* device_row) {
  drop();
  top_ = std::move(top);
  device_row_ = device_row;
}

void NextLogits::drop() {
  whole_ = false;
  device_row_ = nullptr;
  top_ = {};
}

void NextLogits::fetch(Backend& backend, int64_t vocab) {
  if (whole_ || device_row_ == nullptr) return;
  values_.resize(vocab);
  backend.download(values_.data(), device_row_, vocab * static_cast<int64_t>(sizeof(float)));
  whole_ = true;
}

NextLogits NextLogits::copy_to_host(Backend& backend, int64_t vocab) const {
  NextLogits copy;
  if (whole_) {
    copy.values_ = values_;
    copy.whole_ = true;
  } else {
    copy.device_row_ = device_row_;
    copy.fetch(backend, vocab);
    copy.device_row_ = nullptr;
  }
  return copy;
}

}  // namespace mustafar
