#include "text/unicode/properties.h"

#include "text/unicode/tables.h"

namespace mustafar::unicode {

bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool is_word_character(char32_t c) { return find_range(kTokenizerTables.word, c); }

bool is_space(char32_t c) {
  // Python adds the four information separators of ASCII.
  return is_white_space(c) || (c >= 0x1C && c <= 0x1F);
}

bool is_line_break(char32_t c) {
  return (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 ||
         c == 0x2029;
}

bool is_alpha(char32_t c) { return find_range(kPythonTables.alpha, c); }
bool is_decimal(char32_t c) { return find_range(kPythonTables.decimal, c); }
bool is_digit(char32_t c) { return find_range(kPythonTables.digit, c); }
bool is_numeric(char32_t c) { return find_range(kPythonTables.numeric, c); }
bool is_alnum(char32_t c) { return is_alpha(c) || is_decimal(c) || is_digit(c) || is_numeric(c); }
bool is_upper(char32_t c) { return find_range(kPythonTables.upper, c); }
bool is_lower(char32_t c) { return find_range(kPythonTables.lower, c); }
bool is_title(char32_t c) { return find_range(kPythonTables.title, c); }
bool is_printable(char32_t c) { return find_range(kPythonTables.printable, c); }
bool is_cased(char32_t c) { return find_range(kPythonTables.cased, c); }
bool is_case_ignorable(char32_t c) { return find_range(kPythonTables.case_ignorable, c); }

}  // namespace mustafar::unicode
