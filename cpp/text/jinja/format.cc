#include "text/jinja/format.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "text/jinja/interpreter.h"
#include "text/unicode/properties.h"
#include "text/unicode/utf8.h"

namespace mustafar::jinja {
namespace {

std::string print_double(char type, int precision, double value) {
  const char format[] = {'%', '.', '*', type, 0};
  const int n = std::snprintf(nullptr, 0, format, precision, value);
  std::string out(static_cast<size_t>(n) + 1, 0);
  std::snprintf(out.data(), out.size(), format, precision, value);
  out.pop_back();
  return out;
}

double read_double(const std::string& s) {
  double value = 0;
  const auto result = std::from_chars(s.data(), s.data() + s.size(), value);
  if (result.ec == std::errc::result_out_of_range) {
    // from_chars leaves the value alone: huge or vanishing by the exponent's sign.
    const size_t e = s.find_first_of("eE");
    const bool tiny = e != std::string::npos && e + 1 < s.size() && s[e + 1] == '-';
    value = tiny || s.find_first_of("123456789") == std::string::npos ? 0 : INFINITY;
    if (s[0] == '-') value = -value;
  }
  return value;
}

std::string_view trim_space(std::string_view s) {
  while (!s.empty() && unicode::is_space(static_cast<uint8_t>(s.front())) && !(s.front() & 0x80)) {
    s.remove_prefix(1);
  }
  while (!s.empty() && !(s.back() & 0x80) && unicode::is_space(static_cast<uint8_t>(s.back()))) {
    s.remove_suffix(1);
  }
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

std::string float_repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[40];
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
  if (exponent < -4 || exponent >= 16) {
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
  if (!std::isfinite(value) || value == 0 || places > 323) return value;
  if (places >= 0) return read_double(print_double('f', static_cast<int>(places), value));
  if (places < -308) return std::copysign(0.0, value);
  // Round the exact decimal expansion, half to even, at a digit before the point.
  std::string s = print_double('f', 60, std::fabs(value));
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
  auto plain = without_underscores(trim_space(text));
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
  std::string_view s = trim_space(text);
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
  if (value >= 9223372036854775808.0 || value < -9223372036854775808.0) {
    unsupported("an integer beyond 64 bits");
  }
  return static_cast<int64_t>(value);
}

namespace {

// How one field is laid out, for both kinds of formatting.
struct Spec {
  std::string fill = " ";
  char align = 0;  // '<', '>', '^', '='
  char sign = '-';
  bool alternate = false;
  bool zero = false;
  char grouping = 0;
  int64_t width = 0;
  int64_t precision = -1;
  char type = 0;
};

constexpr int64_t kMaxFieldWidth = 1000000;

int64_t read_number(std::string_view s, size_t* at) {
  int64_t value = 0;
  while (*at < s.size() && s[*at] >= '0' && s[*at] <= '9') {
    value = std::min(value * 10 + (s[(*at)++] - '0'), kMaxFieldWidth + 1);
  }
  if (value > kMaxFieldWidth) fail("a format field is wider than ", kMaxFieldWidth);
  return value;
}

Text pad_field(const Text& body, const Spec& spec, char default_align) {
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

// Sign and digits of a number, padded between them for '='.
Text pad_number(bool negative, std::string digits, const std::string& prefix, const Spec& spec) {
  if (spec.grouping) {
    size_t end = digits.find_first_not_of("0123456789");
    if (end == std::string::npos) end = digits.size();
    for (size_t i = end; i > 3; i -= 3) digits.insert(i - 3, 1, spec.grouping);
  }
  std::string lead = negative ? "-" : spec.sign == '+' ? "+" : spec.sign == ' ' ? " " : "";
  lead += prefix;
  if (spec.align == '=' || (spec.zero && !spec.align)) {
    if (spec.grouping && spec.zero) unsupported("a zero-padded number with grouping");
    const int64_t missing = spec.width - static_cast<int64_t>(lead.size() + digits.size());
    Text out(lead);
    if (missing > 0) out.pad(static_cast<size_t>(missing), spec.zero ? "0" : spec.fill);
    out.append(digits);
    return out;
  }
  return pad_field(Text(lead + digits), spec, '>');
}

std::string integer_digits(uint64_t magnitude, int base, bool upper) {
  char buffer[72];
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), magnitude, base);
  std::string s(buffer, end.ptr);
  if (upper) std::transform(s.begin(), s.end(), s.begin(), [](char c) { return std::toupper(c); });
  return s;
}

Text format_integer(int64_t value, const Spec& spec) {
  const uint64_t magnitude =
      value < 0 ? 0 - static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
  const int base = spec.type == 'x' || spec.type == 'X' ? 16
                   : spec.type == 'o'                   ? 8
                   : spec.type == 'b'                   ? 2
                                                        : 10;
  const std::string prefix =
      spec.alternate && base != 10 ? std::string("0") + spec.type : std::string();
  return pad_number(value < 0, integer_digits(magnitude, base, spec.type == 'X'), prefix, spec);
}

// Digits of |value| for the type none with a precision: like %g, but never without a point.
std::string general_with_point(double value, int precision) {
  precision = std::max(precision, 1);
  std::string s = print_double('e', precision - 1, value);
  const int exponent = std::atoi(s.c_str() + s.find('e') + 1);
  const auto strip_zeros = [](std::string t) {
    if (t.find('.') == std::string::npos) return t;
    t.erase(t.find_last_not_of('0') + 1);
    if (t.back() == '.') t.pop_back();
    return t;
  };
  if (exponent < -4 || exponent >= precision - 1) {
    const size_t e = s.find('e');
    return strip_zeros(s.substr(0, e)) + s.substr(e);
  }
  s = strip_zeros(print_double('f', precision - 1 - exponent, value));
  return s.find('.') == std::string::npos ? s + ".0" : s;
}

Text format_double(double value, const Spec& spec) {
  const bool negative = std::signbit(value) && !std::isnan(value);
  const double magnitude = std::fabs(value);
  std::string digits;
  const char type = spec.type;
  if (!std::isfinite(value)) {
    digits = std::isnan(value) ? "nan" : "inf";
    if (type == 'E' || type == 'F' || type == 'G') {
      std::transform(digits.begin(), digits.end(), digits.begin(),
                     [](char c) { return std::toupper(c); });
    }
    if (type == '%') digits += "%";
  } else if (type == 0) {
    digits = spec.precision < 0 ? float_repr(magnitude)
                                : general_with_point(magnitude, static_cast<int>(spec.precision));
  } else if (type == '%') {
    digits = print_double('f', spec.precision < 0 ? 6 : static_cast<int>(spec.precision),
                          magnitude * 100) +
             "%";
  } else {
    digits = print_double(type == 'n' ? 'g' : type,
                          spec.precision < 0 ? 6 : static_cast<int>(spec.precision), magnitude);
  }
  return pad_number(negative, digits, "", spec);
}

Spec parse_spec(const std::string& s) {
  Spec spec;
  size_t at = 0;
  const auto is_align = [](char c) { return c == '<' || c == '>' || c == '^' || c == '='; };
  if (!s.empty()) {
    size_t after = 0;
    unicode::next_code_point(s, &after);
    if (after < s.size() && is_align(s[after])) {
      spec.fill = s.substr(0, after);
      spec.align = s[after];
      at = after + 1;
    } else if (is_align(s[0])) {
      spec.align = s[0];
      at = 1;
    }
  }
  if (at < s.size() && (s[at] == '+' || s[at] == '-' || s[at] == ' ')) spec.sign = s[at++];
  if (at < s.size() && s[at] == '#') {
    spec.alternate = true;
    at++;
  }
  if (at < s.size() && s[at] == '0') {
    if (!spec.align) spec.zero = true;
    at++;
  }
  spec.width = read_number(s, &at);
  if (at < s.size() && (s[at] == ',' || s[at] == '_')) spec.grouping = s[at++];
  if (at < s.size() && s[at] == '.') {
    const size_t begin = ++at;
    spec.precision = read_number(s, &at);
    if (at == begin) fail("Format specifier missing precision");
  }
  if (at < s.size()) spec.type = s[at++];
  if (at != s.size()) fail("Invalid format specifier");
  return spec;
}

[[noreturn]] void unknown_code(char type, const Value& value) {
  fail("Unknown format code '", type, "' for object of type '", type_name(value), "'");
}

}  // namespace

Text format_value(Interpreter& in, const Value& value, const Text& spec_text) {
  if (spec_text.empty()) return to_text(in, value);
  if (!value.is_number() && !value.is_text()) {
    fail("unsupported format string passed to ", type_name(value), ".__format__");
  }
  Spec spec = parse_spec(spec_text.bytes);
  const std::string_view types = "bcdoxXneEfFgG%s";
  if (spec.type && types.find(spec.type) == std::string_view::npos) unknown_code(spec.type, value);
  if (value.is_text()) {
    if (spec.type && spec.type != 's') unknown_code(spec.type, value);
    if (spec.sign != '-' || spec.alternate || spec.grouping || spec.align == '=') {
      fail(
          "Sign, alternate form, grouping or '=' alignment not allowed in string format specifier");
    }
    Text body = value.text();
    body.markup = false;
    if (spec.precision >= 0) {
      const auto offsets = unicode::code_point_offsets(body.bytes);
      if (static_cast<size_t>(spec.precision) + 1 < offsets.size()) {
        body = body.sub(0, offsets[spec.precision]);
      }
    }
    if (spec.zero) spec.fill = "0";
    return pad_field(body, spec, '<');
  }
  if (spec.type == 's') unknown_code('s', value);
  if (spec.type == 'c') unsupported("the format code 'c'");
  const bool as_float =
      std::string_view("eEfFgG%").find(spec.type) != std::string_view::npos && spec.type;
  if (value.is_float() || as_float) {
    if (!as_float && spec.type && spec.type != 'n') unknown_code(spec.type, value);
    if (spec.alternate) unsupported("'#' in the format of a float");
    return format_double(value.as_double(), spec);
  }
  if (spec.precision >= 0) fail("Precision not allowed in integer format specifier");
  return format_integer(value.as_int(), spec);
}

Text percent_format(Interpreter& in, const Text& format, const Value& values) {
  Text out;
  size_t used = 0;
  const std::string& f = format.bytes;
  const auto next_value = [&]() -> Value {
    if (values.is_tuple()) {
      if (used >= values.items().size()) fail("not enough arguments for format string");
      return values.items()[used++];
    }
    if (used++ > 0) fail("not enough arguments for format string");
    return values;
  };
  for (size_t i = 0; i < f.size();) {
    if (f[i] != '%') {
      const size_t end = std::min(f.find('%', i), f.size());
      out.append(format, i, end);
      i = end;
      continue;
    }
    i++;
    std::optional<Value> named;
    if (i < f.size() && f[i] == '(') {
      const size_t close = f.find(')', i);
      if (close == std::string::npos) fail("incomplete format key");
      if (!values.is_dict()) fail("format requires a mapping");
      const Value* found = values.dict().find(f.substr(i + 1, close - i - 1));
      if (!found) fail("KeyError: ", f.substr(i + 1, close - i - 1));
      named = *found;
      i = close + 1;
    }
    Spec spec;
    for (; i < f.size() && std::string_view("-+ #0").find(f[i]) != std::string_view::npos; i++) {
      if (f[i] == '-') spec.align = '<';
      if (f[i] == '+') spec.sign = '+';
      if (f[i] == ' ' && spec.sign != '+') spec.sign = ' ';
      if (f[i] == '#') spec.alternate = true;
      if (f[i] == '0') spec.zero = true;
    }
    if (i < f.size() && f[i] == '*') unsupported("'*' in a format string");
    spec.width = read_number(f, &i);
    if (i < f.size() && f[i] == '.') {
      i++;
      if (i < f.size() && f[i] == '*') unsupported("'*' in a format string");
      spec.precision = read_number(f, &i);
    }
    if (i < f.size() && (f[i] == 'h' || f[i] == 'l' || f[i] == 'L')) i++;
    if (i >= f.size()) fail("incomplete format");
    const char type = f[i++];
    if (type == '%') {
      out.append("%");
      continue;
    }
    if (std::string_view("srdiuxXoeEfFgG").find(type) == std::string_view::npos) {
      if (type == 'c' || type == 'a') unsupported("'%", type, "' in a format string");
      fail("unsupported format character '", type, "'");
    }
    const Value value = named ? *named : next_value();
    if (type == 's' || type == 'r') {
      Text body = type == 's' ? to_text(in, value) : repr(in, value);
      if (spec.precision >= 0) {
        const auto offsets = unicode::code_point_offsets(body.bytes);
        if (static_cast<size_t>(spec.precision) + 1 < offsets.size()) {
          body = body.sub(0, offsets[spec.precision]);
        }
      }
      out.append(pad_field(body, spec, '>'));
    } else if (std::string_view("diuxXo").find(type) != std::string_view::npos) {
      if (spec.precision >= 0) unsupported("a precision for an integer in a format string");
      if (!value.is_number()) {
        fail("%", type, " format: a real number is required, not ", type_name(value));
      }
      if (value.is_float() && std::string_view("xXo").find(type) != std::string_view::npos) {
        fail("%", type, " format: an integer is required, not float");
      }
      std::optional<int64_t> number =
          value.is_float() ? to_integer(value.as_double()) : value.as_int();
      if (!number) fail("cannot convert float infinity or NaN to integer");
      spec.type = type == 'i' || type == 'u' ? 'd' : type;
      out.append(format_integer(*number, spec));
    } else {
      if (spec.alternate) unsupported("'#' in the format of a float");
      double number = 0;
      if (value.is_number()) {
        number = value.as_double();
      } else {
        fail("must be real number, not ", type_name(value));
      }
      spec.type = type;
      out.append(format_double(number, spec));
    }
    in.budget().charge_text(out.size() / 16);
    if (out.size() > in.budget().max_bytes) in.budget().charge_text(out.size());
  }
  // What Python takes for a mapping may go unused.
  const bool mapping = values.is_dict() || (values.is_list() && !values.is_tuple()) ||
                       values.is_undefined() ||
                       (values.is_object() && values.object().type_name() == "range");
  const size_t given = values.is_tuple() ? values.items().size() : mapping ? used : 1;
  if (used < given) fail("not all arguments converted during string formatting");
  out.markup = format.markup;
  return out;
}

namespace {

struct FieldCounter {
  int64_t automatic = 0;
  bool manual = false;
};

Text format_fields(Interpreter& in, const Text& format, const CallArgs& args, FieldCounter* counter,
                   int depth);

Value field_value(Interpreter& in, const std::string& name, const CallArgs& args,
                  FieldCounter* counter) {
  const size_t first_end = std::min(name.find_first_of(".["), name.size());
  std::string first = name.substr(0, first_end);
  const auto is_digits = [](const std::string& s) {
    return !s.empty() && s.find_first_not_of("0123456789") == std::string::npos;
  };
  Value value;
  if (name.empty() || is_digits(first)) {
    if (name.empty() ? counter->manual : counter->automatic > 0 && first == name) {
      fail("cannot mix automatic field numbering and manual field specification");
    }
    size_t at = 0;
    if (first == name && !name.empty()) counter->manual = true;
    const int64_t index = first.empty() ? counter->automatic++ : read_number(first, &at);
    if (index >= static_cast<int64_t>(args.positional.size())) {
      fail("Replacement index ", index, " out of range for positional args tuple");
    }
    value = args.positional[index];
  } else {
    bool found = false;
    for (const auto& [key, v] : args.keyword) {
      if (key == first) {
        value = v;
        found = true;
      }
    }
    if (!found) fail("KeyError: '", first, "'");
  }
  for (size_t at = first_end; at < name.size();) {
    if (name[at] == '.') {
      const size_t end = std::min(name.find_first_of(".[", at + 1), name.size());
      if (end == at + 1) fail("Empty attribute in format string");
      value = in.get_attribute(value, name.substr(at + 1, end - at - 1));
      at = end;
    } else if (name[at] == '[') {
      const size_t close = name.find(']', at);
      if (close == std::string::npos) fail("Missing ']' in format string");
      const std::string key = name.substr(at + 1, close - at - 1);
      if (key.empty()) fail("Empty attribute in format string");
      size_t digit = 0;
      value = in.get_item(value, is_digits(key) ? Value(read_number(key, &digit)) : Value(key));
      at = close + 1;
    } else {
      fail("Only '.' or '[' may follow ']' in format field specifier");
    }
  }
  return value;
}

Text format_fields(Interpreter& in, const Text& format, const CallArgs& args, FieldCounter* counter,
                   int depth) {
  if (depth > 2) fail("Max string recursion exceeded");
  const std::string& f = format.bytes;
  Text out;
  for (size_t i = 0; i < f.size();) {
    if (f[i] != '{' && f[i] != '}') {
      const size_t end = std::min(f.find_first_of("{}", i), f.size());
      out.append(format, i, end);
      i = end;
      continue;
    }
    if (i + 1 < f.size() && f[i + 1] == f[i]) {
      out.append(format, i, i + 1);
      i += 2;
      continue;
    }
    if (f[i] == '}') fail("Single '}' encountered in format string");
    int nesting = 1;
    size_t end = i + 1;
    for (; end < f.size() && nesting; end++) nesting += f[end] == '{' ? 1 : f[end] == '}' ? -1 : 0;
    if (nesting) fail("expected '}' before end of string");
    // The name ends at '!' or ':' outside brackets.
    size_t name_end = i + 1;
    for (bool bracket = false; name_end < end - 1; name_end++) {
      if (f[name_end] == '[') bracket = true;
      if (f[name_end] == ']') bracket = false;
      if (!bracket && (f[name_end] == '!' || f[name_end] == ':')) break;
      if (f[name_end] == '{') fail("unexpected '{' in field name");
    }
    Value value = field_value(in, f.substr(i + 1, name_end - i - 1), args, counter);
    size_t at = name_end;
    char conversion = 0;
    if (f[at] == '!') {
      if (at + 2 >= end) fail("end of string while looking for conversion specifier");
      conversion = f[at + 1];
      at += 2;
      if (f[at] != ':' && at != end - 1) fail("expected ':' after conversion specifier");
    }
    Text spec;
    if (f[at] == ':' && at < end - 1) {
      spec = format_fields(in, format.sub(at + 1, end - 1), args, counter, depth + 1);
    }
    if (conversion == 's') {
      value = Value(to_text(in, value));
    } else if (conversion == 'r') {
      value = Value(repr(in, value));
    } else if (conversion == 'a') {
      unsupported("the conversion '!a'");
    } else if (conversion) {
      fail("Unknown conversion specifier ", conversion);
    }
    out.append(format_value(in, value, spec));
    in.budget().charge(1);
    if (out.size() > in.budget().max_bytes) in.budget().charge_text(out.size());
    i = end;
  }
  in.budget().charge_text(out.size());
  return out;
}

}  // namespace

Text format_method(Interpreter& in, const Text& format, CallArgs& args) {
  FieldCounter counter;
  return format_fields(in, format, args, &counter, 1);
}

}  // namespace mustafar::jinja
