// GPT-2's printable alphabet for bytes: every byte is a character of its own, so that byte-level
// tokens are valid text.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace mustafar::text {

void append_byte_level(std::string_view bytes, std::string* out);
// The byte that a character of the alphabet stands for; nothing for other characters.
std::optional<unsigned char> byte_level_byte(char32_t code_point);

}  // namespace mustafar::text
