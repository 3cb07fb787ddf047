// FNV-1a, 64 bits: identity of models, profiles and texts (not against an adversary).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace mustafar {

class Hash64 {
 public:
  void add(const void* data, size_t bytes) {
    const auto* p = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < bytes; i++) state_ = (state_ ^ p[i]) * 0x100000001b3u;
  }
  void add(std::string_view text) {
    add_int(static_cast<int64_t>(text.size()));
    add(text.data(), text.size());
  }
  void add_int(int64_t value) {
    for (int i = 0; i < 8; i++) {
      const unsigned char byte =
          static_cast<unsigned char>(static_cast<uint64_t>(value) >> (8 * i));
      add(&byte, 1);
    }
  }
  // The same over whole little-endian words, eight times as fast; bytes: a multiple of 8.
  void add_words(const void* data, size_t bytes) {
    const auto* p = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
      uint64_t word;
      std::memcpy(&word, p + i, 8);
      state_ = (state_ ^ word) * 0x100000001b3u;
      state_ ^= state_ >> 29;  // FNV's product carries upwards only: this brings high bits down
    }
  }
  uint64_t value() const { return state_; }
  std::string hex() const {  // 16 digits
    std::string text(16, '0');
    for (int i = 0; i < 16; i++) text[i] = "0123456789abcdef"[state_ >> (60 - 4 * i) & 15];
    return text;
  }

 private:
  uint64_t state_ = 0xcbf29ce484222325u;
};

}  // namespace mustafar
