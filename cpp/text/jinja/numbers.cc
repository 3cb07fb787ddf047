#include "text/jinja/numbers.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "text/jinja/errors.h"
#include "text/unicode/properties.h"

namespace mustafar::jinja {
namespace {

double read_double(const std::string& s) {
  double value = 0;
  const auto result = std::from_chars(s.data(), s.data() + s.size(), value);
  if (result.ec == std::errc::result_out_of_range) {
    // from_chars leaves the value as it was; the sign of the exponent tells overflow from
    // underflow.
    const size_t e = s.find_first_of("eE");
    const bool tiny = e != std::string::npos && e + 1 < s.size() && s[e + 1] == '-';
    value = tiny || s.find_first_of("123456789") == std::string::npos ? 0 : INFINITY;
    if (s[0] == '-') value = -value;
  }
  return value;
}

std::string_view trim_ascii_space(std::string_view s) {
  const auto is_space = [](char c) {
    const auto byte = static_cast<unsigned char>(c);
    return byte < 0x80 && unicode::is_space(byte);
  };
  while (!s.empty() && is_space(s.front())) s.remove_prefix(1);
  while (!s.empty() && is_space(s.back())) s.remove_suffix(1);
  return s;
}

// Drops single underscores between digits; none where one stands elsewhere.
std::optional<std::string> without_underscores(std::string_view s) {
  std::string out;
  for (size_t i = 0; i < s.size(); i++) {
    if (s[i] != '_') {
      out.push_back(s[i]);
    } else if (i == 0 || i + 1 == s.size() || !std::isalnum(static_cast<uint8_t>(s[i - 1])) ||
               !std::isalnum(static_cast<uint8_t>(s[i + 1]))) {
      return std::nullopt;
    }
  }
  return out;
}

}  // namespace

std::string print_double(char type, int precision, double value) {
  const char format[] = {'%', '.', '*', type, 0};
  const int n = std::snprintf(nullptr, 0, format, precision, value);
  std::string out(static_cast<size_t>(n) + 1, 0);
  std::snprintf(out.data(), out.size(), format, precision, value);
  out.pop_back();
  return out;
}

std::string float_repr(double value) {
  constexpr int kFirstPlainExponent = -4, kPlainExponentEnd = 16;  // others print as 1e+16
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[40];  // the shortest spelling of a double has at most 24 characters
  const auto end =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific);
  std::string s(buffer, end.ptr);
  std::string sign;
  if (s[0] == '-') {
    sign = "-";
    s.erase(0, 1);
  }
  const size_t e = s.find('e');
  const int exponent = std::atoi(s.c_str() + e + 1);
  std::string digits = s.substr(0, 1);
  if (e > 2) digits += s.substr(2, e - 2);
  const int n = static_cast<int>(digits.size());
  if (exponent < kFirstPlainExponent || exponent >= kPlainExponentEnd) {
    std::string out = sign + digits[0];
    if (n > 1) out += "." + digits.substr(1);
    std::snprintf(buffer, sizeof(buffer), "e%c%02d", exponent < 0 ? '-' : '+', std::abs(exponent));
    return out + buffer;
  }
  if (exponent < 0) return sign + "0." + std::string(-exponent - 1, '0') + digits;
  if (n <= exponent + 1) return sign + digits + std::string(exponent + 1 - n, '0') + ".0";
  return sign + digits.substr(0, exponent + 1) + "." + digits.substr(exponent + 1);
}

double round_float(double value, int64_t places) {
  // CPython's bounds: beyond the first rounding changes nothing, beyond the second nothing is left.
  constexpr int64_t kMostPlaces = 323, kMostDigits = 308;
  constexpr int kAllPlaces = 60;  // a double of at least 1 has at most 52 digits behind the point
  if (!std::isfinite(value) || value == 0 || places > kMostPlaces) return value;
  if (places >= 0) return read_double(print_double('f', static_cast<int>(places), value));
  if (places < -kMostDigits) return std::copysign(0.0, value);
  // Round the exact decimal expansion, half to even, at a digit before the point.
  std::string s = print_double('f', kAllPlaces, std::fabs(value));
  const size_t point = s.find('.');
  const size_t drop = static_cast<size_t>(-places);
  if (drop > point) return std::copysign(0.0, value);
  std::string head = "0" + s.substr(0, point - drop);
  std::string tail = s.substr(point - drop, drop) + s.substr(point + 1);
  const bool more =
      tail[0] > '5' || (tail[0] == '5' && tail.find_first_not_of('0', 1) != std::string::npos);
  const bool half = tail[0] == '5' && !more;
  if (more || (half && (head.back() - '0') % 2)) {
    size_t i = head.size() - 1;
    while (head[i] == '9') head[i--] = '0';
    head[i]++;
  }
  return std::copysign(read_double(head + std::string(drop, '0')), value);
}

std::optional<double> parse_float(std::string_view text) {
  auto plain = without_underscores(trim_ascii_space(text));
  if (!plain || plain->empty()) return std::nullopt;
  std::string s = *plain;
  const bool negative = s[0] == '-';
  if (s[0] == '-' || s[0] == '+') s.erase(0, 1);
  std::string lower = s;
  for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<uint8_t>(c)));
  double value = 0;
  if (lower == "inf" || lower == "infinity") {
    value = INFINITY;
  } else if (lower == "nan") {
    value = NAN;
  } else {
    if (s.empty() || s.find_first_not_of("0123456789.eE+-") != std::string::npos)
      return std::nullopt;
    if (s[0] == '-' || s[0] == '+') return std::nullopt;
    double parsed = 0;
    const auto result = std::from_chars(s.data(), s.data() + s.size(), parsed);
    if (result.ptr != s.data() + s.size() || result.ec == std::errc::invalid_argument) {
      return std::nullopt;
    }
    value = read_double(s);
  }
  return negative ? -value : value;
}

std::optional<int64_t> parse_int(std::string_view text, int64_t base) {
  if (base != 0 && (base < 2 || base > 36)) return std::nullopt;
  std::string_view s = trim_ascii_space(text);
  const bool negative = !s.empty() && s[0] == '-';
  if (!s.empty() && (s[0] == '-' || s[0] == '+')) s.remove_prefix(1);
  if (s.size() > 1 && s[0] == '0') {
    const char prefix = static_cast<char>(std::tolower(static_cast<uint8_t>(s[1])));
    const int implied = prefix == 'x' ? 16 : prefix == 'o' ? 8 : prefix == 'b' ? 2 : 0;
    if (implied && (base == 0 || base == implied)) {
      s.remove_prefix(2);
      if (!s.empty() && s[0] == '_') s.remove_prefix(1);
      base = implied;
    } else if (base == 0 && s.find_first_not_of("0_") != std::string_view::npos) {
      return std::nullopt;
    }
  }
  if (base == 0) base = 10;
  const auto digits = without_underscores(s);
  if (!digits || digits->empty()) return std::nullopt;
  __int128 value = 0;
  bool big = false;
  for (char c : *digits) {
    const int digit = unicode::digit_value(c);
    if (digit < 0 || digit >= base) return std::nullopt;
    value = value * base + digit;
    if (value > static_cast<__int128>(INT64_MAX)) big = true;
    if (big) value = static_cast<__int128>(INT64_MAX) + 1;
  }
  if (big) unsupported("an integer beyond 64 bits");
  return static_cast<int64_t>(negative ? -value : value);
}

std::optional<int64_t> to_integer(double value) {
  if (!std::isfinite(value)) return std::nullopt;
  value = std::trunc(value);
  if (!fits_int64(value)) unsupported("an integer beyond 64 bits");
  return static_cast<int64_t>(value);
}

}  // namespace mustafar::jinja
