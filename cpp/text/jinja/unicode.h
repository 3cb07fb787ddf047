// UTF-8 and the character properties and case mappings that Python's str methods use.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace mustafar::jinja {

// Decodes the code point at byte `at` of valid UTF-8 and moves `at` behind it.
uint32_t next_code_point(std::string_view utf8, size_t* at);
void append_code_point(std::string* utf8, uint32_t code);
bool is_valid_utf8(std::string_view bytes);
size_t count_code_points(std::string_view utf8);

bool is_space(uint32_t c);       // str.isspace
bool is_line_break(uint32_t c);  // where str.splitlines breaks
bool is_alpha(uint32_t c);
bool is_decimal(uint32_t c);
bool is_digit(uint32_t c);
bool is_numeric(uint32_t c);
bool is_alnum(uint32_t c);
bool is_upper(uint32_t c);
bool is_lower(uint32_t c);
bool is_title(uint32_t c);
bool is_printable(uint32_t c);
bool is_cased(uint32_t c);
bool is_case_ignorable(uint32_t c);

enum class CaseMap { kUpper, kLower, kTitle };
// Appends the full mapping of one character; the final sigma is the caller's business.
void append_case(std::string* utf8, uint32_t c, CaseMap map);

}  // namespace mustafar::jinja
