// Properties of characters. Tokenizers and templates imitate different programs, and what those
// call white space, a word or a letter differs.
#pragma once

namespace mustafar::unicode {

// The value of an ASCII digit or letter as a digit in bases up to 36, or -1.
constexpr int digit_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'z') return c - 'a' + 10;
  if (c >= 'A' && c <= 'Z') return c - 'A' + 10;
  return -1;
}

// As tokenizers have them.
bool is_white_space(char32_t c);     // Unicode's White_Space property
bool is_word_character(char32_t c);  // \w of Rust's regex: letters, marks, digits, connectors

// As Python's str methods have them.
bool is_space(char32_t c);       // str.isspace
bool is_line_break(char32_t c);  // where str.splitlines breaks
bool is_alpha(char32_t c);
bool is_decimal(char32_t c);
bool is_digit(char32_t c);
bool is_numeric(char32_t c);
bool is_alnum(char32_t c);
bool is_upper(char32_t c);
bool is_lower(char32_t c);
bool is_title(char32_t c);
bool is_printable(char32_t c);
bool is_cased(char32_t c);
bool is_case_ignorable(char32_t c);

}  // namespace mustafar::unicode
