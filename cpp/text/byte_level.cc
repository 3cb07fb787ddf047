#include "text/byte_level.h"

#include <array>

#include "text/unicode/utf8.h"

namespace mustafar::text {

namespace {

// Printable Latin-1 stands for itself; the other 68 bytes take U+0100 and on, in order.
constexpr bool is_printable(int byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

struct Alphabet {
  std::array<std::string, 256> characters;  // UTF-8 of each byte's character
  std::array<int16_t, 0x100 + 68> bytes;    // byte of each character, or -1

  Alphabet() {
    bytes.fill(-1);
    char32_t next = 0x100;
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
