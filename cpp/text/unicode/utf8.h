// UTF-8 in and out of code points.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mustafar::unicode {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

// One step through text that may be malformed.
struct Utf8Step {
  char32_t code_point;  // U+FFFD where invalid
  uint32_t length;      // bytes of the character, or of the maximal part of one (at least 1)
  bool valid;
  bool truncated;  // invalid only because the text ends inside the character
};
Utf8Step read_utf8(std::string_view text, size_t pos);  // pos < text.size()

// A byte of a character behind its first.
inline bool is_continuation(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

// One step through valid text; moves *pos (less than text.size()) behind the character. Of
// malformed text the code point means nothing, but nothing behind its end is read.
inline char32_t next_code_point(std::string_view text, size_t* pos) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const size_t i = *pos;
  const char32_t lead = byte(i);
  if (lead < 0x80) {
    *pos = i + 1;
    return lead;
  }
  const size_t left = text.size() - i;
  if (lead < 0xE0 && left >= 2) {
    *pos = i + 2;
    return (lead & 0x1F) << 6 | (byte(i + 1) & 0x3F);
  }
  if (lead >= 0xE0 && lead < 0xF0 && left >= 3) {
    *pos = i + 3;
    return (lead & 0x0F) << 12 | (byte(i + 1) & 0x3F) << 6 | (byte(i + 2) & 0x3F);
  }
  if (lead >= 0xF0 && left >= 4) {
    *pos = i + 4;
    return (lead & 0x07) << 18 | (byte(i + 1) & 0x3F) << 12 | (byte(i + 2) & 0x3F) << 6 |
           (byte(i + 3) & 0x3F);
  }
  *pos = text.size();
  return 0xFFFD;
}

// Start of the character that ends before pos; valid text, pos > 0.
inline size_t previous_boundary(std::string_view text, size_t pos) {
  do {
    pos--;
  } while (pos > 0 && is_continuation(text[pos]));
  return pos;
}

void append_utf8(char32_t code_point, std::string* out);
bool is_ascii(std::string_view text);
bool is_valid_utf8(std::string_view text);

// text: valid UTF-8.
size_t count_code_points(std::string_view text);
// Byte offset of every code point, and the length at the end.
std::vector<size_t> code_point_offsets(std::string_view text);

// Each maximal malformed part becomes one U+FFFD, as in Python's errors="replace".
std::string replace_invalid_utf8(std::string_view text);

// A token or name for an error message: quoted, cut after 40 bytes, valid UTF-8.
std::string in_quotes(std::string_view text);

}  // namespace mustafar::unicode
