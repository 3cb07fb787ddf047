#include "text/unicode/utf8.h"

#include <algorithm>
#include <cstring>

namespace mustafar::unicode {

Utf8Step read_utf8(std::string_view text, size_t pos) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(pos);
  if (lead < 0x80) return {lead, 1, true, false};
  // The second byte's range rules out overlong forms, surrogates and what lies beyond U+10FFFF.
  uint32_t length = 0;
  unsigned char low = 0x80, high = 0xBF;
  char32_t code_point = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
    code_point = lead & 0x1F;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    code_point = lead & 0x0F;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    code_point = lead & 0x07;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {0xFFFD, 1, false, false};
  }
  for (uint32_t i = 1; i < length; i++) {
    if (pos + i >= text.size()) return {0xFFFD, i, false, true};
    const unsigned char next = byte(pos + i);
    if (next < low || next > high) return {0xFFFD, i, false, false};
    low = 0x80;
    high = 0xBF;
    code_point = code_point << 6 | (next & 0x3F);
  }
  return {code_point, length, true, false};
}

void append_utf8(char32_t c, std::string* out) {
  const auto push = [&](char32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    push(c);
  } else if (c < 0x800) {
    push(0xC0 | c >> 6);
    push(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    push(0xE0 | c >> 12);
    push(0x80 | (c >> 6 & 0x3F));
    push(0x80 | (c & 0x3F));
  } else {
    push(0xF0 | c >> 18);
    push(0x80 | (c >> 12 & 0x3F));
    push(0x80 | (c >> 6 & 0x3F));
    push(0x80 | (c & 0x3F));
  }
}

namespace {

// First position at or after pos that does not belong to a run of eight ASCII bytes.
size_t skip_ascii(std::string_view text, size_t pos) {
  for (; pos + 8 <= text.size(); pos += 8) {
    uint64_t chunk;
    std::memcpy(&chunk, text.data() + pos, 8);
    if (chunk & 0x8080808080808080u) break;
  }
  return pos;
}

}  // namespace

bool is_ascii(std::string_view text) {
  for (size_t i = skip_ascii(text, 0); i < text.size(); i++) {
    if (static_cast<unsigned char>(text[i]) >= 0x80) return false;
  }
  return true;
}

bool is_valid_utf8(std::string_view text) {
  size_t pos = skip_ascii(text, 0);
  while (pos < text.size()) {
    const Utf8Step step = read_utf8(text, pos);
    if (!step.valid) return false;
    pos += step.length;
    if (step.length == 1) pos = skip_ascii(text, pos);
  }
  return true;
}

size_t count_code_points(std::string_view text) {
  return text.size() -
         static_cast<size_t>(std::count_if(text.begin(), text.end(), is_continuation));
}

std::vector<size_t> code_point_offsets(std::string_view text) {
  std::vector<size_t> offsets;
  offsets.reserve(text.size() + 1);
  for (size_t i = 0; i < text.size(); i++) {
    if (!is_continuation(text[i])) offsets.push_back(i);
  }
  offsets.push_back(text.size());
  return offsets;
}

std::string replace_invalid_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size() + 16);
  size_t copied = 0;
  for (size_t pos = 0; pos < text.size();) {
    const Utf8Step step = read_utf8(text, pos);
    if (!step.valid) {
      out.append(text.substr(copied, pos - copied)).append(kReplacementCharacter);
      copied = pos + step.length;
    }
    pos += step.length;
  }
  return out.append(text.substr(copied));
}

std::string in_quotes(std::string_view text) {
  constexpr size_t kLimit = 40;
  const bool cut = text.size() > kLimit;
  std::string_view shown = text.substr(0, kLimit);
  while (cut && !shown.empty() && is_continuation(text[shown.size()])) {
    shown.remove_suffix(1);
  }
  return std::string("'").append(replace_invalid_utf8(shown)).append(cut ? "...'" : "'");
}

}  // namespace mustafar::unicode
