// str.format and format().
#include <algorithm>
#include <string_view>

#include "text/jinja/format.h"
#include "text/jinja/format_spec.h"
#include "text/jinja/interpreter.h"

namespace mustafar::jinja {
namespace {

constexpr int kMaxNesting = 2;  // a field, and fields in its specification

[[noreturn]] void unknown_code(char type, const Value& value) {
  fail("Unknown format code '", type, "' for object of type '", type_name(value), "'");
}

Text format_text_value(const Value& value, FormatSpec spec) {
  if (spec.type && spec.type != 's') unknown_code(spec.type, value);
  if (spec.sign != '-' || spec.alternate || spec.grouping || spec.align == '=') {
    fail("Sign, alternate form, grouping or '=' alignment not allowed in string format specifier");
  }
  if (spec.zero) spec.fill = "0";
  Text text = value.text();
  text.markup = false;
  return format_text(std::move(text), spec, '<');
}

Text format_number(const Value& value, const FormatSpec& spec) {
  if (spec.type == 's') unknown_code('s', value);
  if (spec.type == 'c') unsupported("the format code 'c'");
  const bool float_type = spec.type && is_one_of(spec.type, "eEfFgG%");
  if (!value.is_float() && !float_type) {
    if (spec.precision >= 0) fail("Precision not allowed in integer format specifier");
    return format_integer(value.as_int(), spec);
  }
  if (spec.type && !float_type && spec.type != 'n') unknown_code(spec.type, value);
  if (spec.alternate) unsupported("'#' in the format of a float");
  return format_double(value.as_double(), spec);
}

// Expands the fields of one format string.
class BraceFormatter {
 public:
  BraceFormatter(Interpreter& in, const CallArgs& args) : in_(in), args_(args) {}

  Text expand(const Text& format, int nesting) {
    if (nesting > kMaxNesting) fail("Max string recursion exceeded");
    const std::string& f = format.bytes;
    Text out;
    for (size_t at = 0; at < f.size();) {
      const size_t brace = std::min(f.find_first_of("{}", at), f.size());
      out.append(format, at, brace);
      if (brace == f.size()) break;
      if (brace + 1 < f.size() && f[brace + 1] == f[brace]) {  // a doubled brace is a plain one
        out.append(format, brace, brace + 1);
        at = brace + 2;
        continue;
      }
      if (f[brace] == '}') fail("Single '}' encountered in format string");
      const size_t close = find_close(f, brace);
      out.append(expand_field(format, brace + 1, close, nesting));
      in_.budget().charge(1);
      in_.budget().check_size(out.size());
      at = close + 1;
    }
    in_.budget().charge_text(out.size());
    return out;
  }

 private:
  // The brace that closes the one at `open`.
  static size_t find_close(const std::string& f, size_t open) {
    int nesting = 1;
    for (size_t i = open + 1; i < f.size(); i++) {
      if (f[i] == '{') nesting++;
      if (f[i] == '}' && --nesting == 0) return i;
    }
    fail("expected '}' before end of string");
  }

  // The '!', ':' or closing brace that ends a field's name; in brackets the first two belong to it.
  static size_t find_name_end(const std::string& f, size_t begin, size_t close) {
    bool in_brackets = false;
    for (size_t i = begin; i < close; i++) {
      if (f[i] == '[') in_brackets = true;
      if (f[i] == ']') in_brackets = false;
      if (!in_brackets && (f[i] == '!' || f[i] == ':')) return i;
      if (f[i] == '{') fail("unexpected '{' in field name");
    }
    return close;
  }

  // name[!conversion][:spec] between the braces, [begin, close).
  Text expand_field(const Text& format, size_t begin, size_t close, int nesting) {
    const std::string& f = format.bytes;
    size_t at = find_name_end(f, begin, close);
    Value value = look_up(f.substr(begin, at - begin));
    char conversion = 0;
    if (f[at] == '!') {
      if (at + 1 >= close) fail("end of string while looking for conversion specifier");
      conversion = f[at + 1];
      at += 2;
      if (f[at] != ':' && at != close) fail("expected ':' after conversion specifier");
    }
    Text spec;
    if (f[at] == ':' && at < close) spec = expand(format.sub(at + 1, close), nesting + 1);
    return format_value(in_, converted(std::move(value), conversion), spec);
  }

  Value converted(Value value, char conversion) {
    switch (conversion) {
      case 0:
        return value;
      case 's':
        return Value(to_text(in_, value));
      case 'r':
        return Value(repr(in_, value));
      case 'a':
        unsupported("the conversion '!a'");
      default:
        fail("Unknown conversion specifier ", conversion);
    }
  }

  // An argument, and what the attributes and items behind its name lead to: "0", "user.name[3]".
  Value look_up(const std::string& name) {
    const size_t first_end = std::min(name.find_first_of(".["), name.size());
    Value value = argument(name.substr(0, first_end), first_end == name.size());
    for (size_t at = first_end; at < name.size();) {
      if (name[at] == '.') {
        const size_t end = std::min(name.find_first_of(".[", at + 1), name.size());
        value = in_.get_attribute(value, part(name, at + 1, end));
        at = end;
      } else if (name[at] == '[') {
        const size_t close = name.find(']', at);
        if (close == std::string::npos) fail("Missing ']' in format string");
        const std::string key = part(name, at + 1, close);
        value = in_.get_item(value, is_all_digits(key) ? Value(number_of(key)) : Value(key));
        at = close + 1;
      } else {
        fail("Only '.' or '[' may follow ']' in format field specifier");
      }
    }
    return value;
  }

  static std::string part(const std::string& name, size_t begin, size_t end) {
    if (begin == end) fail("Empty attribute in format string");
    return name.substr(begin, end - begin);
  }

  static int64_t number_of(const std::string& digits) {
    size_t at = 0;
    return read_width(digits, &at);
  }

  // is_whole_name: nothing follows. Only then does Python notice that {} and {0} are mixed, and
  // only then may the name be empty.
  Value argument(const std::string& first, bool is_whole_name) {
    if (first.empty() && is_whole_name) {
      if (any_numbered_) fail_mixed();
      return positional(automatic_++);
    }
    if (is_all_digits(first)) {
      if (is_whole_name) {
        if (automatic_ > 0) fail_mixed();
        any_numbered_ = true;
      }
      return positional(number_of(first));
    }
    for (const auto& [key, value] : args_.keyword) {
      if (key == first) return value;
    }
    fail("KeyError: '", first, "'");
  }

  [[noreturn]] static void fail_mixed() {
    fail("cannot mix automatic field numbering and manual field specification");
  }

  Value positional(int64_t index) const {
    if (index >= static_cast<int64_t>(args_.positional.size())) {
      fail("Replacement index ", index, " out of range for positional args tuple");
    }
    return args_.positional[index];
  }

  Interpreter& in_;
  const CallArgs& args_;
  int64_t automatic_ = 0;  // fields {} so far
  bool any_numbered_ = false;
};

}  // namespace

Text format_value(Interpreter& in, const Value& value, const Text& spec_text) {
  if (spec_text.empty()) return to_text(in, value);
  if (!value.is_number() && !value.is_text()) {
    fail("unsupported format string passed to ", type_name(value), ".__format__");
  }
  const FormatSpec spec = parse_format_spec(spec_text.bytes);
  if (spec.type && !is_one_of(spec.type, "bcdoxXneEfFgG%s")) unknown_code(spec.type, value);
  return value.is_text() ? format_text_value(value, spec) : format_number(value, spec);
}

Text format_method(Interpreter& in, const Text& format, CallArgs& args) {
  return BraceFormatter(in, args).expand(format, 1);
}

}  // namespace mustafar::jinja
