#include "text/byte_level.h"

#include <array>

#include "text/unicode/utf8.h"

namespace mustafar::text {

namespace {

// Bytes that are printable in Latin-1 stand for themselves; the others take the characters from
// U+0100 on, in order.
constexpr char32_t kFirstShifted = 0x100;
constexpr bool is_printable(int byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

constexpr size_t count_shifted() {
  size_t count = 0;
  for (int byte = 0; byte < 256; byte++) count += !is_printable(byte);
  return count;
}

struct Alphabet {
  std::array<std::string, 256> characters;                     // UTF-8 of each byte's character
  std::array<int16_t, kFirstShifted + count_shifted()> bytes;  // byte of each character, or -1

  Alphabet() {
    bytes.fill(-1);
    char32_t next = kFirstShifted;
    for (int byte = 0; byte < 256; byte++) {
      const char32_t c = is_printable(byte) ? static_cast<char32_t>(byte) : next++;
      unicode::append_utf8(c, &characters[byte]);
      bytes[c] = static_cast<int16_t>(byte);
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

}  // namespace

void append_byte_level(std::string_view bytes, std::string* out) {
  const Alphabet& a = alphabet();
  for (const char byte : bytes) out->append(a.characters[static_cast<unsigned char>(byte)]);
}

std::optional<unsigned char> byte_level_byte(char32_t code_point) {
  const Alphabet& a = alphabet();
  if (code_point >= a.bytes.size() || a.bytes[code_point] < 0) return std::nullopt;
  return static_cast<unsigned char>(a.bytes[code_point]);
}

}  // namespace mustafar::text
