// Upper, lower and title case of characters.
#pragma once

#include <string>
#include <string_view>

namespace mustafar::unicode {

enum class CaseMap { kUpper, kLower, kTitle };

// Appends what a character becomes, without regard to context: the form that a Greek sigma takes at
// the end of a word is left to the caller.
void append_case(char32_t c, CaseMap map, std::string* out);

// Every character of a valid text by append_case.
std::string lower_case(std::string_view text);

}  // namespace mustafar::unicode
