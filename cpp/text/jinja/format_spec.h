// How one value is laid out in a format string: what `%` formatting and str.format have in common.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "text/jinja/value.h"

namespace mustafar::jinja {

struct FormatSpec {
  std::string fill = " ";
  char align = 0;  // '<', '>', '^', or '=' for padding between sign and digits; 0: the default
  char sign = '-';
  bool alternate = false;  // '#'
  bool zero = false;       // '0' in front of the width
  char grouping = 0;       // ',' or '_' between thousands
  int64_t width = 0;
  int64_t precision = -1;  // none
  char type = 0;           // the letter at the end
};

// The specification of str.format and format(), as in "{:>8.2f}".
FormatSpec parse_format_spec(const std::string& spec);

// The digits at *at as a width or precision, 0 where there are none; moves *at behind them.
int64_t read_width(std::string_view s, size_t* at);
inline bool is_one_of(char c, std::string_view wanted) {
  return wanted.find(c) != std::string_view::npos;
}
bool is_all_digits(std::string_view s);  // and not empty

Text format_text(Text text, const FormatSpec& spec, char default_align);
Text format_integer(int64_t value, const FormatSpec& spec);
Text format_double(double value, const FormatSpec& spec);

}  // namespace mustafar::jinja
