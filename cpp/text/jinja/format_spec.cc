#include "text/jinja/format_spec.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <optional>

#include "text/jinja/numbers.h"
#include "text/unicode/properties.h"
#include "text/unicode/utf8.h"

namespace mustafar::jinja {
namespace {

constexpr int64_t kMaxFieldWidth = 1000000;
constexpr int kDefaultPrecision = 6;  // of floats
constexpr std::string_view kDigits = "0123456789";

Text pad(const Text& body, const FormatSpec& spec, char default_align) {
  const int64_t missing = spec.width - static_cast<int64_t>(unicode::count_code_points(body.bytes));
  if (missing <= 0) return body;
  const char align = spec.align ? spec.align : default_align;
  const int64_t left = align == '<' ? 0 : align == '^' ? missing / 2 : missing;
  Text out;
  out.pad(static_cast<size_t>(left), spec.fill);
  out.append(body);
  out.pad(static_cast<size_t>(missing - left), spec.fill);
  return out;
}

// prefix: "0x" and the like. digits: of the absolute value.
Text pad_number(bool negative, const std::string& prefix, std::string digits,
                const FormatSpec& spec) {
  if (spec.grouping) {
    const size_t whole = std::min(digits.find_first_not_of(kDigits), digits.size());
    for (size_t i = whole; i > 3; i -= 3) digits.insert(i - 3, 1, spec.grouping);
  }
  std::string lead = negative ? "-" : spec.sign == '+' ? "+" : spec.sign == ' ' ? " " : "";
  lead += prefix;
  const bool between_sign_and_digits = spec.align == '=' || (spec.zero && !spec.align);
  if (!between_sign_and_digits) return pad(Text(lead + digits), spec, '>');
  if (spec.grouping && spec.zero) unsupported("a zero-padded number with grouping");
  const int64_t missing = spec.width - static_cast<int64_t>(lead.size() + digits.size());
  Text out(lead);
  if (missing > 0) out.pad(static_cast<size_t>(missing), spec.zero ? "0" : spec.fill);
  out.append(digits);
  return out;
}

std::string to_upper_ascii(std::string s) {
  for (char& c : s) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return s;
}

std::string without_trailing_zeros(std::string digits) {
  if (digits.find('.') == std::string::npos) return digits;
  digits.erase(digits.find_last_not_of('0') + 1);
  if (digits.back() == '.') digits.pop_back();
  return digits;
}

// What a float without a type letter but with a precision prints: like %g, but never without a
// point.
std::string general_with_point(double value, int precision) {
  precision = std::max(precision, 1);
  const std::string scientific = print_double('e', precision - 1, value);
  const size_t e = scientific.find('e');
  const int exponent = std::atoi(scientific.c_str() + e + 1);
  if (exponent < -4 || exponent >= precision - 1) {
    return without_trailing_zeros(scientific.substr(0, e)) + scientific.substr(e);
  }
  const std::string plain =
      without_trailing_zeros(print_double('f', precision - 1 - exponent, value));
  return plain.find('.') == std::string::npos ? plain + ".0" : plain;
}

// The digits of a finite value that is not negative.
std::string float_digits(double value, const FormatSpec& spec) {
  const auto given = static_cast<int>(spec.precision);
  if (spec.type == 0) return given < 0 ? float_repr(value) : general_with_point(value, given);
  const int precision = given < 0 ? kDefaultPrecision : given;
  if (spec.type == '%') return print_double('f', precision, value * 100) + "%";
  return print_double(spec.type == 'n' ? 'g' : spec.type, precision, value);
}

}  // namespace

int64_t read_width(std::string_view s, size_t* at) {
  int64_t value = 0;
  for (; *at < s.size() && s[*at] >= '0' && s[*at] <= '9'; ++*at) {
    value = std::min(value * 10 + (s[*at] - '0'), kMaxFieldWidth + 1);
  }
  if (value > kMaxFieldWidth) fail("a format field is wider than ", kMaxFieldWidth);
  return value;
}

bool is_all_digits(std::string_view s) {
  return !s.empty() && s.find_first_not_of(kDigits) == std::string_view::npos;
}

FormatSpec parse_format_spec(const std::string& s) {
  FormatSpec spec;
  size_t at = 0;
  const auto at_one_of = [&](std::string_view wanted) {
    return at < s.size() && wanted.find(s[at]) != std::string_view::npos;
  };
  // An alignment may have a fill character of any kind before it, even another alignment sign.
  constexpr std::string_view kAlignments = "<>^=";
  if (!s.empty()) unicode::next_code_point(s, &at);
  if (at_one_of(kAlignments)) {
    spec.fill = s.substr(0, at);
    spec.align = s[at++];
  } else {
    at = 0;
    if (at_one_of(kAlignments)) spec.align = s[at++];
  }
  if (at_one_of("+- ")) spec.sign = s[at++];
  if (at_one_of("#")) {
    spec.alternate = true;
    at++;
  }
  if (at_one_of("0")) {
    spec.zero = spec.align == 0;
    at++;
  }
  spec.width = read_width(s, &at);
  if (at_one_of(",_")) spec.grouping = s[at++];
  if (at_one_of(".")) {
    const size_t begin = ++at;
    spec.precision = read_width(s, &at);
    if (at == begin) fail("Format specifier missing precision");
  }
  if (at < s.size()) spec.type = s[at++];
  if (at != s.size()) fail("Invalid format specifier");
  return spec;
}

// At most spec.precision characters of the text.
Text format_text(Text text, const FormatSpec& spec, char default_align) {
  if (spec.precision >= 0) {
    const auto offsets = unicode::code_point_offsets(text.bytes);
    const auto most = static_cast<size_t>(spec.precision);
    if (most < offsets.size() - 1) text = text.sub(0, offsets[most]);
  }
  return pad(text, spec, default_align);
}

Text format_integer(int64_t value, const FormatSpec& spec) {
  const bool negative = value < 0;
  const uint64_t magnitude =
      negative ? 0 - static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
  const int base = spec.type == 'x' || spec.type == 'X' ? 16
                   : spec.type == 'o'                   ? 8
                   : spec.type == 'b'                   ? 2
                                                        : 10;
  char digits[64];  // as many as 64 bits have in base 2
  const auto end = std::to_chars(digits, digits + sizeof(digits), magnitude, base);
  const std::string spelled(digits, end.ptr);
  const std::string prefix =
      spec.alternate && base != 10 ? std::string("0") + spec.type : std::string();
  return pad_number(negative, prefix, spec.type == 'X' ? to_upper_ascii(spelled) : spelled, spec);
}

Text format_double(double value, const FormatSpec& spec) {
  std::string digits;
  if (std::isfinite(value)) {
    digits = float_digits(std::fabs(value), spec);
  } else {
    digits = std::isnan(value) ? "nan" : "inf";
    if (spec.type == 'E' || spec.type == 'F' || spec.type == 'G') digits = to_upper_ascii(digits);
    if (spec.type == '%') digits += "%";
  }
  const bool negative = std::signbit(value) && !std::isnan(value);
  return pad_number(negative, "", digits, spec);
}

}  // namespace mustafar::jinja
