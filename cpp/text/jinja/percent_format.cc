// `format % values`.
#include <algorithm>
#include <optional>
#include <string_view>

#include "text/jinja/format.h"
#include "text/jinja/format_spec.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/numbers.h"

namespace mustafar::jinja {
namespace {

class PercentFormatter {
 public:
  PercentFormatter(Interpreter& in, const Text& format, const Value& values)
      : in_(in), format_(format), f_(format.bytes), values_(values) {}

  Text run() {
    while (at_ < f_.size()) {
      const size_t percent = std::min(f_.find('%', at_), f_.size());
      out_.append(format_, at_, percent);
      at_ = percent;
      if (at_ < f_.size()) convert();
    }
    check_all_used();
    out_.markup = format_.markup;
    return std::move(out_);
  }

 private:
  bool at_one_of(std::string_view wanted) const {
    return at_ < f_.size() && is_one_of(f_[at_], wanted);
  }

  // One conversion: %(key)[flags][width][.precision][h|l|L]type.
  void convert() {
    at_++;
    const std::optional<Value> named = take_named();
    FormatSpec spec = read_spec();
    if (at_ >= f_.size()) fail("incomplete format");
    spec.type = f_[at_++];
    if (spec.type == '%') {
      out_.append("%");
      return;
    }
    check_type(spec.type);
    out_.append(formatted(named ? *named : take_next(), spec));
    // Appending may move all that is there, so a share of it counts each time.
    in_.budget().charge_text(out_.size() / Budget::kBytesPerStep);
    in_.budget().check_size(out_.size());
  }

  std::optional<Value> take_named() {
    if (!at_one_of("(")) return std::nullopt;
    const size_t close = f_.find(')', at_);
    if (close == std::string::npos) fail("incomplete format key");
    if (!values_.is_dict()) fail("format requires a mapping");
    const std::string key = f_.substr(at_ + 1, close - at_ - 1);
    const Value* found = values_.dict().find(key);
    if (!found) fail("KeyError: ", key);
    at_ = close + 1;
    return *found;
  }

  // The next of a tuple, or the one value that stands alone.
  Value take_next() {
    const size_t count = values_.is_tuple() ? values_.items().size() : 1;
    if (used_ >= count) fail("not enough arguments for format string");
    const size_t i = used_++;
    return values_.is_tuple() ? values_.items()[i] : values_;
  }

  FormatSpec read_spec() {
    FormatSpec spec;
    for (; at_one_of("-+ #0"); at_++) {
      switch (f_[at_]) {
        case '-':
          spec.align = '<';
          break;
        case '+':
          spec.sign = '+';
          break;
        case ' ':
          if (spec.sign != '+') spec.sign = ' ';
          break;
        case '#':
          spec.alternate = true;
          break;
        default:
          spec.zero = true;
      }
    }
    spec.width = read_number();
    if (at_one_of(".")) {
      at_++;
      spec.precision = read_number();
    }
    if (at_one_of("hlL")) at_++;  // C's lengths, which Python ignores
    return spec;
  }

  int64_t read_number() {
    if (at_one_of("*")) unsupported("'*' in a format string");
    return read_width(f_, &at_);
  }

  static void check_type(char type) {
    if (is_one_of(type, "srdiuxXoeEfFgG")) return;
    if (is_one_of(type, "ca")) unsupported("'%", type, "' in a format string");
    fail("unsupported format character '", type, "'");
  }

  Text formatted(const Value& value, const FormatSpec& spec) {
    if (spec.type == 's') return format_text(to_text(in_, value), spec, '>');
    if (spec.type == 'r') return format_text(repr(in_, value), spec, '>');
    if (is_one_of(spec.type, "diuxXo")) return format_as_integer(value, spec);
    if (spec.alternate) unsupported("'#' in the format of a float");
    if (!value.is_number()) fail("must be real number, not ", type_name(value));
    return format_double(value.as_double(), spec);
  }

  static Text format_as_integer(const Value& value, FormatSpec spec) {
    if (spec.precision >= 0) unsupported("a precision for an integer in a format string");
    if (!value.is_number()) {
      fail("%", spec.type, " format: a real number is required, not ", type_name(value));
    }
    if (value.is_float() && is_one_of(spec.type, "xXo")) {
      fail("%", spec.type, " format: an integer is required, not float");
    }
    const std::optional<int64_t> number =
        value.is_float() ? to_integer(value.as_double()) : value.as_int();
    if (!number) fail("cannot convert float infinity or NaN to integer");
    if (is_one_of(spec.type, "iu")) spec.type = 'd';
    return format_integer(*number, spec);
  }

  // Every value must have been used, but for what Python takes for a mapping.
  void check_all_used() const {
    const bool is_mapping = values_.is_dict() || (values_.is_list() && !values_.is_tuple()) ||
                            values_.is_undefined() ||
                            (values_.is_object() && values_.object().type_name() == "range");
    const size_t needed = values_.is_tuple() ? values_.items().size() : is_mapping ? 0 : 1;
    if (used_ < needed) fail("not all arguments converted during string formatting");
  }

  Interpreter& in_;
  const Text& format_;
  const std::string& f_;  // its bytes
  const Value& values_;
  Text out_;
  size_t at_ = 0;    // in f_
  size_t used_ = 0;  // values taken by position
};

}  // namespace

Text percent_format(Interpreter& in, const Text& format, const Value& values) {
  return PercentFormatter(in, format, values).run();
}

}  // namespace mustafar::jinja
